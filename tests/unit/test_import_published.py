"""Published routers are imported as they are, or refused with what does not fit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaskip import load_routers
from megaskip.checkpoint import read_router_config
from megaskip.cli import import_routers
from megaskip.config import SUBLAYER_GRANULARITIES
from megaskip.errors import CheckpointError, ConfigError
from megaskip.export.published import ImportReport, import_published

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/llama"
LAYERS = (2, 3, 4)
FLAGS = [layer in LAYERS for layer in range(6)]
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "is_mod": FLAGS,
    "granularity": "attn_sequence",
    "threshold": 0.5,
    "mod_capacity": 0.25,
    "gradient_scale": 0.01,
}


def routers_as(name: str = "model.layers.{}.router.weight") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name.format(layer): torch.randn(1, 32, generator=generator) for layer in LAYERS}


def source_of(
    folder: Path, tensors: dict[str, Tensor], *, without: str = "", **changes: Any
) -> Path:
    """Write a published folder with CONFIG, `changes` made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    write_config(folder, without=without, **changes)
    return folder


def write_config(folder: Path, *, without: str = "", **changes: Any) -> None:
    content = {name: value for name, value in {**CONFIG, **changes}.items() if name != without}
    (folder / "config.json").write_text(json.dumps(content))


def imported(report: ImportReport) -> dict[str, Tensor]:
    return load_file(report.folder / "routers.safetensors")


def refused(source: Path, message: str, **options: Any) -> None:
    """Check that `source` is refused with `message`, and that nothing is written."""
    output = source.parent / "refused"
    with pytest.raises((CheckpointError, ConfigError), match=message):
        import_published(source, output, **options)
    assert not output.exists()


# -- what is read


def test_folder_becomes_a_router_folder_with_published_semantics(tmp_path: Path) -> None:
    tensors = routers_as()
    report = import_published(source_of(tmp_path / "source", tensors), tmp_path / "out")
    config, layers, base = read_router_config(tmp_path / "out")
    assert (layers, config.granularity, config.pool, config.budget) == (
        LAYERS,
        "attn_sequence",
        "all",
        "layer",
    )
    assert (config.capacity, config.threshold, config.penalty_weight) == (0.25, 0.5, 0.01)
    assert base is not None
    assert (base.model_type, base.num_layers, base.hidden_size) == ("llama", 6, 32)
    stored = imported(report)
    assert set(stored) == {f"skip_routers.{layer}.attn.weight" for layer in LAYERS}
    for layer in LAYERS:
        expected = tensors[f"model.layers.{layer}.router.weight"]
        assert torch.equal(stored[f"skip_routers.{layer}.attn.weight"], expected)
    assert (report.layers, report.ignored, report.assumptions) == (LAYERS, 0, ())


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_one_file_is_read_with_the_config_beside_it_or_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "conf").mkdir()
    write_config(tmp_path / "conf")
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(routers_as(), file)
    else:
        torch.save(routers_as(), file)
    refused(file, "config.json does not exist; say where config.json is with --config")
    named = import_published(file, tmp_path / "a", config=tmp_path / "conf" / "config.json")
    write_config(tmp_path)
    beside = import_published(file, tmp_path / "b")
    assert torch.equal(*(imported(r)["skip_routers.3.attn.weight"] for r in (named, beside)))


def test_only_shards_with_routers_are_opened_and_base_weights_are_counted(tmp_path: Path) -> None:
    folder = source_of(tmp_path / "source", {})
    (folder / "model.safetensors").unlink()
    names = list(routers_as())
    shards = {names[0]: "b.safetensors", names[1]: "c.safetensors", names[2]: "c.safetensors"}
    for shard in ("b.safetensors", "c.safetensors"):
        held = {name: tensor for name, tensor in routers_as().items() if shards[name] == shard}
        save_file(held, folder / shard)
    absent = {f"model.layers.{i}.mlp.up_proj.weight": "absent.safetensors" for i in range(6)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**shards, **absent}}))
    report = import_published(folder, tmp_path / "out")
    assert (report.layers, report.ignored) == (LAYERS, 6)
    (folder / "c.safetensors").unlink()
    refused(folder, "c.safetensors does not exist, but model.safetensors.index.json names it")


def test_trainer_state_beside_torch_weights_is_not_read(tmp_path: Path) -> None:
    torch.save(routers_as(), tmp_path / "routers.bin")
    (tmp_path / "training_args.bin").write_bytes(b"not tensors")
    write_config(tmp_path)
    assert import_published(tmp_path, tmp_path.parent / "out").layers == LAYERS


@pytest.mark.parametrize(
    "name",
    [
        "module.model.layers.{}.router.weight",
        "base_model.model.model.layers.{}.router.weight",
        "layers.{}.router.weight",
        "model.layers.{}.self_attn.router.weight",
    ],
)
def test_prefixes_and_places_of_routers_are_tolerated(tmp_path: Path, name: str) -> None:
    report = import_published(source_of(tmp_path / "source", routers_as(name)), tmp_path / "out")
    assert (report.layers, report.example) == (LAYERS, name.format(2))


def test_routers_of_experts_are_base_weights(tmp_path: Path) -> None:
    tensors = routers_as()
    for layer in range(6):
        tensors[f"model.layers.{layer}.mlp.router.weight"] = torch.randn(4, 32)
        tensors[f"model.layers.{layer}.mlp.router.bias"] = torch.randn(4)
    report = import_published(source_of(tmp_path / "source", tensors), tmp_path / "out")
    assert (report.layers, report.ignored) == (LAYERS, 12)


def test_bfloat16_becomes_float32_and_is_reported(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in routers_as().items()}
    report = import_published(source_of(tmp_path / "source", tensors), tmp_path / "out")
    stored = imported(report)["skip_routers.2.attn.weight"]
    assert stored.dtype == torch.float32
    assert torch.equal(stored, tensors["model.layers.2.router.weight"].float())
    assert report.dtypes == ("bfloat16",)
    assert "decisions are taken in float32" in report.assumptions[0]


@pytest.mark.parametrize("recorded", ["llama_mindskip", "llama_mod"])
def test_custom_model_types_are_reduced_to_their_base(tmp_path: Path, recorded: str) -> None:
    source = source_of(tmp_path / "source", routers_as(), model_type=recorded)
    report = import_published(source, tmp_path / "out")
    assert report.base is not None
    assert report.base.model_type == "llama"
    assert report.assumptions == (f"base model llama, recorded as {recorded}",)
    load_routers(tiny_model(), tmp_path / "out")


def test_other_model_types_stay_as_recorded(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", routers_as(), model_type="modernbert-decoder")
    base = import_published(source, tmp_path / "out").base
    assert base is not None
    assert base.model_type == "modernbert-decoder"


def test_what_is_not_recorded_is_assumed_and_reported(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    save_file(routers_as(), tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text("{}")
    report = import_published(tmp_path / "source", tmp_path / "out", granularity="block_token")
    assert (report.config.capacity, report.config.threshold, report.base) == (0.5, 0.5, None)
    text = "\n".join(report.assumptions)
    for part in (
        "neither is_mindskip nor is_mod is recorded",
        "granularity block_token is from --granularity",
        "target capacity not recorded; wrote 0.5",
        "threshold not recorded; took the published 0.5",
        "gradient_scale not recorded; wrote penalty weight 0.1",
        "base model not recorded",
    ):
        assert part in text
    rows = "\n".join(value for _, value in report.rows())
    assert text in rows


@pytest.mark.parametrize("flags", [{"is_mod": True}, {"is_mindskip": FLAGS, "is_mod": None}])
def test_flags_are_one_for_all_or_a_list(tmp_path: Path, flags: dict[str, Any]) -> None:
    source = source_of(tmp_path / "source", routers_as(), **flags)
    assert import_published(source, tmp_path / "out").layers == LAYERS


def test_capacities_by_layer_are_averaged_over_the_routed_ones(tmp_path: Path) -> None:
    capacities = [1.0, 1.0, 0.5, 0.25, 0.75, 1.0]
    source = source_of(tmp_path / "source", routers_as(), mod_capacity=capacities)
    report = import_published(source, tmp_path / "out")
    assert report.config.capacity == 0.5
    assert report.assumptions == ("capacity is the mean of mod_capacity over the routed layers",)


# -- what is refused


def test_missing_and_unexpected_layers_are_named(tmp_path: Path) -> None:
    tensors = routers_as()
    tensors["model.layers.1.router.weight"] = tensors.pop("model.layers.3.router.weight")
    source = source_of(tmp_path / "source", tensors)
    refused(source, r"routers for layers 1-2,4, but .* flags 2-4: missing 3, unexpected 1;")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_mod": False}, "flags none: missing none, unexpected 2-4"),
        ({"is_mod": [True] * 5}, "is_mod has 5 flags, expected one for each of 6 layers"),
        ({"is_mod": [2, 3, 4]}, r"is_mod is \[2, 3, 4\], expected true, or a list"),
        ({"is_mindskip": True}, "expected what is_mindskip says, True"),
        ({"num_hidden_layers": 4}, r"a router for layer 4, but .* has layers 0 to 3"),
        ({"num_hidden_layers": "6"}, "num_hidden_layers is '6', expected a positive integer"),
        ({"hidden_size": 64}, r"layers.2.router.weight has shape \(1, 32\), expected \(1, 64\)"),
        ({"threshold": "half"}, "threshold is 'half', expected a number"),
        ({"threshold": 1.0}, r"--threshold 1 must lie inside \(0, 1\)"),
        ({"mod_capacity": [0.5]}, r"mod_capacity is \[0.5\], expected a number, or one for each"),
        ({"mod_capacity": 2}, r"--capacity 2 is outside \[0, 1\]"),
        ({"granularity": "sequence"}, "granularity is 'sequence', expected one of attn_sequence"),
        ({"without": "granularity"}, "records no granularity; say what .* with --granularity"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    refused(source_of(tmp_path / "source", routers_as(), **changes), message)


def test_granularity_flag_is_checked_against_the_config(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", routers_as())
    refused(source, "--granularity mlp_token, but .* records attn_seq", granularity="mlp_token")
    refused(source, "did you mean 'attn_sequence'", granularity="attn_sequences")
    source = source_of(source, routers_as("model.layers.{}.mlp.router.weight"))
    refused(source, "layers.2.mlp.router lies in mlp, but the granularity is attn_sequence")


def test_bias_is_dropped_when_zero_and_refused_otherwise(tmp_path: Path) -> None:
    biases = {f"model.layers.{layer}.router.bias": torch.zeros(1) for layer in LAYERS}
    source = source_of(tmp_path / "source", {**routers_as(), **biases})
    report = import_published(source, tmp_path / "out")
    assert report.assumptions == ("biases of layers 2-4 are zero and were dropped",)
    assert report.ignored == 0
    biases["model.layers.3.router.bias"] += 0.125
    source = source_of(source, {**routers_as(), **biases})
    refused(source, r"layers.3.router.bias is not zero \(0.125\): published routers have no bias")
    refused(source_of(source, biases), "router.bias has no model.layers.2.router.weight beside it")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, 32), r"has shape \(2, 32\), expected \(1, 32\)"),
        (torch.zeros(32), r"has shape \(32,\), expected \(1, 32\)"),
        (torch.tensor(0.0), r"has shape \(\), expected \(1, 32\)"),
        (torch.zeros(1, 32, dtype=torch.int8), "is torch.int8, expected floating point"),
        (torch.full((1, 32), torch.nan), "values that are not finite"),
    ],
)
def test_weights_that_are_no_routers_are_refused(
    tmp_path: Path, weight: Tensor, message: str
) -> None:
    tensors = {**routers_as(), "model.layers.3.router.weight": weight}
    refused(source_of(tmp_path / "source", tensors), f"model.layers.3.router.weight .*{message}")


def test_two_routers_in_a_layer_are_refused(tmp_path: Path) -> None:
    tensors = {**routers_as(), **routers_as("model.layers.{}.self_attn.router.weight")}
    message = "layer 2 has two routers, model.layers.2.router and model.layers.2.self_attn.router"
    refused(source_of(tmp_path / "source", tensors), message)


def test_a_source_without_routers_says_what_its_keys_look_like(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(1) for i in range(6)}
    tensors["skip_routers.2.attn.weight"] = torch.zeros(1, 32)
    source = source_of(tmp_path / "source", tensors)
    expected = r"expected names such as model.layers.16.router.weight of shape \[1, hidden\]; "
    found = "found such as skip_routers.2.attn.weight, model.layers.0.mlp.up_proj.weight, "
    refused(source, rf"no published routers among its 7 tensors, {expected}{found}")
    refused(source_of(source, {}), "among its 0 tensors, .* found none")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", routers_as())
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    refused(source, "model.safetensors is damaged")
    file.unlink()
    refused(source, r"no weights in this folder, expected \*.safetensors or \*.bin")
    refused(source / "config.json", r"config.json: expected a file \*.safetensors or \*.bin")
    refused(tmp_path / "absent", "--source .*absent: no such file or folder")
    for name in ("a.safetensors", "b.safetensors"):
        save_file(routers_as(), source / name)
    refused(source, "layers.2.router.weight is in a.safetensors and in b.safetensors")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off", "code", "list"])
def test_torch_files_that_are_not_plain_tensors_are_refused(
    tmp_path: Path, content: bytes | str
) -> None:
    file = tmp_path / "routers.bin"
    write_config(tmp_path)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(Path("x") if content == "code" else [torch.zeros(1)], file)
    reason = "found list" if content == "list" else "cannot be read as plain tensors"
    refused(file, f"routers.bin.*{reason}")


def test_an_output_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", routers_as())
    with pytest.raises(CheckpointError, match="exists and is not empty; name a new folder"):
        import_published(source, source)
    assert (source / "model.safetensors").is_file()


# -- what they decide


@pytest.mark.parametrize("threshold", [0.5, 0.55])
def test_imported_routers_decide_as_computed_by_hand(tmp_path: Path, threshold: float) -> None:
    model, tensors = tiny_model(), routers_as()
    source = source_of(tmp_path / "source", tensors, threshold=threshold)
    import_published(source, tmp_path / "out")
    routers = load_routers(model, tmp_path / "out")
    normalised: dict[int, Tensor] = {}
    for layer in LAYERS:
        norm = model.model.layers[layer].input_layernorm
        norm.register_forward_hook(
            lambda module, args, output, layer=layer: normalised.update({layer: output})
        )
    ids = torch.randint(3, 97, (12, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids)
    assert 0 < routers.capacity() < 1
    for layer in LAYERS:
        weight = tensors[f"model.layers.{layer}.router.weight"]
        score = torch.sigmoid(normalised[layer].mean(1) @ weight.T)
        assert torch.equal(routers.keep()[layer].bool(), score >= threshold)


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
def test_imported_routers_keep_what_the_published_code_kept(
    tmp_path: Path, granularity: str
) -> None:
    report = import_published(
        GOLDEN / "routers.safetensors", tmp_path / "out", granularity=granularity
    )
    cases = load_file(GOLDEN / "cases.safetensors")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN, attn_implementation="eager").eval()
    routers = load_routers(model, tmp_path / "out")
    with torch.no_grad():
        model(cases["input_ids"])
    for layer in report.layers:
        mask = cases[f"{granularity}.mask.{layer}"]
        assert torch.equal(routers.keep()[layer].reshape(mask.shape), mask)


# -- the tool


def test_tool_prints_what_matched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_of(tmp_path / "source", routers_as(), model_type="llama_mindskip")
    import_routers.main(["--source", str(source), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    for part in ("3, in layers 2-4", "attn_sequence", "float32; written", "recorded as llama_mind"):
        assert part in printed


def test_tool_ends_with_one_message_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "tools/import_routers.py", "--source", str(tmp_path / "absent")]
    ended = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: --source")
    assert "Traceback" not in ended.stderr
