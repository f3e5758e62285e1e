"""LoRA with routers: what it computes is peft's, what it writes peft loads, and it trains, resumes
and merges beside routers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from peft import PeftModel
from routed_models import randomise, whole_ids
from safetensors.torch import load_file, save_file
from tiny_run import alone, router_trainer, tiny_config

from megaskip import (
    RouterConfig,
    attach_routers,
    detach_routers,
    load_for_inference,
    load_routers,
    save_routers,
)
from megaskip.arch.adapters import add_adapters
from megaskip.checkpoint.base import describe_base
from megaskip.cli.convert import main as convert
from megaskip.cli.export_static import main as export_static
from megaskip.config import AdapterConfig, RunConfig, parse_run_config
from megaskip.config.run import CheckpointConfig
from megaskip.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.usefixtures("warm_python")

LORA = AdapterConfig(lora_rank=2, lora_alpha=8)


def adapted(
    family: str = "llama", lora: AdapterConfig = LORA, granularity: str = "attn_sequence"
) -> tuple[Any, Any]:
    """Return a tiny model with routers that decide by what they read, and random adapters."""
    model = tiny_model(family)
    routers = attach_routers(model, RouterConfig(granularity=granularity), register=False)
    randomise(routers)
    add_adapters(model, routers, model, RunConfig(adapter=lora))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in routers.adapters.tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)
    return model, routers


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "all"),
        ("llama", "layers.3.self_attn.v_proj"),
        ("gemma2", "q_proj,down_proj"),
        ("mixtral", "all"),  # its experts are fused: adapters of the attention alone
    ],
)
def test_peft_loads_what_is_written_and_computes_the_same(
    family: str, targets: str, tmp_path: Path
) -> None:
    lora = dataclasses.replace(LORA, lora_targets=targets)
    model, routers = adapted(family, lora)
    keys, ids = list(model.state_dict()), whole_ids(2, 9)
    save_routers(tmp_path / "routers", routers)
    with torch.no_grad(), routers.disabled():
        dense = model(ids).logits
        with routers.adapters.disabled():
            frozen = model(ids).logits
    plain = tiny_model(family)
    assert keys == list(plain.state_dict())
    assert torch.equal(plain(ids).logits, frozen)
    by_peft = PeftModel.from_pretrained(tiny_model(family), str(tmp_path / "routers/adapter"))
    assert len(by_peft.state_dict()) == len(keys) + len(routers.adapters.tensors())
    assert torch.allclose(by_peft(input_ids=ids).logits, dense, atol=1e-5)
    assert not torch.allclose(dense, frozen, atol=1e-3)


def test_router_folders_carry_the_adapter_and_are_nothing_without_it(tmp_path: Path) -> None:
    model, routers = adapted()
    ids, folder = whole_ids(2, 9), tmp_path / "routers"
    save_routers(folder, routers, base=describe_base(model.config))
    other = tiny_model()
    loaded = load_routers(other, folder)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
    assert not any(p.requires_grad for p in loaded.adapters.tensors().values())
    save_routers(tmp_path / "again", loaded, base=describe_base(model.config))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        again = tmp_path / "again/adapter" / name
        assert (folder / "adapter" / name).read_bytes() == again.read_bytes()
    detach_routers(other)
    assert torch.equal(other(ids).logits, tiny_model()(ids).logits)
    (folder / "adapter/adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="were trained with an adapter, and adapter/ is not"):
        load_routers(tiny_model(), folder)


def test_adapters_that_are_more_than_lora_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_routers(tmp_path, adapted()[1])
    file = tmp_path / "adapter/adapter_config.json"
    content = json.loads(file.read_text())
    with pytest.raises(CheckpointError, match="features in .* the model at hand has 80 and 32"):
        load_routers(tiny_model(intermediate_size=80), tmp_path)
    file.write_text(json.dumps(content | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="plain LoRA adapters, this one is LORA with use_d"):
        load_routers(tiny_model(), tmp_path)
    file.write_text(json.dumps(content | {"target_modules": ["q_proj"]}))
    with pytest.raises(CheckpointError, match="down_proj, which adapter_config.json does not name"):
        load_routers(tiny_model(), tmp_path)
    file.write_text(json.dumps(content))
    weights = file.with_name("adapter_model.safetensors")
    stored = load_file(weights)
    save_file({k: v for k, v in stored.items() if ".4.self_attn.v_proj." not in k}, weights)
    with pytest.raises(CheckpointError, match="no matrices for model.layers.4.self_attn.v_proj"):
        load_routers(tiny_model(), tmp_path)


@pytest.mark.parametrize("start", [0, 3])
def test_a_run_trains_adapters_from_their_start_and_resumes_exactly(
    start: int, tmp_path: Path
) -> None:
    lora = dataclasses.replace(LORA, lora_start=start)
    kept = CheckpointConfig(save_every=2, keep_last=9)
    config = dataclasses.replace(tiny_config(), adapter=lora, checkpoint=kept)
    with alone() as topology:
        whole = router_trainer(tmp_path / "whole", topology, config)
        report = whole.run()
        # Of a checkpoint before they start, and of one after it.
        for step in (2, 4):
            resumed = router_trainer(tmp_path / f"resumed{step}", topology, config)
            resumed.resume(tmp_path / "whole" / f"step_{step:06d}")
            resumed.run()
            for name, tensor in resumed.engine.parameters.items():
                assert torch.equal(tensor, whole.engine.parameters[name]), (step, name)
    trained = whole.engine.routers.adapters.tensors()
    assert all(float(t.detach().abs().max()) > 0 for n, t in trained.items() if "lora_B" in n)
    steps = {float(whole.engine.optimizer.state[t]["step"]) for t in trained.values()}
    assert steps == {6 - start}
    assert report["held_out"]["loss_base"] != report["held_out"]["loss_dense"]


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(), adapter=LORA)
    with alone() as topology:
        saved = router_trainer(tmp_path / "run", topology, config).save()
        for lora, flag in (
            (AdapterConfig(), "--lora_rank"),
            (dataclasses.replace(LORA, lora_alpha=1.0), "--lora_alpha"),
            (dataclasses.replace(LORA, lora_targets="q_proj"), "--lora_targets"),
        ):
            other = dataclasses.replace(config, adapter=lora)
            with pytest.raises(CheckpointError, match=f"{flag} differs from the run"):
                router_trainer(tmp_path / "other", topology, other).resume(saved)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rank", "-1"], "--lora_rank -1 must be at least 0"),
        (["--lora_rank", "2.5"], "expected a whole number"),
        (["--lora_alpha", "4"], "--lora_alpha needs --lora_rank"),
        (["--lora_start", "3"], "--lora_start needs --lora_rank"),
        (["--lora_rank", "2", "--lora_alpha", "0"], "--lora_alpha 0 switches the adapters off"),
        (["--lora_rank", "2", "--lora_targets", ","], "names nothing"),
        (
            ["--lora_rank", "2", "--lora_start", "9", "--max_steps", "9"],
            "behind the last step .*; give a lower --lora_start, or more steps",
        ),
        (["--lora_rank", "2", "--lr", "0"], "--lora_lr is scaled with it"),
        (["--lora_rank", "2", "--train", "full"], "leave out --train full"),
        (["--lora_rank", "2", "--cache_prefix", "memory"], "does not go with --lora_rank 2"),
        (["--budget", "dense"], "give it --lora_rank"),
    ],
)
def test_settings_that_mean_nothing_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_config(flags)


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", "q_prjo", "--lora_targets q_prjo: no linear layer .* did you mean 'q_proj'"),
        ("llama", "attn,q_proj", "--lora_targets attn: no linear layer"),
        ("mixtral", "mlp", "--lora_targets mlp: this model has no linear layers there"),
    ],
)
def test_targets_that_match_nothing_are_refused(family: str, targets: str, message: str) -> None:
    lora = dataclasses.replace(LORA, lora_targets=targets)
    with pytest.raises(ConfigError, match=message):
        adapted(family, lora)


def test_budgets_without_decisions_train_adapters_alone(tmp_path: Path) -> None:
    """Static and dense LoRA, to compare with: no layer of --layers runs, or all of them do."""
    for budget, capacity in (("static", 0.0), ("dense", 1.0)):
        config = dataclasses.replace(tiny_config(max_steps=1), adapter=LORA)
        router = dataclasses.replace(config.router, budget=budget)
        with alone() as topology:
            trainer = router_trainer(
                tmp_path / budget, topology, dataclasses.replace(config, router=router)
            )
            assert all(name.startswith("adapter.") for name in trainer.engine.parameters)
            assert trainer.run()["held_out"]["capacity"] == capacity


def exportable(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a base in several shards and routers with an adapter of it."""
    model, routers = adapted()
    base = tiny_model().to(dtype)
    base.save_pretrained(folder / "base", max_shard_size="6KB")
    described = describe_base(base.config, folder / "base")
    save_routers(folder / "routers", routers, base=described)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [((), torch.float32), (("--merge",), torch.bfloat16)],
)
def test_exports_with_an_adapter_are_the_trained_model(
    flags: tuple[str, ...],
    dtype: torch.dtype,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a fresh process (peft loads adapter/ there), and as megaskip loads the folder."""
    exportable(tmp_path, dtype)
    source = ["--routers", str(tmp_path / "routers"), "--base", str(tmp_path / "base")]
    convert([*source, "--output", str(tmp_path / "out"), *flags, "--verify"], "megaskip convert")
    assert "logits differ by at most" in capsys.readouterr().out
    assert (tmp_path / "out/adapter").exists() != bool(flags)
    ids = whole_ids(2, 9)
    trained = load_for_inference(tmp_path / "routers", base=tmp_path / "base", dtype="float32")
    exported = load_for_inference(tmp_path / "out", dtype="float32")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        expected, logits = trained.model(ids).logits, exported.model(ids).logits
    assert torch.allclose(logits, expected, atol=tolerance)
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())
    embedding = index["weight_map"]["model.embed_tokens.weight"]
    # Alone in its shard, which stays shared with the base.
    assert (tmp_path / "out" / embedding).samefile(tmp_path / "base" / embedding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_static_export_has_the_adapter_in_the_weights_that_stay(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    exportable(tmp_path, dtype)
    source = ["--routers", str(tmp_path / "routers"), "--base", str(tmp_path / "base")]
    out = ["--output", str(tmp_path / "out"), "--layers", "3-4"]
    export_static([*source, *out, "--merge"], "megaskip export-static")
    ids = whole_ids(2, 9)
    trained = load_for_inference(tmp_path / "routers", base=tmp_path / "base", dtype="float32")
    exported = load_for_inference(tmp_path / "out", dtype="float32")
    skipped = {layer: float(layer not in (3, 4)) for layer in trained.routers.layers}
    with torch.no_grad():
        with trained.routers.override(skipped):
            expected = trained.model(ids).logits
            with trained.routers.adapters.disabled():
                without = trained.model(ids).logits
        logits = exported.model(ids).logits
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(logits, expected, atol=tolerance)
    assert not torch.allclose(logits, without, atol=5 * tolerance)


def test_exports_that_cannot_have_the_adapter_are_refused(tmp_path: Path) -> None:
    exportable(tmp_path)
    source = ["--routers", str(tmp_path / "routers"), "--base", str(tmp_path / "base")]
    out = ["--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="has a LoRA adapter, .* --merge adds it"):
        export_static([*source, *out, "--layers", "3-4"], "megaskip export-static")
    save_routers(tmp_path / "plain", attach_routers(tiny_model()))
    plain = ["--routers", str(tmp_path / "plain"), "--base", str(tmp_path / "base")]
    with pytest.raises(ConfigError, match="has no adapter; leave it out"):
        convert([*plain, *out, "--merge"], "megaskip convert")
    with pytest.raises(ConfigError, match="has no adapter; leave it out"):
        export_static([*plain, *out, "--layers", "3-4", "--merge"], "megaskip export-static")
    with pytest.raises(ConfigError, match="--mode adapter has none of the base"):
        convert([*source, *out, "--merge", "--mode", "adapter"], "megaskip convert")
