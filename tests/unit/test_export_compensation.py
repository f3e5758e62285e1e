"""Routed folders with compensations: shipped, said on the card, and compared by --verify."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from routed_models import randomise, whole_ids
from safetensors.torch import load_file, save_file

from megaskip import RouterConfig, attach_routers, load_routers, save_routers
from megaskip.checkpoint.base import describe_base
from megaskip.cli import convert as command
from megaskip.export.verify import verify_folder

pytestmark = pytest.mark.usefixtures("warm_python")


def trained(folder: Path, granularity: str = "attn_sequence", kind: str = "low_rank") -> Any:
    """Write base and routers of a tiny model to `folder`; return the routed model."""
    model = tiny_model()
    model.save_pretrained(folder / "base")
    config = RouterConfig(granularity=granularity, compensation=kind, compensation_rank=4)
    routers = attach_routers(model, config)
    randomise(routers)
    base = describe_base(model.config, folder / "base")
    save_routers(folder / "routers", routers, base=base)
    return model


def convert(folder: Path, *flags: str) -> Path:
    source = ["--routers", str(folder / "routers"), "--base", str(folder / "base")]
    command.main([*source, "--output", str(folder / "out"), *flags])
    return folder / "out"


@pytest.mark.parametrize(
    ("kind", "flags"),
    [("bias", ()), ("low_rank", ("--kv", "drop")), ("low_rank", ("--mode", "copy"))],
)
def test_verify_compares_folders_with_maps(
    kind: str, flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, "attn_token", kind)
    folder = convert(tmp_path, *flags, "--verify")
    assert "logits differ by at most" in capsys.readouterr().out
    shard = folder / "skip_routers.safetensors"
    tensors = load_file(shard)
    changed = "skip_routers.3.attn.compensation.bias"
    tensors[changed] = tensors[changed] + 1
    save_file(tensors, shard, metadata={"format": "pt"})
    verified = verify_folder(folder, tmp_path / "base", tmp_path / "routers")
    assert not verified.passed
    assert verified.wrong_routers == (changed,)


@pytest.mark.parametrize("mode", ["overlay", "adapter"])
def test_card_says_what_skipped_units_get(mode: str, tmp_path: Path) -> None:
    trained(tmp_path)
    text = (convert(tmp_path, "--mode", mode) / "README.md").read_text(encoding="utf-8")
    # 3 layers with two matrices of 4 x 32 and a vector of 32
    said = "low_rank of rank 4 in 3 layers: 864 parameters, 0.00 MiB float32"
    assert f"| compensation of what is skipped | {said} |" in text


def test_card_of_routers_without_compensation_does_not_speak_of_it(tmp_path: Path) -> None:
    trained(tmp_path, kind="none")
    assert "compensation" not in (convert(tmp_path) / "README.md").read_text(encoding="utf-8")


def test_an_adapter_holds_the_maps(tmp_path: Path) -> None:
    model = trained(tmp_path)
    other = tiny_model()
    load_routers(other, convert(tmp_path, "--mode", "adapter"))
    with torch.no_grad():
        assert torch.equal(other(whole_ids(2, 9)).logits, model(whole_ids(2, 9)).logits)
