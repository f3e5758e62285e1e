"""A run that is killed continues as if nothing had happened, also on another number of ranks."""

import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model
from spawn import Ranks, run_worker, start
from spawn import train as train_on_ranks
from transformers import AutoTokenizer

from megaskip.calibration import threshold
from megaskip.cli.train import main as train
from megaskip.errors import MegaskipError
from megaskip.parallel.engine import Engine
from megaskip.parallel.preempt import Preemption
from megaskip.training import router_trainer

ZERO3 = ["--ds_config", "ds_configs/zero3.json"]
STAGES = ["--ds_config", "ds_configs/pipeline.json", "--pipeline_stages", "2"]
DEMO = Path(__file__).parents[2] / "megaskip/demo/backbone"
STEPS = 10
NOISE = {"tokens_per_second", "peak_memory_gib"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    rows = []
    for _ in range(120):
        words = " ".join(
            rng.choice(("king", "queen", "sword", "night")) for _ in range(rng.randint(2, 9))
        )
        rows.append({"prompt": f"Repeat: {words}", "completion": words})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(data: Path, output_dir: Path, *more: str) -> list[str]:
    """Return the flags of a run that trains all there is: routers, compensations, adapters."""
    return [
        *("--data", str(data / "rows.jsonl"), "--cache_dir", str(data / "cache")),
        *("--output_dir", str(output_dir), "--max_steps", str(STEPS), "--save_every", "3"),
        *("--micro_batch_size", "1", "--gradient_accumulation_steps", "4", "--held_out", "8"),
        # In bfloat16 ranks may round a unit at the threshold to either side of it.
        *("--calibration_rows", "16", "--lr", "1e-2", "--dtype", "float32"),
        *("--compensation", "low_rank", "--compensation_rank", "4", "--fit_rows", "16"),
        *("--lora_rank", "2", "--lora_start", "2", "--lora_lr", "1e-3", *more),
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in NOISE} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(data: Path) -> Path:
    done = train_on_ranks(data / "log", *flags(data, data / "whole", *ZERO3))
    assert [p.returncode for p in done.processes] == [0, 0], done.tails()
    assert len(metrics(data / "whole")) == STEPS
    return data / "whole"


def wait_for(path: Path, ranks: Ranks, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came\n{ranks.tails()}"
        assert ranks.processes[0].poll() is None, ranks.tails()
        time.sleep(0.02)


@pytest.mark.parametrize("victim", [1, 0])
def test_killed_rank_is_named_and_resume_repeats_the_run_exactly(
    data: Path, uninterrupted: Path, tmp_path: Path, victim: int
) -> None:
    folder = tmp_path / "run"
    settings = flags(data, folder, "--heartbeat_timeout", "10", *ZERO3)
    ranks = start(["launch/train.py", *settings], 2, tmp_path / "log")
    wait_for(folder / "step_000003" / "COMPLETE", ranks)
    os.kill(ranks.processes[victim].pid, signal.SIGKILL)
    killed_at = time.monotonic()
    statuses = ranks.wait(60)
    survivor = 1 - victim
    assert time.monotonic() - killed_at < 60
    assert statuses[survivor] not in (0, None)
    assert f"rank {victim} (process {ranks.processes[victim].pid}" in ranks.text(survivor)
    assert "--resume auto" in ranks.text(survivor)
    again = train_on_ranks(tmp_path / "again", *settings, "--resume", "auto")
    assert [p.returncode for p in again.processes] == [0, 0], again.tails()
    assert "resumed from" in again.text(0)
    assert metrics(folder) == metrics(uninterrupted)
    for name in ("routers.safetensors", "router_config.json", "adapter/adapter_model.safetensors"):
        name = f"routers/{name}"
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes(), name


def test_sigterm_on_one_rank_saves_on_all_and_resume_is_exact(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = flags(data, folder, *ZERO3)
    ranks = start(["launch/train.py", *settings], 2, tmp_path / "log")
    wait_for(folder / "step_000003" / "COMPLETE", ranks)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait(60) == [0, 0], ranks.tails()
    assert "asked to stop: saved" in ranks.text(0)
    assert not (folder / "report.json").exists()
    again = train_on_ranks(tmp_path / "again", *settings, "--resume", "auto")
    assert [p.returncode for p in again.processes] == [0, 0], again.tails()
    assert metrics(folder) == metrics(uninterrupted)


def test_what_is_trained_is_safe_before_it_is_calibrated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **options: object) -> float:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    settings = flags(data, folder, "--save_every", "0", "--no-progress")
    monkeypatch.setattr(router_trainer, "calibrate_threshold", killed)
    with pytest.raises(KeyboardInterrupt):
        train(settings)
    assert (folder / f"step_{STEPS:06d}" / "COMPLETE").is_file()
    monkeypatch.undo()
    train([*settings, "--resume", "auto"])
    report = json.loads((folder / "report.json").read_text())
    assert (report["steps"], report["calibrated_capacity"] is not None) == (STEPS, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_calibration_and_a_finished_run_is_left_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    decide_all, trained = threshold.decide_all, []

    def signalled(engine: Engine, batches: object, check: object) -> object:
        trained.append(saved())
        if len(trained) == 2:  # the search has moved the threshold
            os.kill(os.getpid(), number)
        return decide_all(engine, batches, check)  # type: ignore[arg-type]

    # With maps the first threshold keeps what is asked, and there is no search to stop.
    plain = ("--compensation", "none", "--lora_start", "0", "--lora_rank", "0", "--no-progress")
    train(flags(data, tmp_path / "whole", *plain))
    folder = tmp_path / "run"
    checkpoint = folder / f"step_{STEPS:06d}"

    def saved() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    settings = [*flags(data, folder, *plain), "--resume", "auto"]
    monkeypatch.setattr(threshold, "decide_all", signalled)
    train(settings)
    assert "COMPLETE" in saved()
    assert saved() == trained[0]  # as it was trained, not half calibrated
    assert not (folder / "report.json").exists()
    assert len(trained) == 2
    monkeypatch.undo()
    train(settings)
    for name in ("routers/routers.safetensors", "routers/router_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    done = {name: (folder / name).read_bytes() for name in ("report.json", "run.json")}
    train([*settings, "--lr", "0.5"])
    assert {name: (folder / name).read_bytes() for name in done} == done


def test_only_a_ctrl_c_that_somebody_pressed_again_ends_it_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    preemption = Preemption()
    preemption._note(signal.SIGINT, None)
    clock[0] += 1.0  # the launcher passes it on
    preemption._note(signal.SIGINT, None)
    clock[0] += 5.0
    with pytest.raises(KeyboardInterrupt):
        preemption._note(signal.SIGINT, None)


def test_training_that_diverges_ends_with_the_step_and_keeps_its_checkpoints(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of a step may be read later than it is taken, but before the next checkpoint."""
    step = Engine.launch_step

    def diverging(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        if (tmp_path / "run/step_000003").exists():
            for parameter in engine.parameters.values():
                parameter.data.fill_(math.nan)
        return step(engine, *args, **kwargs)

    monkeypatch.setattr(Engine, "launch_step", diverging)
    with pytest.raises(MegaskipError, match="step 4: the gradient is nan"):
        train(flags(data, tmp_path / "run", "--no-progress"))
    assert (tmp_path / "run/step_000003/COMPLETE").is_file()
    assert not (tmp_path / "run/step_000006").exists()


def test_run_continues_on_other_numbers_of_ranks(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """2 ranks, then 1, then 4: the global batch stays, so the numbers agree to rounding."""
    folder = tmp_path / "run"
    first = flags(data, folder, "--keep_last", "9", *ZERO3)
    ranks = start(["launch/train.py", *first], 2, tmp_path / "first")
    wait_for(folder / "step_000003" / "COMPLETE", ranks)
    ranks.kill()
    ranks = start(["launch/train.py", *first, "--resume", "auto"], 1, tmp_path / "second")
    wait_for(folder / "step_000006" / "COMPLETE", ranks)
    ranks.kill()
    last = train_on_ranks(tmp_path / "third", *first, "--resume", "auto", ranks=4)
    assert [p.returncode for p in last.processes] == [0] * 4, last.tails()
    for mine, truth in zip(metrics(folder), metrics(uninterrupted), strict=True):
        for key in ("step", "loss_task", "loss_penalty", "capacity", "lr"):
            assert mine[key] == pytest.approx(truth[key], rel=1e-5, abs=1e-6), (key, mine["step"])


def test_replicas_continue_a_zero3_run(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """A checkpoint holds nothing of the engine that wrote it."""
    folder = tmp_path / "run"
    checkpoint = str(sorted(uninterrupted.glob("step_*"))[-2])
    done = train_on_ranks(tmp_path / "log", *flags(data, folder, "--resume", checkpoint), ranks=1)
    assert done.processes[0].returncode == 0, done.tails()
    assert json.loads((folder / "run.json").read_text())["world_size"] == 1
    first = int(Path(checkpoint).name.removeprefix("step_"))
    for mine, truth in zip(metrics(folder), metrics(uninterrupted)[first:], strict=True):
        assert mine["loss_task"] == pytest.approx(truth["loss_task"], rel=1e-5)
        assert mine["capacity"] == pytest.approx(truth["capacity"])


def test_run_moves_between_zero3_stages_and_one_process(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """ZeRO-3 on 2 ranks, two stages, one process, ZeRO-3 on 4 ranks: one run, without a jump."""
    folder = tmp_path / "run"
    common = flags(data, folder, "--keep_last", "9", "--save_every", "2")
    last = 0
    for number, (engine, ranks) in enumerate(((ZERO3, 2), (STAGES, 2), ([], 1))):
        resume = ["--resume", "auto"] if number else []
        done = start(
            ["launch/train.py", *common, *engine, *resume], ranks, tmp_path / f"log{number}"
        )
        wait_for(folder / f"step_{last + 2:06d}" / "COMPLETE", done)
        done.kill()
        last = max(int(p.parent.name.removeprefix("step_")) for p in folder.glob("*/COMPLETE"))
    done = train_on_ranks(tmp_path / "last", *common, *ZERO3, "--resume", "auto", ranks=4)
    assert [p.returncode for p in done.processes] == [0] * 4, done.tails()
    for mine, truth in zip(metrics(folder), metrics(uninterrupted), strict=True):
        for key in ("step", "loss_task", "loss_penalty", "capacity", "lr"):
            assert mine[key] == pytest.approx(truth[key], rel=1e-5, abs=1e-6), (key, mine["step"])


def test_sigterm_on_one_stage_saves_on_all_and_resume_is_exact(data: Path, tmp_path: Path) -> None:
    whole = train_on_ranks(tmp_path / "log", *flags(data, tmp_path / "whole", *STAGES))
    assert [p.returncode for p in whole.processes] == [0, 0], whole.tails()
    folder = tmp_path / "run"
    settings = flags(data, folder, *STAGES)
    ranks = start(["launch/train.py", *settings], 2, tmp_path / "first")
    wait_for(folder / "step_000003" / "COMPLETE", ranks)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait(90) == [0, 0], ranks.tails()
    assert "asked to stop: saved" in ranks.text(0)
    again = train_on_ranks(tmp_path / "again", *settings, "--resume", "auto")
    assert [p.returncode for p in again.processes] == [0, 0], again.tails()
    assert metrics(folder) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("engine", [[], STAGES], ids=["replicas", "stages"])
@pytest.mark.parametrize("kind", ["experts", "nf4"])
def test_experts_and_a_4_bit_base_resume_exactly(
    data: Path, kind: str, engine: list[str], tmp_path: Path
) -> None:
    mixture = tmp_path / "mixture"
    if kind == "experts":
        vocabulary = len(AutoTokenizer.from_pretrained(DEMO))
        tiny_model("mixtral", vocab_size=vocabulary).save_pretrained(mixture)
        for file in DEMO.glob("tokenizer*"):
            shutil.copy(file, mixture)
        what = ["--model", str(mixture), "--granularity", "expert_token"]
        what += ["--compensation", "none"]
    else:
        pytest.importorskip("bitsandbytes", reason="the [4bit] extra is not installed")
        what = ["--base_dtype", "nf4"]
    what += ["--max_steps", "5"]
    whole = flags(data, tmp_path / "whole", *engine, *what, "--keep_last", "9")
    checkpoint = ["--resume", str(tmp_path / "whole/step_000003")]
    again = flags(data, tmp_path / "again", *engine, *what, *checkpoint)
    run_worker("trainings", 2, cases=[whole, again], watched=str(tmp_path))
    assert metrics(tmp_path / "again") == metrics(tmp_path / "whole")[3:]
    for file in ("routers.safetensors", "router_config.json", "adapter/adapter_model.safetensors"):
        files = [tmp_path / run / "routers" / file for run in ("whole", "again")]
        assert files[0].read_bytes() == files[1].read_bytes(), file


def test_a_rank_that_is_done_is_not_taken_for_dead_while_another_works() -> None:
    assert run_worker("patient", 2, silence=3, work=7.0) == [True, True]


def test_resume_never_drops_later_checkpoints(data: Path, uninterrupted: Path) -> None:
    earlier, later = sorted(uninterrupted.glob("step_*"))[-2:]
    done = train_on_ranks(
        data / "log", *flags(data, uninterrupted, "--resume", str(earlier)), ranks=1
    )
    assert done.processes[0].returncode == 2
    assert f"holds {later.name}, which would be lost" in done.text(0)
