"""Folders that bitsandbytes packed in 4 bit: read as they are, checked before they are loaded, and
exported with routers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_models import edit_config, edit_weights, without
from families import tiny_model
from packaging.version import Version
from test_weight_check import engines
from tiny_run import alone, rows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from megaskip.arch import attach_routers
from megaskip.arch.adapters import add_adapters
from megaskip.arch.stage import DecoderStage, layer_ranges
from megaskip.arch.task_loss import TaskLoss
from megaskip.checkpoint import save_routers
from megaskip.checkpoint.routers import load_routers
from megaskip.config import AdapterConfig, ModelConfig, RouterConfig, RunConfig, parse_run_config
from megaskip.data import collate
from megaskip.errors import CheckpointError, ConfigError, UnsupportedModelError
from megaskip.export.folder import export_folder
from megaskip.export.static_folder import export_static, require_exportable
from megaskip.parallel.build import build_engine
from megaskip.parallel.estimate import estimate
from megaskip.parallel.inference import Placement, load_for_inference
from megaskip.parallel.loading.partitioned import load_partitioned
from megaskip.parallel.loading.quantised import is_quantised
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.stage_weights import load_stage
from megaskip.parallel.loading.weight_check import check_weights
from megaskip.parallel.loading.whole import load_whole
from megaskip.parallel.measure import bytes_by_kind
from megaskip.training.job import train

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the [4bit] extra is not installed")
CPU = torch.device("cpu")
IDS = torch.arange(3, 35)[None]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
NF4 = {"bnb_4bit_quant_type": "nf4"}
NESTED_FP4 = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}
QUERY = "model.layers.1.self_attn.q_proj.weight"
STATE = f"{QUERY}.quant_state.bitsandbytes__nf4"


def pack(base: Path, folder: Path, shard: str = "1GB", **settings: Any) -> Path:
    """Write the model of `base` as bitsandbytes packs it."""
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model in 16 bit whose rows are whole blocks of 64."""
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama", num_hidden_layers=3, **SIZES).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(base, tmp_path_factory.mktemp("packed") / "model", **NF4)


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """Return a packed folder that a test may break."""
    return Path(shutil.copytree(packed, tmp_path / "model"))


def source_of(folder: Path, **settings: Any) -> ModelSource:
    return resolve_source(ModelConfig(model=str(folder), **settings))


def loaded(folder: Path, **options: Any) -> Any:
    """Return what transformers loads, with the arithmetic that we have."""
    return exact(AutoModelForCausalLM.from_pretrained(folder, **options))


def exact(model: Any) -> Any:
    """Return a model without the passes in bfloat16 that bitsandbytes has for some CPUs."""
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    return model.eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {**NESTED_FP4, "llm_int8_skip_modules": ["lm_head", "down_proj"]}),
        ("mixtral", NF4),
    ],
)
def test_a_packed_folder_is_what_transformers_loads_whole_and_in_stages(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """What belongs to a weight lies in several files; the experts of a mixture stay plain."""
    if settings["bnb_4bit_quant_type"] == "fp4" and Version(bitsandbytes.__version__) < Version(
        "0.47"
    ):
        settings = {**settings, "bnb_4bit_quant_type": "nf4"}  # before, fp4 is for GPUs only
    tiny_model(family, num_hidden_layers=3, **SIZES).save_pretrained(tmp_path)
    folder = pack(tmp_path, tmp_path / "packed", shard="20KB", **settings)
    assert len(list(folder.glob("*.safetensors"))) > 3
    source = source_of(folder)
    model: Any = load_whole(source, CPU).eval()
    query = model.model.layers[1].self_attn.q_proj.weight
    assert is_quantised(query) and query.compress_statistics is (family == "llama")
    assert torch.equal(logits_of(model), logits_of(loaded(folder)))
    whole, positions = TaskLoss(model, chunk_tokens=64), torch.arange(IDS.shape[1])[None]
    hidden = IDS
    with torch.no_grad():
        for layers in layer_ranges((2,), 3):
            stage = load_stage(
                source, layers, lambda m, own=layers: DecoderStage(m, own, chunk_tokens=64), CPU
            )
            hidden = stage(hidden, None, positions)
        assert torch.equal(hidden, whole.hidden_states(IDS, None, positions))


def test_routers_learn_what_they_learn_on_the_model_that_is_packed_as_it_is_read(
    base: Path, packed: Path
) -> None:
    batch = collate(rows(4), pad_token_id=0, prompt_tokens=32)
    seen = []
    for flags in (["--model", str(base), "--base_dtype", "nf4"], ["--model", str(packed)]):
        config = parse_run_config([*flags, "--layers", "1-2", "--capacity", "0.3"])
        with alone() as topology:
            engine = build_engine(config, topology, resolve_source(config.model), None)
            engine.evaluate([batch, None], routed=False)
            loss = engine.train_step([batch], 1e-2).loss_task
            kept = {k: d.keep.detach().clone() for k, d in engine.routers.decisions().items()}
            gradients = {n: p.grad.clone() for n, p in engine.parameters.items()}
            seen.append((loss, kept, gradients))
            measured = bytes_by_kind(engine)["backbone"]
    (loss, kept, gradients), (other_loss, other_kept, other_gradients) = seen
    assert loss == other_loss and kept.keys() == other_kept.keys()
    assert all(torch.equal(kept[key], other_kept[key]) for key in kept)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())
    planned = estimate(config, resolve_source(config.model), world_size=1, ds_content=None)
    assert planned.weights == pytest.approx(measured, rel=0.01)


# -- folders with a fault


def _state(**entries: Any) -> Callable[[Path], None]:
    """Return the fault of a weight that describes itself otherwise."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(weights[STATE].tolist())) | entries
        weights[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return lambda folder: edit_weights(folder, change)


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda w: w | {name: change(w[name])})


def _settings(**entries: Any) -> Callable[[Path], None]:
    """Return the fault of another quantization_config."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit_config(folder, quantization_config=config["quantization_config"] | entries)

    return apply


def _without_state(folder: Path) -> None:
    edit_weights(folder, lambda w: {n: t for n, t in w.items() if "quant_state" not in n})


def _nested_lost(folder: Path) -> None:
    _state(nested_blocksize=256, nested_dtype="float32", nested_offset=0.1)(folder)
    _tensor(f"{QUERY}.absmax", lambda t: t.to(torch.uint8))(folder)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "packed_missing": (without(QUERY), rf"no stored tensor is {QUERY} \(1 of"),
    "scales_missing": (without(f"{QUERY}.absmax"), rf"is {QUERY}.absmax, without which"),
    "levels_missing": (without(f"{QUERY}.quant_map"), r"q_proj.weight.quant_map, without which"),
    "state_missing": (_without_state, r"quant_state.bitsandbytes__nf4, without which"),
    "nested_missing": (_nested_lost, r"q_proj.weight.nested_absmax, without which"),
    "packed_cut": (_tensor(QUERY, lambda t: t[:-1]), r"\(2047, 1\), expected U8 of \(2048, 1\)"),
    "scales_cut": (
        _tensor(f"{QUERY}.absmax", lambda t: t[:-1]),
        r"F32 of shape \(63,\), expected F32 of \(64,\)",
    ),
    "state_cut": (_tensor(STATE, lambda t: t[:-9]), "is no description of a packed weight"),
    "state_no_object": (
        _tensor(STATE, lambda t: torch.tensor([49], dtype=torch.uint8)),
        "is no description of a packed weight",
    ),
    "state_deep": (
        _tensor(STATE, lambda t: torch.full((4000,), 91, dtype=torch.uint8)),
        "is no description of a packed weight",
    ),
    "state_more": (_state(nested_offset=1.0), "says nested_offset, expected blocksize, dtype"),
    "offset_missing": (
        _state(nested_blocksize=256, nested_dtype="float32"),
        "does not say nested_offset",
    ),
    "float_blocks": (_state(blocksize=64.0), "says blocksize 64.0, expected 32 or 64"),
    "other_shape": (_state(shape=[64, 32]), r"says shape \[64, 32\], expected \[64, 64\]"),
    "odd_blocks": (_state(blocksize=48), "says blocksize 48, expected 32 or 64"),
    "ragged": (_state(blocksize=128), "64 numbers, which are no whole blocks of 128"),
    "plain_beside": (
        lambda f: edit_weights(f, lambda w: w | {QUERY: torch.ones(64, 64)}),
        "is stored as F32, and config.json says that it is in 4 bit",
    ),
    "packed_and_kept": (
        _settings(llm_int8_skip_modules=["lm_head", "q_proj"]),
        r"q_proj.weight is packed in 4 bit, and config.json does not say so",
    ),
    "packed_head": (_settings(llm_int8_skip_modules=[]), "has lm_head.weight in 4 bit"),
    "other_type": (_settings(bnb_4bit_quant_type="fp4"), "bitsandbytes__fp4, without which"),
    "other_storage": (
        _settings(bnb_4bit_quant_storage="bfloat16"),
        "quantised .*nf4 in bfloat16, where nf4 or fp4 in uint8 is read",
    ),
    "odd_names": (
        _settings(llm_int8_skip_modules=["lm_head", "("]),
        "quantised .*llm_int8_skip_modules .*which are no names of modules",
    ),
    "eight_bit": (
        _settings(load_in_4bit=False, load_in_8bit=True),
        r"quantised \(.*bitsandbytes in 8 bit\).*the 16-bit model \(with --base_dtype nf4",
    ),
    "settings_lost": (
        lambda f: edit_config(f, quantization_config=None),
        r"quantised \(the files hold .*16-bit model",
    ),
}
"""Faults of packed folders alone; what any folder can have, broken_models.REFUSED has."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_packed_folder_is_refused_before_anything_is_loaded(
    fault: str, copy: Path
) -> None:
    apply, pattern = FAULTS[fault]
    apply(copy)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        check_weights(source_of(copy))
    assert "\n" not in str(caught.value)


def test_every_engine_and_command_refuses_a_broken_packed_folder(
    copy: Path, tmp_path: Path
) -> None:
    apply, pattern = FAULTS["scales_cut"]
    apply(copy)
    fresh = attach_routers(tiny_model("llama", num_hidden_layers=3, **SIZES), verify=False)
    routers = save_routers(tmp_path / "routers", fresh)
    for load in engines(copy, routers, tmp_path / "output").values():
        with pytest.raises(CheckpointError, match=pattern):
            load()


def test_the_page_on_folders_has_every_fault() -> None:
    page = (Path(__file__).parents[2] / "docs/model-folders.md").read_text()
    assert [name for name in FAULTS if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{QUERY}.absmax", lambda t: t.fill_(float("nan")), "scales of .* are not finite"),
        (f"{QUERY}.quant_map", lambda t: t.flip(0), "restores other numbers from .*q_proj.weight"),
    ],
)
def test_numbers_that_are_not_restored_as_stored_are_refused(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, copy: Path
) -> None:
    _tensor(name, change)(copy)
    with pytest.raises(CheckpointError, match=message):
        load_whole(source_of(copy), CPU)


# -- what it does not go with


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ds_config", "ds_configs/zero3.json"], "does not go with ZeRO-3"),
        (["--train", "full"], "is for a frozen base"),
        (["--base_dtype", "nf4"], "is in 4 bit already .* leave it out"),
    ],
)
def test_what_a_packed_base_does_not_do_is_refused(
    flags: list[str], message: str, packed: Path
) -> None:
    for more in ([], ["--dry_run"]):
        with pytest.raises(ConfigError, match=message) as caught:
            train(parse_run_config(["--model", str(packed), *flags, *more]))
        assert "\n" not in str(caught.value)


def test_evaluating_under_zero3_is_refused(packed: Path) -> None:
    with pytest.raises(ConfigError, match="does not go with ZeRO-3"):
        load_partitioned(source_of(packed), {})


# -- exports


def test_routers_on_a_packed_base_are_exported_with_it(packed: Path, tmp_path: Path) -> None:
    """Its shards are linked as they are; transformers and bitsandbytes load the folder."""
    never = RouterConfig(layers="1-1", threshold=0.6)  # a fresh router's score is 0.5
    fresh = attach_routers(tiny_model("llama", num_hidden_layers=3, **SIZES), never, verify=False)
    trained = save_routers(tmp_path / "routers", fresh)
    theirs = loaded(packed)
    load_routers(theirs, trained)
    expected = logits_of(theirs)
    assert export_folder(trained, packed, tmp_path / "exported").linked > 0
    plain = loaded(tmp_path / "exported", trust_remote_code=True)
    assert torch.equal(logits_of(plain), expected)
    ours = load_for_inference(str(tmp_path / "exported"), Placement.on(CPU))
    assert ours.routers is not None and torch.equal(logits_of(exact(ours.model)), expected)
    static = tmp_path / "static"
    assert export_static(require_exportable(packed, static, "hf"), static, {"attn": [1]}).removed
    dropped = load_for_inference(str(static), Placement.on(CPU)).model
    assert torch.equal(logits_of(exact(dropped)), expected)


def test_an_adapter_on_a_packed_base_is_exported_beside_it(packed: Path, tmp_path: Path) -> None:
    """peft puts it on the 4-bit layers that transformers loads; it cannot be merged into them."""
    peft = pytest.importorskip("peft")
    trained = loaded(packed)
    routers = attach_routers(trained, RouterConfig(layers="1-1"), register=False, verify=False)
    add_adapters(trained, routers, trained, RunConfig(adapter=AdapterConfig(lora_rank=2)))
    without = logits_of(trained)
    with torch.no_grad():
        for tensor in routers.adapters.tensors().values():
            tensor.add_(0.05)
    expected = logits_of(trained)
    assert not torch.allclose(expected, without, atol=1e-3)
    folder = save_routers(tmp_path / "routers", routers)
    exported = tmp_path / "exported"
    export_folder(folder, packed, exported)
    plain = peft.PeftModel.from_pretrained(
        loaded(exported, trust_remote_code=True), exported / "adapter"
    )
    torch.testing.assert_close(logits_of(plain), expected)
    ours = load_for_inference(str(exported), Placement.on(CPU)).model
    assert torch.equal(logits_of(exact(ours)), expected)
    with pytest.raises(UnsupportedModelError, match="packed in 4 bit, so --merge cannot"):
        export_folder(folder, packed, tmp_path / "merged", merge=True)
