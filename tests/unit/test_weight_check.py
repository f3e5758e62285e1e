"""The gate for weights: every engine and command says the same of a model folder, in one line."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import broken_models
import pytest
import torch
from broken_models import LOADED, REFUSED, edit_weights, good_folder, write
from families import tiny_model
from safetensors.torch import save_file
from torch import nn

from megaskip.arch import attach_routers
from megaskip.arch.stage import LayerRange, cut
from megaskip.calibration.fit_job import fit
from megaskip.calibration.job import CalibrationJob
from megaskip.calibration.router_fit_job import fit_routers_job
from megaskip.checkpoint import save_routers
from megaskip.checkpoint.stored_weights import read_stored_weights
from megaskip.config import ModelConfig, RouterConfig, RunConfig
from megaskip.config.commands.calibrate import CalibrateOptions
from megaskip.config.commands.compare import CompareOptions
from megaskip.config.commands.fit import DropPlan, FitOptions, TextAndModel
from megaskip.config.commands.fit_routers import FitRoutersOptions
from megaskip.config.commands.source import RouterSource, TextSource
from megaskip.errors import CheckpointError
from megaskip.export.folder import export_folder
from megaskip.export.static_folder import require_exportable
from megaskip.parallel.build import build_engine, build_full_engine
from megaskip.parallel.inference import Placement, load_for_inference
from megaskip.parallel.loading.joined_values import holds_row
from megaskip.parallel.loading.loaded_values import require_loaded
from megaskip.parallel.loading.partitioned import load_partitioned
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.stage_weights import load_stage
from megaskip.parallel.loading.weight_check import check_weights
from megaskip.parallel.loading.whole import load_whole
from megaskip.parallel.topology import read_topology
from megaskip.study.job import compare
from megaskip.training.job import train

CPU = torch.device("cpu")
ALONE = read_topology({})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_folder(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    attached = attach_routers(tiny_model("llama", num_hidden_layers=2), RouterConfig(layers="1-1"))
    return save_routers(tmp_path_factory.mktemp("routers") / "routers", attached)


def source_of(folder: Path) -> ModelSource:
    return resolve_source(ModelConfig(model=str(folder)))


def stage_of(folder: Path, number: int) -> nn.Module:
    layers = LayerRange(first=number, stop=number + 1, depth=2)

    def take_apart(model: nn.Module) -> nn.Module:
        cut(model, layers)
        return model

    return load_stage(source_of(folder), layers, take_apart, CPU)


def engines(folder: Path, routers: Path, output: Path) -> dict[str, Callable[[], Any]]:
    """Return what each engine and command calls before, or in order to, load a model."""
    named = RouterSource(routers=routers, base=str(folder))
    config = RunConfig(model=ModelConfig(model=str(folder)), dry_run=True)
    text = TextAndModel(model=str(folder), data=("no such text",))
    calibrate = CalibrateOptions(
        source=named, capacity=(0.5,), text=TextSource(data=("no such text",))
    )
    return {
        "one process, replicas": lambda: build_engine(config, ALONE, source_of(folder), None),
        "--train full": lambda: build_full_engine(config, ALONE, source_of(folder)),
        "ZeRO-3": lambda: load_partitioned(source_of(folder), {}),
        "stages": lambda: stage_of(folder, 1),
        "plan": lambda: train(config),
        "train": lambda: train(dataclasses.replace(config, dry_run=False)),
        "evaluate": lambda: load_for_inference(str(folder), Placement.on(CPU)),
        "generate": lambda: load_for_inference(str(routers), Placement.on(CPU), base=str(folder)),
        "calibrate": lambda: CalibrationJob(calibrate, ALONE, shows_progress=False),
        "fit, drop": lambda: fit(FitOptions(base=text, plan=DropPlan(drop=1), output=output)),
        "fit-routers": lambda: fit_routers_job(FitRoutersOptions(base=text, output=output)),
        "compare": lambda: compare(
            CompareOptions(model=str(folder), data=("no such text",), output=output)
        ),
        "convert": lambda: export_folder(routers, folder, output),
        "convert --mode copy": lambda: export_folder(routers, folder, output, mode="copy"),
        "export-static": lambda: require_exportable(folder, output, "hf"),
    }


@pytest.mark.parametrize("fault", REFUSED)
def test_every_engine_and_command_refuses_a_broken_folder_in_the_same_words(
    fault: str, good: Path, routers: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    apply, pattern = REFUSED[fault]
    apply(folder)
    said: dict[str, str] = {}
    for engine, load in engines(folder, routers, tmp_path / "output").items():
        with pytest.raises(CheckpointError, match=pattern) as caught:
            load()
        said[engine] = str(caught.value)
    assert len(set(said.values())) == 1, said
    assert "\n" not in said["plan"]


@pytest.mark.parametrize("oddity", LOADED)
def test_an_odd_folder_is_the_same_model_whole_and_in_stages(oddity: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "snapshots" / "model", LOADED[oddity])
    whole: Any = load_whole(source_of(folder), CPU)
    ids = torch.arange(3, 27).reshape(2, 12)
    assert torch.equal(
        load_for_inference(str(folder), Placement.on(CPU)).model(ids).logits, whole(ids).logits
    )
    expected = whole.state_dict()
    seen: set[str] = set()
    for number in range(2):
        for name, tensor in stage_of(folder, number).state_dict().items():
            assert torch.equal(tensor, expected[name]), name
            seen.add(name)
    assert seen == expected.keys()


def test_what_is_not_read_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "model", LOADED["value_head"])
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    with caplog.at_level("INFO", logger="megaskip"):
        load_for_inference(str(folder), Placement.on(CPU))
    ours = [record for record in caplog.records if record.name.startswith("megaskip")]
    said = [r.getMessage() for r in ours if str(folder) in r.getMessage()]
    assert [line.partition(": ")[2] for line in said] == [
        "1 stored tensor(s) are not in the model, such as v_head.weight",
        "1 weight file(s) do not count, such as consolidated.safetensors",
    ]


def test_a_folder_without_weights_can_be_planned_and_no_more(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    (folder / "model.safetensors").unlink()
    router = RouterConfig(layers="1-1")
    config = RunConfig(model=ModelConfig(model=str(folder)), router=router, dry_run=True)
    train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, max_steps=2)))
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_whole(source_of(folder), CPU)


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3", "gpt_oss"])
def test_weights_in_memory_that_are_not_those_of_the_files_are_refused(
    family: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    source = source_of(tmp_path)
    plan, model = check_weights(source), load_whole(source, CPU)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[-1] += 1
    with pytest.raises(CheckpointError, match="model.norm.weight in memory is not model.norm.wei"):
        require_loaded(tmp_path, plan, model)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_experts_in_memory_that_are_not_those_of_the_files_are_refused(
    family: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    source = source_of(tmp_path)
    plan, model = check_weights(source), load_whole(source, CPU)
    assert len(plan.joined) == len(plan.converted) == 12
    name = "model.layers.3.mlp.experts.gate_up_proj"
    with torch.no_grad():
        model.get_parameter(name).neg_()
    with pytest.raises(CheckpointError, match=f"{name} in memory has no row of model.layers.3"):
        require_loaded(tmp_path, plan, model)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_row_is_found_on_the_rank_that_holds_its_beginning(ranks: int, tmp_path: Path) -> None:
    matrix = torch.randn(6, 20)
    save_file({"w": matrix}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = read_stored_weights(tmp_path).tensors["w"]
    weight = torch.stack([torch.randn(6, 20), matrix]).flatten()
    share = -(-len(weight) // ranks)
    slices = [(weight[n * share : (n + 1) * share], n * share) for n in range(ranks)]
    for row in (0, 5):
        held = [holds_row(tmp_path, part, stored, row, first=first) for part, first in slices]
        assert sum(held) == (1 if (120 + row * 20) % share <= share - 16 else 0)
    assert not any(holds_row(tmp_path, -part, stored, 0, first=first) for part, first in slices)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model")

    def spoil(weights: broken_models.Weights) -> None:
        weights["model.layers.0.mlp.up_proj.weight"].fill_(value)

    edit_weights(folder, spoil)
    for load in (lambda: load_whole(source_of(folder), CPU), lambda: stage_of(folder, 0)):
        with pytest.raises(CheckpointError, match="up_proj.weight .*holds numbers that are not f"):
            load()


@pytest.mark.parametrize(
    "family, lost",
    [
        ("mixtral", "layers.4.block_sparse_moe.experts.1.w1."),
        ("olmoe", "layers.4.mlp.experts.1.up_proj."),
        ("deepseek_v3", "layers.4.mlp.experts.3.down_proj."),
    ],
)
def test_an_expert_that_is_missing_is_noticed_from_headers(
    family: str, lost: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    check_weights(source_of(tmp_path))
    edit_weights(tmp_path, lambda w: {name: w[name] for name in w if lost not in name})
    with pytest.raises(CheckpointError, match=r"layers\.4\.mlp\.experts|do not become those of"):
        check_weights(source_of(tmp_path))


def test_the_table_in_the_documents_has_every_folder_and_its_outcome() -> None:
    page = Path(__file__).parents[2] / "docs/model-folders.md"
    rows = [line.strip("|").split(" | ") for line in page.read_text().splitlines()]
    cells = {
        row[1].strip("`"): {cell.strip() for cell in row[2:]} for row in rows if len(row) == 10
    }
    del cells["in short"]
    expected = dict.fromkeys(REFUSED, {"refused"}) | dict.fromkeys(LOADED, {"read"})
    assert cells == expected
