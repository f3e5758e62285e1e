"""The public functions do what their commands do, in one process and without a process group."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from routed_models import randomise
from transformers import AutoModelForCausalLM

import megaskip
from megaskip import RouterConfig
from megaskip.checkpoint.base import describe_folder
from megaskip.checkpoint.routers import read_router_config
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError

DEMO = Path(megaskip.__file__).parent / "demo"
BACKBONE, CHATS = DEMO / "backbone", DEMO / "instruct.jsonl"


@pytest.fixture
def routers(tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32)
    attached = megaskip.attach_routers(model, RouterConfig(capacity=0.5))
    randomise(attached)
    folder = tmp_path / "routers"
    return megaskip.save_routers(folder, attached, base=describe_folder(BACKBONE))


def generated(model: Any) -> list[int]:
    ids = torch.arange(5, 25)[None]
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return list(out[0].tolist())


def test_an_exported_folder_generates_what_its_routers_do(routers: Path, tmp_path: Path) -> None:
    done = megaskip.convert(routers, tmp_path / "exported")
    assert done.linked > done.written
    exported = megaskip.load_for_inference(tmp_path / "exported", dtype="float32")
    trained = megaskip.load_for_inference(routers, dtype="float32", device="cpu")
    assert trained.routers is not None
    assert generated(exported.model) == generated(trained.model)
    dense = megaskip.load_for_inference(BACKBONE, dtype="float32")
    assert dense.routers is None
    with trained.routers.disabled():
        assert generated(trained.model) == generated(dense.model)


def test_calibrate_stores_capacities_that_can_be_chosen(routers: Path, tmp_path: Path) -> None:
    assert not dist.is_initialized()
    result = megaskip.calibrate(
        routers, [0.6, 0.3], data=[CHATS], rows=256, dtype="float32", output=tmp_path / "calibrated"
    )
    assert not dist.is_initialized()
    result.require_all()
    assert [point.capacity for point in result.points] == [0.3, 0.6]
    assert result.points[0].kept == pytest.approx(0.3, abs=0.02)
    assert result.dense_loss > 0
    stored, _, _ = read_router_config(tmp_path / "calibrated")
    assert [capacity for capacity, _ in stored.calibrated] == [0.3, 0.6]
    assert read_router_config(routers)[0].calibrated == ()
    loaded = megaskip.load_for_inference(tmp_path / "calibrated", dtype="float32")
    assert loaded.routers is not None
    loaded.routers.set_capacity(0.3)
    assert loaded.routers.config.capacity == 0.3


def test_export_static_drops_listed_or_measured_layers(routers: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text("{{ messages }}")
    listed = megaskip.export_static(
        routers, tmp_path / "listed", layers=[4, 6], chat_template=tmp_path / "a.jinja"
    )
    assert load_tokenizer(listed.folder).chat_template == "{{ messages }}"
    assert listed.removed > 0
    shorter = megaskip.load_for_inference(tmp_path / "listed", dtype="float32")
    assert shorter.model.config.dropped["attn"] == [4, 6]
    measured = tmp_path / "measured"
    megaskip.export_static(routers, measured, count=1, data=[CHATS], rows=16, dtype="float32")
    dropped = megaskip.load_for_inference(measured, dtype="float32").model.config.dropped
    assert len(dropped["attn"]) == 1


def test_a_folder_without_routers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; give a finished run or a router folder"):
        megaskip.convert(tmp_path / "nothing", tmp_path / "exported")
    with pytest.raises(ConfigError, match="no router_config.json there"):
        megaskip.calibrate(tmp_path, [0.5], data=[CHATS])
    (tmp_path / "run.json").touch()
    unfinished = f"{tmp_path}: a run that has not ended; .* --output_dir {tmp_path} --resume auto"
    with pytest.raises(ConfigError, match=unfinished):
        megaskip.convert(tmp_path, tmp_path / "exported")
    with pytest.raises(ConfigError, match=unfinished):
        megaskip.load_for_inference(tmp_path)
