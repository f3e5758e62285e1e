"""Router folders: whole or absent, for the right base model, readable by other tools."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megaskip import RouterConfig, attach_routers, load_routers, save_routers
from megaskip.checkpoint import describe_base
from megaskip.checkpoint.atomic import new_folder
from megaskip.checkpoint.resume import COMPLETE, checkpoints, prune, require_same_routers
from megaskip.checkpoint.stored_weights import read_stored_weights
from megaskip.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("warm_python")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_model()
    routers = attach_routers(model, RouterConfig(granularity="mlp_token", layers="1-2,4"))
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.normal_()
    return save_routers(tmp_path / "routers", routers, base=describe_base(model.config))


def ids() -> torch.Tensor:
    return torch.randint(3, 97, (3, 10), generator=torch.Generator().manual_seed(0))


def test_saved_routers_load_and_decide_alike(saved: Path) -> None:
    models = [tiny_model(), tiny_model()]
    logits = []
    for model in models:
        routers = load_routers(model, saved)
        assert routers.layers == (1, 2, 4)
        with torch.no_grad():
            logits.append(model(ids()).logits)
    assert 0 < routers.capacity() < 1
    assert torch.equal(*logits)


def test_keys_are_absolute_layer_and_target(saved: Path) -> None:
    tensors = load_file(saved / "routers.safetensors")
    assert set(tensors) == {f"skip_routers.{i}.mlp.weight" for i in (1, 2, 4)}
    assert all(t.shape == (1, 32) and t.dtype == torch.float32 for t in tensors.values())


def test_routers_of_another_base_are_refused_with_both_sides(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="num_layers is 6 there .* and 8"):
        load_routers(tiny_model(num_hidden_layers=8), saved)
    with pytest.raises(CheckpointError, match="model_type is llama there .* and qwen2"):
        load_routers(tiny_model("qwen2"), saved)


@pytest.mark.parametrize("damage", ["missing", "truncated", "shape", "config", "extra"])
def test_damaged_folders_are_named(saved: Path, damage: str) -> None:
    weights, config = saved / "routers.safetensors", saved / "router_config.json"
    tensors = load_file(weights)
    if damage == "missing":
        tensors.pop("skip_routers.2.mlp.weight")
        save_file(tensors, weights)
        message = r"missing \['skip_routers.2.mlp.weight'\]"
    elif damage == "extra":
        save_file({**tensors, "other": torch.zeros(1)}, weights)
        message = r"unexpected \['other'\]"
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        message = "is damaged"
    elif damage == "shape":
        save_file({k: torch.zeros(1, 7) for k in tensors}, weights)
        message = r"has shape \(1, 7\), expected \(1, 32\)"
    else:
        content = json.loads(config.read_text())
        del content["capacity"]
        config.write_text(json.dumps(content))
        message = "lacks capacity"
    model = tiny_model()
    with pytest.raises(CheckpointError, match=message):
        load_routers(model, saved)
    assert not hasattr(model, "skip_routers")


def test_a_folder_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routers = attach_routers(tiny_model())

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megaskip.checkpoint.routers.write_json", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_routers(tmp_path / "r", routers)
    assert list(tmp_path.iterdir()) == []


def test_files_beside_the_routers_stay(saved: Path) -> None:
    (saved / "notes.md").write_text("mine")
    routers = load_routers(tiny_model(), saved)
    save_routers(saved, routers)
    assert (saved / "notes.md").read_text() == "mine"
    assert load_routers(tiny_model(), saved).layers == routers.layers


def test_a_link_to_a_folder_stays_one(saved: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(saved)
    save_routers(link, load_routers(tiny_model(), saved))
    assert link.is_symlink()
    assert not list(tmp_path.glob(".*"))


def test_a_copy_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    for name in ("step_000009", "step_000010", "step_000010.bak", "step_best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / COMPLETE).touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000009", "step_000010"]
    prune(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_000010",
        "step_000010.bak",
        "step_best",
    ]


def test_a_full_disk_is_one_message_whoever_notices_it(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "kept").touch()
    says = pytest.raises(CheckpointError, match="cannot write .*No space left")
    with says, new_folder(tmp_path / "r"):
        raise SafetensorError("No space left on device (os error 28)")
    assert [path.name for path in tmp_path.rglob("*")] == ["r", "kept"]
    with new_folder(tmp_path / "r"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["r"]


def test_what_cannot_be_replaced_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "kept").touch()
    replace, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("megaskip.checkpoint.atomic.os.replace", second_fails)
    with pytest.raises(CheckpointError, match="Input/output error"), new_folder(tmp_path / "r"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["r", "kept"]


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"granularity": "attn_token"}, "--granularity"),
        ({"router": "affine"}, "--router"),
        ({"capacity_low": 0.25}, "--capacity_low"),
        ({"layers": "2-4"}, "--layers"),
        ({"capacity": 0.7}, "--capacity"),
    ],
)
def test_a_run_does_not_continue_with_other_routers(
    change: dict[str, Any], flag: str, tmp_path: Path
) -> None:
    config = RouterConfig(layers="1-4", capacity=0.5)
    routers = attach_routers(tiny_model(), config)
    routers.place([0.3, 0.1, 0.2, 0.0])
    save_routers(tmp_path / "routers", routers)
    require_same_routers(tmp_path / "routers", attach_routers(tiny_model(), config))
    other = attach_routers(tiny_model(), dataclasses.replace(config, **change))
    with pytest.raises(CheckpointError, match=f"{flag} differs from the run that wrote it"):
        require_same_routers(tmp_path / "routers", other)


@pytest.mark.parametrize("missing", [False, True])
def test_a_shard_that_is_cut_off_or_missing_is_named(missing: bool, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    read_stored_weights(tmp_path)
    if missing:
        shards[1].unlink()
    else:
        shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is "):
        read_stored_weights(tmp_path)


def test_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1, 0):
        folder = tmp_path / f"{len(found)}"
        model = tiny_model(seed=seed)
        model.save_pretrained(folder)
        found.append(describe_base(model.config, folder).weights)
    assert found[0] == found[2] != found[1]


def test_a_hub_base_is_known_by_its_id_and_commit_a_local_one_by_its_folder(tmp_path: Path) -> None:
    model = tiny_model()
    snapshot = tmp_path / "models--acme--tiny/snapshots/0123abcd"
    for folder in (snapshot, tmp_path / "acme/tiny"):
        model.save_pretrained(folder)
    config = type(model.config).from_pretrained(snapshot)
    hub = describe_base(config, snapshot, name="acme/tiny")
    assert (hub.name, hub.revision) == ("acme/tiny", "0123abcd")
    assert describe_base(config, snapshot, "v2", name="acme/tiny").revision == "v2"
    local = tmp_path / "acme/tiny"
    config = type(model.config).from_pretrained(local)
    for name in (str(local), "demo", None):
        found = describe_base(config, local, name=name)
        assert (found.name, found.revision) == (str(local), None)


TRAIN = ("--max_steps", "1", "--max_samples", "12", "--seq_length", "16", "--micro_batch_size", "1")


def test_a_run_on_a_hub_model_and_its_card_name_the_hub_id(tmp_path: Path) -> None:
    cache, commit = tmp_path / "home/hub/models--acme--tiny", "a" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    shutil.copytree(ROOT / "megaskip/demo/backbone", cache / "snapshots" / commit)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for script, *flags in (
        ("launch/train.py", "--model", "acme/tiny", "--output_dir", "run", *TRAIN),
        ("tools/convert_to_hf.py", "--routers", "run/routers", "--output", "exported"),
    ):
        command = [sys.executable, str(ROOT / script), *flags]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-2000:]
    base = json.loads((tmp_path / "run/routers/router_config.json").read_text())["base_model"]
    assert (base["name"], base["revision"]) == ("acme/tiny", commit)
    assert "base_model: acme/tiny\n" in (tmp_path / "exported/README.md").read_text()
