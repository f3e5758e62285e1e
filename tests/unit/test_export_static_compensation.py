"""A folder with dropped sublayers and their compensations: what was trained, for anyone to load."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dropped_models import decoded_as_on_a_gpu
from families import FAMILIES, tiny_model
from routed_models import padded_ids, randomise, whole_ids
from safetensors.torch import load_file

import megaskip
from megaskip import RouterConfig, attach_routers, save_routers
from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.base import describe_base
from megaskip.checkpoint.routers import read_router_config
from megaskip.cli import export_static as command
from megaskip.config import DataConfig, ModelConfig
from megaskip.errors import CheckpointError, ConfigError
from megaskip.export.static import sublayers
from megaskip.export.static_folder import export_static, require_exportable, verify_static
from megaskip.export.static_maps import StaticMaps, read_static_maps, update_factor
from megaskip.parallel.loading.source import DEMO_FOLDER, resolve_source
from megaskip.runs.source import open_text

KINDS = ("bias", "low_rank")
LAYERS = (1, 3, 4)  # layer 1 is the first of gemma2's that attends to everything
pytestmark = pytest.mark.usefixtures("own_modules_cache", "warm_python")
BEHIND = {"gemma2", "gemma3", "olmo2", "glm4"}
"""Families with norms behind sublayers."""


def trained(
    folder: Path,
    family: str = "llama",
    target: str = "attn",
    kind: str = "low_rank",
    budget: str = "static",
    **options: Any,
) -> Any:
    """Write base and routers of a tiny model to `folder`; return the model with its routers."""
    model = tiny_model(family, **options)
    model.save_pretrained(folder / "base", max_shard_size="60KB")
    config = RouterConfig(
        granularity=f"{target}_sequence",
        layers=LAYERS,
        compensation=kind,
        compensation_rank=4,
        budget=budget,
    )
    routers = attach_routers(model, config)
    randomise(routers)
    with torch.no_grad():  # as large as updates are, not larger
        for name, parameter in routers.named_parameters():
            parameter.mul_(0.3 if "compensation" in name else 1.0)
    base = describe_base(model.config, folder / "base")
    save_routers(folder / "routers", routers, base=base)
    return model


def maps_of(folder: Path, layers: tuple[int, ...] = LAYERS) -> StaticMaps:
    config, routed, base = read_router_config(folder / "routers")
    assert base is not None
    maps = read_static_maps(folder / "routers", config, routed, base.hidden_size, layers)
    assert maps is not None
    return maps


def static(
    folder: Path,
    family: str = "llama",
    target: str = "attn",
    kind: str = "low_rank",
    **options: Any,
) -> tuple[Path, Any]:
    """Return (exported folder, the model whose routers, of a static budget, it is made from)."""
    model = trained(folder, family, target, kind, **options)
    export(folder, target)
    return folder / "out", model


def export(folder: Path, target: str = "attn", *, base: str = "base", form: str = "hf") -> None:
    exportable = require_exportable(folder / base, folder / "out", form)
    dropped = sublayers(target, LAYERS)
    export_static(exportable, folder / "out", dropped, maps=maps_of(folder))


def load(folder: Path, **options: Any) -> Any:
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# -- the folder is the trained model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_is_the_model_that_was_trained(
    family: str, target: str, kind: str, tmp_path: Path
) -> None:
    folder, model = static(tmp_path, family, target, kind)
    small = load(folder)
    ids, mask = padded_ids()
    with torch.no_grad():
        got = small(ids, attention_mask=mask).logits[mask.bool()]
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        with model.skip_routers.disabled():
            dense = model(ids, attention_mask=mask).logits[mask.bool()]
    assert not torch.allclose(expected, dense, atol=1e-2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def compiled_generation() -> dict[str, Any]:
    """Return the options of a generation whose steps are compiled, where those of a plain model
    can be: torch 2.8 does not take a Llama of transformers 5.5 down whole."""
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    options["cache_implementation"] = "static"
    try:
        decoded_as_on_a_gpu(tiny_model("llama"), *padded_ids(rows=3), options)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"the base itself cannot be compiled whole ({str(error).splitlines()[0]})")
    return options


@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
def test_a_decode_step_is_one_graph(
    target: str, compiled_generation: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = static(tmp_path, target=target)
    small, options = load(folder), compiled_generation
    ids, mask = padded_ids(rows=3)
    expected = small.generate(
        ids, attention_mask=mask, **options | {"cache_implementation": "dynamic"}
    )
    tokens, graphs = decoded_as_on_a_gpu(small, ids, mask, options)
    assert graphs == 1
    assert torch.equal(tokens, expected)


def test_a_map_is_an_ordinary_pair_of_linears_where_the_sublayer_was(tmp_path: Path) -> None:
    folder, _ = static(tmp_path)
    tensors, maps = stored(folder), maps_of(tmp_path)
    of_layer = {n: t for n, t in tensors.items() if n.startswith("model.layers.3.self_attn.")}
    assert {
        n.removeprefix("model.layers.3.self_attn."): tuple(t.shape) for n, t in of_layer.items()
    } == {
        "down.weight": (4, 32),
        "up.weight": (32, 4),
        "up.bias": (32,),
    }
    x, own = torch.randn(5, 32), maps.tensors[3]
    by_hand = x @ of_layer["model.layers.3.self_attn.down.weight"].T
    by_hand = by_hand @ of_layer["model.layers.3.self_attn.up.weight"].T
    by_hand += of_layer["model.layers.3.self_attn.up.bias"]
    assert torch.equal(by_hand, x @ own["down"].T @ own["up"].T + own["bias"])
    config = read_json(folder / "config.json")
    assert config["dropped"] == {"attn": [1, 3, 4], "mlp": []}
    assert config["compensation"] == {"kind": "low_rank", "rank": 4, "attn": [1, 3, 4]}
    assert "low_rank of rank 4 in 3 layers: 864 parameters" in (folder / "README.md").read_text()


def test_a_constant_is_one_vector_where_the_sublayer_was(tmp_path: Path) -> None:
    folder, _ = static(tmp_path, "llama", "block", "bias")
    names = {name for name in stored(folder) if ".layers.3." in name}
    assert {n.removeprefix("model.layers.3.") for n in names} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.bias",
    }
    assert read_json(folder / "config.json")["compensation"] == {"kind": "bias", "attn": [1, 3, 4]}


@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "glm4"])
def test_shards_lose_what_was_dropped_and_the_norms_that_maps_are_written_behind(
    family: str, target: str, tmp_path: Path
) -> None:
    folder, model = static(tmp_path, family, target)
    gone = {
        n.split(".layers.")[1] for n in stored(tmp_path / "base").keys() - stored(folder).keys()
    }
    children = {name.split(".", 1)[1].split(".")[0] for name in gone}
    sublayer = {"attn": {"self_attn"}, "mlp": {"mlp"}, "block": {"self_attn", "mlp"}}[target]
    norms = children - sublayer
    assert children >= sublayer
    assert bool(norms) == (family in BEHIND)
    assert {int(name.split(".")[0]) for name in gone} == set(LAYERS)
    index = read_json(folder / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(stored(folder))
    sizes = sum(tensor.nbytes for tensor in stored(folder).values())
    assert index["metadata"]["total_size"] == sizes
    linked = [f for f in (tmp_path / "base").glob("*.safetensors") if f.samefile(folder / f.name)]
    assert linked


def test_a_single_file_gets_an_index_for_the_maps(tmp_path: Path) -> None:
    model = trained(tmp_path)
    tiny_model().save_pretrained(tmp_path / "single")
    export(tmp_path, base="single")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == [
        "base.safetensors",
        "compensation.safetensors",
    ]
    ids = whole_ids(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.allclose(load(tmp_path / "out")(ids).logits, expected, atol=1e-5)


def test_what_a_family_multiplies_updates_with_is_measured(tmp_path: Path) -> None:
    for family, expected in {"granite": 0.5, "llama": 1.0, "gemma2": 1.0, "glm4": 1.0}.items():
        tiny_model(family).save_pretrained(tmp_path / family)
        source = resolve_source(ModelConfig(model=str(tmp_path / family)))
        assert update_factor(source) == pytest.approx(expected, abs=1e-9)


# -- it loads anywhere

PLAIN = """
import sys
sys.modules["megaskip"] = None  # an import of it fails
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
ids = torch.tensor([[5, 7, 11, 13, 17, 19, 23, 29]])
for folder in sorted(Path(sys.argv[1]).glob("*/out")):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(ids).logits
    text = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    torch.save({"logits": logits, "text": text}, folder.parent / "got.pt")
"""
ALONE = {"llama": "attn", "qwen3": "mlp", "gemma2": "block"}


@pytest.fixture(scope="module")
def loaded_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a folder of exports that a process without megaskip has run, and trained models."""
    root = tmp_path_factory.mktemp("exports")
    models = {family: static(root / family, family, target)[1] for family, target in ALONE.items()}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    child = [sys.executable, "-c", PLAIN, str(root)]
    subprocess.run(child, env=environment, cwd=root, check=True, timeout=300)
    return root, models


@pytest.mark.parametrize("family", ALONE)
def test_folder_needs_torch_and_transformers_alone(
    family: str, loaded_alone: tuple[Path, dict[str, Any]]
) -> None:
    root, models = loaded_alone
    got, model = torch.load(root / family / "got.pt"), models[family]
    ids = torch.tensor([[5, 7, 11, 13, 17, 19, 23, 29]])
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(got["logits"], expected, rtol=1e-5, atol=1e-5)
    text = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(got["text"], text)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "olmo2"])
@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
def test_batched_generation_equals_one_by_one(family: str, target: str, tmp_path: Path) -> None:
    folder, _ = static(tmp_path, family, target)
    small = load(folder)
    ids, mask = padded_ids(rows=4)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = small.generate(ids, attention_mask=mask, **options)
    for row in range(4):
        one_row = ids[row : row + 1, 2 * row :]
        alone = small.generate(one_row, attention_mask=torch.ones_like(one_row), **options)
        assert torch.equal(together[row, 2 * row :], alone[0])


@torch.no_grad()
def test_cache_holds_nothing_for_dropped_attentions(tmp_path: Path) -> None:
    folder, _ = static(tmp_path)
    small, ids = load(folder), whole_ids(2, 24)
    whole = small(ids, use_cache=False).logits
    first = small(ids[:, :20])
    rest = small(ids[:, 20:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole)
    for index, layer in enumerate(first.past_key_values.layers):
        assert (layer.keys is None) == (index in LAYERS)


def test_maps_stay_float32_in_a_model_of_16_bit(tmp_path: Path) -> None:
    folder, _ = static(tmp_path, dtype="bfloat16")
    small = load(folder)
    assert small.dtype == torch.bfloat16
    stored = load_file(folder / "compensation.safetensors")
    for dtype in (torch.bfloat16, torch.float16):
        parameters = dict(small.to(dtype).named_parameters())
        assert all(torch.equal(parameters.pop(name), tensor) for name, tensor in stored.items())
        assert {p.dtype for p in parameters.values()} == {dtype}
        with torch.no_grad():
            assert small(whole_ids(2, 8)).logits.dtype == dtype
    substitute = small.get_decoder().layers[LAYERS[0]].self_attn
    read = torch.randn(1, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        update = substitute.update(read)
    assert torch.equal(update, substitute.update(read))


def test_model_saves_and_loads_again(tmp_path: Path) -> None:
    folder, _ = static(tmp_path, "glm4", "mlp")
    small = load(folder)
    small.save_pretrained(tmp_path / "again")
    again, ids = load(tmp_path / "again"), whole_ids(2, 8)
    with torch.no_grad():
        assert torch.equal(small(ids).logits, again(ids).logits)


def test_folder_without_its_maps_is_refused(tmp_path: Path) -> None:
    folder, _ = static(tmp_path)
    (folder / "compensation.safetensors").unlink()
    index = read_json(folder / "model.safetensors.index.json")
    kept = {n: f for n, f in index["weight_map"].items() if f != "compensation.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": kept}))
    with pytest.raises(OSError, match=r"9 tensors of compensations are missing .*download the"):
        load(folder)


def test_configs_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    folder, _ = static(tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    wrong = {"kind": "low_rank", "rank": 4, "attn": [2]}
    with pytest.raises(ValueError, match=r"'attn' of layers \[2\], which config.dropped does not"):
        load(folder, config=type(config).from_dict(config.to_dict() | {"compensation": wrong}))
    for wrong in ({"kind": "full", "attn": [1]}, {"kind": "low_rank", "rank": 0, "attn": [1]}):
        with pytest.raises(ValueError, match="expected bias or low_rank"):
            load(folder, config=type(config).from_dict(config.to_dict() | {"compensation": wrong}))


@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
def test_verify_knows_the_maps(target: str, tmp_path: Path) -> None:
    folder, _ = static(tmp_path, "gemma2", target)
    maps = maps_of(tmp_path)
    verified = verify_static(folder, tmp_path / "base", target, LAYERS, maps)
    assert verified.passed, verified
    assert not verify_static(folder, tmp_path / "base", target, LAYERS).passed


# -- the command


def test_command_needs_no_layers_for_a_static_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path)
    source = ["--routers", str(tmp_path / "routers"), "--base", str(tmp_path / "base")]
    command.main([*source, "--output", str(tmp_path / "out"), "--verify"])
    said = capsys.readouterr().out
    assert "attention of layers 1,3-4" in said
    assert "low_rank of rank 4 in 3 layers: 864 parameters" in said
    assert "differ by at most" in said
    for flags in (["--count", "1"], ["--layers", "3"], ["--below", "0.5"]):
        with pytest.raises(ConfigError, match=f"{flags[0]} chooses among layers .*leave it out"):
            command.main([*source, *flags, "--output", str(tmp_path / "other")])


@pytest.mark.parametrize("without", [False, True])
def test_python_needs_no_layers_for_a_static_budget_and_can_leave_maps_out(
    without: bool, tmp_path: Path
) -> None:
    trained(tmp_path)
    done = megaskip.export_static(
        tmp_path / "routers",
        tmp_path / "out",
        base=tmp_path / "base",
        without_compensation=without,
    )
    assert ("compensation" in read_json(done.folder / "config.json")) != without


def test_command_takes_the_maps_of_routed_layers_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, budget="global")
    source = ["--routers", str(tmp_path / "routers"), "--base", str(tmp_path / "base")]
    command.main([*source, "--layers", "3", "--output", str(tmp_path / "out"), "--verify"])
    config = read_json(tmp_path / "out/config.json")
    assert config["compensation"] == {"kind": "low_rank", "rank": 4, "attn": [3]}
    assert "288 parameters" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="say in exactly one way what to drop"):
        command.main([*source, "--output", str(tmp_path / "other")])


def test_decilm_refuses_compensations(tmp_path: Path) -> None:
    trained(tmp_path, intermediate_size=256)
    with pytest.raises(ConfigError, match="cannot hold compensations: .*--without_compensation"):
        export(tmp_path, form="decilm")
    assert not (tmp_path / "out").exists()


def test_leaving_the_maps_out_for_decilm_is_said_to_be_unmeasured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, intermediate_size=256)
    source = ["--routers", str(tmp_path / "routers"), "--base", str(tmp_path / "base")]
    flags = [*source, "--format", "decilm", "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="cannot hold compensations"):
        command.main(flags)
    command.main([*flags, "--without_compensation"])
    assert "left out; what that costs is not measured (give --data)" in caplog.text
    assert "| compensation | left out; what" in (tmp_path / "out/README.md").read_text()
    assert not {name for name in stored(tmp_path / "out") if ".up." in name}


def test_what_leaving_the_maps_out_costs_is_measured_on_held_out_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where tokenised data are kept
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_FOLDER / "backbone")
    maps = {"compensation": "low_rank", "compensation_rank": 4, "budget": "static"}
    routers = attach_routers(model, RouterConfig(layers=(4, 5), **maps))
    randomise(routers)
    save_routers(tmp_path / "routers", routers)
    lines = [json.dumps({"text": f"{n} and {n * n} make {n + n * n}. "}) for n in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    base, text = DEMO_FOLDER / "backbone", str(tmp_path / "text.jsonl")
    source = ["--routers", str(tmp_path / "routers"), "--base", str(base)]
    flags = [*source, "--data", text, "--dtype", "float32", "--without_compensation"]
    command.main([*flags, "--output", str(tmp_path / "plain")])
    command.main([*source, "--output", str(tmp_path / "compensated")])
    assert "compensation" not in read_json(tmp_path / "plain/config.json")
    settings = ModelConfig(model=str(base), dtype="float32")
    data = DataConfig(data=(text,))
    loader = open_text(data, settings, resolve_source(settings), prompt_tokens=32)
    batches = [batch for batch in loader.held_out() if batch is not None]
    losses = [mean_loss(tmp_path / name, batches) for name in ("plain", "compensated")]
    rows = sum(len(batch.input_ids) for batch in batches)
    cost = f"loss {losses[0]:.4f}, with it {losses[1]:.4f} ({losses[0] - losses[1]:+.4f} nats)"
    assert f"{cost}, {rows} rows of {text}, held out" in caplog.text
    assert cost in (tmp_path / "plain/README.md").read_text(encoding="utf-8")


@torch.no_grad()
def mean_loss(folder: Path, batches: list[Any]) -> float:
    model, total, tokens = load(folder, dtype=torch.float32), 0.0, 0
    for batch in batches:
        inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        logits = model(batch.input_ids, **inputs).logits[:, :-1].flatten(0, 1)
        labels = batch.labels[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        tokens += int((labels >= 0).sum())
    return total / tokens


def test_damaged_router_folders_are_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "routers/routers.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        maps_of(tmp_path)
