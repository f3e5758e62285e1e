"""Trainers of transformers and TRL train routers as megaskip's own trainer does."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import trl
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

import megaskip
from megaskip import RouterConfig, RouterSet, attach_routers, load_routers
from megaskip.arch.task_loss import TaskLoss
from megaskip.calibration.threshold import calibrate_threshold
from megaskip.checkpoint.routers import read_router_config
from megaskip.config import DataConfig, OptimConfig, RunConfig
from megaskip.data import Batch, build_dataset
from megaskip.data.loader import DataLoader
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError
from megaskip.integrations import route_tune
from megaskip.parallel.engine import Engine
from megaskip.parallel.topology import read_topology

pytestmark = pytest.mark.usefixtures("warm_python")

DEMO = Path(megaskip.__file__).parent / "demo"
STEPS, ROWS, MICRO_BATCHES, RATE = 6, 4, 2, 2e-3
EPSILON = 1e-6
"""Of AdamW in all trainings. Its default makes steps of the rounding of gradients of 1e-9, which
maps have while they are near 0."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEMO / "backbone")


@pytest.fixture(scope="module")
def batches(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[list[Batch]]:
    """The micro-batches of each step, of the demo's chats."""
    data = DataConfig(
        data=(str(DEMO / "instruct.jsonl"),),
        seq_length=128,
        max_samples=200,
        held_out=0,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )
    loader = DataLoader(
        data=build_dataset(data, tokenizer),
        rank=0,
        world_size=1,
        micro_batch_size=ROWS,
        global_batch_size=ROWS * MICRO_BATCHES,
        seed=0,
        pad_token_id=tokenizer.pad_token_id,
        prompt_tokens=RouterConfig().prompt_tokens,
    )
    steps = loader.steps(0)
    return [next(steps) for _ in range(STEPS)]


def demo_model(**changes: Any) -> Any:
    folder = DEMO / "backbone"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes).eval()


def as_dataset(steps: Sequence[Sequence[Batch]]) -> datasets.Dataset:
    """The same rows in the same order, without padding."""
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for batch in (batch for micro_batches in steps for batch in micro_batches):
        for ids, labels, real in zip(batch.input_ids, batch.labels, batch.token_mask, strict=True):
            rows["input_ids"].append(ids[real].tolist())
            rows["labels"].append(labels[real].tolist())
    return datasets.Dataset.from_dict(rows)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "learning_rate": RATE,
        "adam_epsilon": EPSILON,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }


def hf_trainer(
    folder: Path, steps: Any, tokenizer: Any, *, model: Any = None, **changes: Any
) -> Trainer:
    return Trainer(
        model=demo_model() if model is None else model,
        args=TrainingArguments(**settings(folder, **changes)),
        train_dataset=as_dataset(steps),
        eval_dataset=as_dataset(steps[:2]),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
    )


def sft_trainer(folder: Path, steps: Any, tokenizer: Any, **changes: Any) -> Any:
    return trl.SFTTrainer(
        model=demo_model(),
        args=trl.SFTConfig(**settings(folder, **changes)),
        train_dataset=as_dataset(steps),
        eval_dataset=as_dataset(steps[:2]),
        processing_class=tokenizer,
    )


def own_training(
    steps: Sequence[Sequence[Batch]], config: RouterConfig
) -> tuple[list[dict[str, float]], RouterSet, float]:
    """What megaskip's engine does on these batches: numbers by step, routers, calibrated share."""
    model = demo_model()
    routers = attach_routers(model, config, register=False)
    run = RunConfig(optim=OptimConfig(lr=RATE, compensation_lr=RATE, max_grad_norm=1.0))
    engine = Engine(TaskLoss(model, chunk_tokens=64), routers, run, read_topology({}))
    for group in engine.optimizer.param_groups:
        assert group["eps"] == TrainingArguments("unused").adam_epsilon, "the defaults agree"
        group["eps"] = EPSILON
    numbers = []
    for step, micro_batches in enumerate(steps):
        result = engine.train_step(micro_batches, RATE, (step + 1) / len(steps))
        numbers.append(
            {
                "loss": result.loss_task + result.loss_penalty,
                "loss_penalty": result.loss_penalty,
                "capacity": result.capacity,
            }
        )
    kept = 1.0
    if config.budget == "global":
        kept = calibrate_threshold(engine, [batch for step in steps for batch in step])
    return numbers, routers, kept


def require_same(trainer: Any, expected: list[dict[str, float]]) -> None:
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == len(expected)
    for ours, theirs in zip(expected, logged, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs["capacity"] == pytest.approx(ours["capacity"], abs=1e-9)
        assert theirs["loss_penalty"] == pytest.approx(ours["loss_penalty"], abs=1e-6)


@pytest.mark.parametrize("make", [hf_trainer, sft_trainer])
@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token"])
@pytest.mark.parametrize(
    "options",
    [
        {"budget": "global"},
        {"budget": "layer"},
        {"compensation": "low_rank", "compensation_rank": 4},
        {"budget": "static", "compensation": "bias"},
    ],
    ids=["global", "layer", "compensated", "static"],
)
def test_losses_and_routers_are_those_of_megaskips_own_trainer(
    make: Any,
    granularity: str,
    options: dict[str, Any],
    batches: list[list[Batch]],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    config = RouterConfig(granularity=granularity, capacity=0.5, **options)
    expected, routers, _ = own_training(batches, config)
    trainer = make(tmp_path, batches, tokenizer)
    trained = route_tune(trainer, config)
    trainer.train()
    require_same(trainer, expected)
    for name, weight in routers.state_dict().items():
        assert torch.allclose(trained.state_dict()[name], weight, atol=2e-5), name
    if config.budget == "global":
        assert trained.settled_config().threshold == pytest.approx(
            routers.settled_config().threshold, abs=1e-4
        )


def test_frozen_layers_have_no_dropout_and_do_not_change(
    batches: list[list[Batch]], tokenizer: Any, tmp_path: Path
) -> None:
    expected, _, _ = own_training(batches[:2], RouterConfig())
    model = demo_model(attention_dropout=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = hf_trainer(tmp_path, batches, tokenizer, model=model, max_steps=2)
    route_tune(trainer, RouterConfig(), calibration_rows=0)
    trainer.train()
    require_same(trainer, expected)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {f"skip_routers.{layer}.attn.weight" for layer in (3, 4, 5, 6)}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_samples_of_a_flattened_batch_are_decided_about_one_by_one(
    batches: list[list[Batch]], tokenizer: Any, tmp_path: Path
) -> None:
    expected, _, _ = own_training(batches[:2], RouterConfig())
    trainer = hf_trainer(tmp_path, batches, tokenizer, max_steps=2)
    trainer.data_collator = DataCollatorWithFlattening()
    route_tune(trainer, RouterConfig(), calibration_rows=0)
    trainer.train()
    require_same(trainer, expected)


def test_the_routers_that_are_written_are_calibrated_and_load_on_the_base(
    batches: list[list[Batch]], tokenizer: Any, tmp_path: Path
) -> None:
    _, routers, kept = own_training(batches, RouterConfig())
    trainer = hf_trainer(tmp_path, batches, tokenizer)
    route_tune(trainer, RouterConfig())
    trainer.train()
    config, layers, base = read_router_config(tmp_path / "routers")
    assert config.threshold == pytest.approx(routers.settled_config().threshold, abs=1e-4)
    assert kept == pytest.approx(0.5, abs=0.02)  # of 4 x 48 decisions
    assert layers == (3, 4, 5, 6)
    assert base is not None
    assert (base.name, base.weights is None) == (str(DEMO / "backbone"), False)
    loaded = load_routers(demo_model(), tmp_path / "routers")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, trainer.model.skip_routers.state_dict()[name])


def test_a_checkpoint_holds_the_routers_alone_and_training_goes_on_from_it(
    batches: list[list[Batch]], tokenizer: Any, tmp_path: Path
) -> None:
    def train(resume: bool) -> Any:
        steps = {"save_strategy": "steps", "save_steps": 3}
        trainer = hf_trainer(tmp_path, batches, tokenizer, **steps)
        route_tune(trainer, RouterConfig(), calibration_rows=0)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        return trainer

    whole = train(resume=False)
    written = {file.name: file.stat().st_size for file in (tmp_path / "checkpoint-3").rglob("*.*")}
    assert "routers.safetensors" in written
    assert not [name for name in written if name.startswith(("model", "pytorch_model"))]
    again = train(resume=True)
    weights = whole.model.skip_routers.state_dict()
    for name, weight in again.model.skip_routers.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    budgets = [run.model.skip_routers.steering.budget for run in (again, whole)]
    assert budgets[0].state() == budgets[1].state()


def test_evaluations_are_at_the_asked_capacity_and_log_what_ran(
    batches: list[list[Batch]], tokenizer: Any, tmp_path: Path
) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 16}
    trainer = hf_trainer(tmp_path, batches, tokenizer, **evaluation)
    route_tune(trainer, RouterConfig())
    trainer.train()
    assert sum("eval_capacity" in entry for entry in trainer.state.log_history) == 2
    trainer.evaluate()
    model = demo_model()
    routers = load_routers(model, tmp_path / "routers", register=False)
    engine = Engine(TaskLoss(model, chunk_tokens=64), routers, RunConfig(), read_topology({}))
    expected = engine.evaluate([b for step in batches[:2] for b in step], routed=True)
    assert trainer.state.log_history[-1]["eval_capacity"] == pytest.approx(expected.capacity)
    assert trainer.state.log_history[-1]["eval_loss"] == pytest.approx(expected.loss, rel=1e-4)


def test_two_processes_train_as_one_does(
    batches: list[list[Batch]], tokenizer: Any, tmp_path: Path
) -> None:
    expected, routers, _ = own_training(batches, RouterConfig())
    as_dataset(batches).save_to_disk(tmp_path / "rows")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += ["2", str(Path(__file__).parent / "replica.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    logged = json.loads((tmp_path / "log.json").read_text())
    require_same(SimpleNamespace(state=SimpleNamespace(log_history=logged)), expected)
    config, _, _ = read_router_config(tmp_path / "routers")
    assert config.threshold == pytest.approx(routers.settled_config().threshold, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bf16": True}, "bf16=True computes in mixed precision"),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            "use_reentrant=True, which loses the gradient",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(
    changes: dict[str, Any],
    expected: str,
    batches: list[list[Batch]],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    trainer = hf_trainer(tmp_path, batches, tokenizer, **changes)
    with pytest.raises(ConfigError, match=expected):
        route_tune(trainer, RouterConfig())
    assert type(trainer) is Trainer


def test_route_tune_is_called_once_and_knows_what_is_routed(
    batches: list[list[Batch]], tokenizer: Any, tmp_path: Path
) -> None:
    trainer = hf_trainer(tmp_path, batches, tokenizer)
    with pytest.raises(ConfigError, match="no routers; give a RouterConfig"):
        route_tune(trainer)
    routers = attach_routers(trainer.model, RouterConfig(capacity=0.7))
    with pytest.raises(ConfigError, match="has routers already; leave config out"):
        route_tune(trainer, RouterConfig())
    assert route_tune(trainer) is routers
    with pytest.raises(ConfigError, match="trains routers already"):
        route_tune(trainer)


def test_a_loss_without_gradient_is_an_error(
    batches: list[list[Batch]], tokenizer: Any, tmp_path: Path
) -> None:
    trainer = sft_trainer(tmp_path, batches, tokenizer, label_smoothing_factor=0.1)
    route_tune(trainer, RouterConfig())
    with pytest.raises(ConfigError, match="without gradient, so routers cannot learn"):
        trainer.train()
