"""A model without the sublayers that seldom run: the same as the base with those forced off."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from decilm_reference import load_decilm
from families import FAMILIES, tiny_model
from routed_models import padded_ids, randomise, whole_ids
from safetensors import safe_open
from safetensors.torch import save_file

from megaskip import RouterConfig, attach_routers, save_routers
from megaskip.checkpoint.atomic import read_json
from megaskip.cli import export_static as export_static_command
from megaskip.data.collate import collate
from megaskip.data.row import Row
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from megaskip.export.decilm import ffn_mult, intermediate_size_of
from megaskip.export.shards import copy_without, names_of_dropped
from megaskip.export.static import choose_dropped, measure_capacity, sublayers
from megaskip.export.static_folder import (
    StaticExport,
    export_static,
    require_exportable,
    verify_static,
)

DEMO = Path(__file__).parents[2] / "megaskip/demo/backbone"
LAYERS = (1, 3, 4)  # layer 1 is the first of gemma2's that attends to everything
WIDE = {"intermediate_size": 256}  # what DeciLM can say


@pytest.fixture(autouse=True, scope="module")
def _own_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield


def static(
    folder: Path, family: str = "llama", target: str = "attn", form: str = "hf", **options: Any
) -> tuple[Path, Any]:
    """Return (exported folder, its base as a model whose `target` is forced off in LAYERS)."""
    model = tiny_model(family, **options)
    model.save_pretrained(folder / "base", max_shard_size="60KB")
    dropped_from(folder, sublayers(target, LAYERS), form)
    return folder / "out", forced_off(model, target)


def dropped_from(folder: Path, dropped: Any, form: str = "hf", **options: Any) -> StaticExport:
    base = require_exportable(folder / "base", folder / "out", form)
    return export_static(base, folder / "out", dropped, **options)


def forced_off(model: Any, target: str) -> Any:
    config = RouterConfig(granularity=f"{target}_sequence", layers=LAYERS)
    attach_routers(model, config).place([math.inf] * len(LAYERS))
    return model


def load(folder: Path) -> Any:
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names |= set(handle.keys())
    return names


def digest(folder: Path) -> dict[str, str]:
    files = sorted(folder.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# -- the transformers folder


@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_is_the_base_with_the_sublayers_forced_off(
    family: str, target: str, tmp_path: Path
) -> None:
    folder, base = static(tmp_path, family, target)
    small = load(folder)
    ids, mask = padded_ids()
    with torch.no_grad():
        found = small(ids, attention_mask=mask).logits[mask.bool()]
        expected = base(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    names = stored_names(tmp_path / "base") - stored_names(folder)
    assert names == names_of_dropped(stored_names(tmp_path / "base"), sublayers(target, LAYERS))
    assert names
    assert all(f".layers.{n.split('.layers.')[1][0]}." in n for n in names)
    config = read_json(folder / "config.json")
    assert "routing" not in config
    assert config["dropped"] == sublayers(target, LAYERS)
    left = sum(p.numel() for p in small.parameters())
    assert left < sum(p.numel() for n, p in base.named_parameters() if "skip_routers" not in n)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "olmo2"])
def test_batched_generation_equals_one_by_one_and_the_forced_base(
    family: str, tmp_path: Path
) -> None:
    folder, base = static(tmp_path, family, "block")
    small = load(folder)
    ids, mask = padded_ids(rows=4)
    # Further than the window of 16, so that masks of both kinds grow and slide.
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = small.generate(ids, attention_mask=mask, **options)
    assert torch.equal(together, base.generate(ids, attention_mask=mask, **options))
    for row in range(4):
        one = ids[row : row + 1, 2 * row :]
        alone = small.generate(one, attention_mask=torch.ones_like(one), **options)
        assert torch.equal(together[row, 2 * row :], alone[0])
    beams = {**options, "num_beams": 3}
    assert torch.equal(
        small.generate(ids, attention_mask=mask, **beams),
        base.generate(ids, attention_mask=mask, **beams),
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_static_cache_gives_the_same_text(family: str, tmp_path: Path) -> None:
    folder, _ = static(tmp_path, family)
    small = load(folder)
    ids, mask = padded_ids(rows=3)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    dynamic = small.generate(ids, attention_mask=mask, **options)
    fixed = small.generate(ids, attention_mask=mask, cache_implementation="static", **options)
    assert torch.equal(fixed, dynamic)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_dropped_attention_holds_nothing_and_is_as_long_as_the_text(
    family: str, tmp_path: Path
) -> None:
    folder, _ = static(tmp_path, family)
    small = load(folder)
    ids = whole_ids(2, 24)
    whole = small(ids, use_cache=False).logits
    first = small(ids[:, :20])
    cache = first.past_key_values
    rest = small(ids[:, 20:], past_key_values=cache)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole)
    for index, layer in enumerate(cache.layers):
        assert (layer.keys is None) == (index in LAYERS)
        assert (layer.values is None) == (index in LAYERS)
        assert cache.get_seq_length(index) == 24
    if family == "llama":
        cache.crop(-4)
        again = small(ids[:, 20:], past_key_values=cache)
        torch.testing.assert_close(again.logits, rest.logits)


def test_continuous_batching_runs_without_routers(tmp_path: Path) -> None:
    folder, _ = static(tmp_path)
    small = load(folder)
    prompts = [[3, 5, 7, 9], [4, 6], [8, 9, 10, 11, 12, 13]]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    settings = transformers.GenerationConfig(**options, eos_token_id=-1, pad_token_id=0)
    sizes = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    alone = []  # first: transformers 5.5 leaves a model on the attention of continuous batching
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = small.generate(
            ids, attention_mask=torch.ones_like(ids), eos_token_id=-1, **options
        )
        alone.append(tokens[0, len(prompt) :].tolist())
    batched = small.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=sizes, progress_bar=False
    )
    assert [answer.generated_tokens for answer in batched.values()] == alone


def test_model_saves_and_loads_again(tmp_path: Path) -> None:
    folder, _ = static(tmp_path)
    small = load(folder)
    small.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    ids = whole_ids(2, 8)
    with torch.no_grad():
        assert torch.equal(small(ids).logits, again(ids).logits)
    with pytest.raises(RuntimeError, match="no routers"):
        again.capacity()


# -- its files


def test_untouched_shards_are_links_and_the_base_stays_as_it_is(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    before = digest(tmp_path / "base")
    sizes: list[int] = []
    done = dropped_from(tmp_path, sublayers("attn", [3]), progress=sizes.append)
    assert digest(tmp_path / "base") == before
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 2
    linked = [s for s in shards if s.samefile(tmp_path / "out" / s.name)]
    rewritten = [s for s in shards if s not in linked]
    assert linked
    assert rewritten
    assert all(s.stat().st_size > (tmp_path / "out" / s.name).stat().st_size for s in rewritten)
    assert done.linked == sum(s.stat().st_size for s in linked)
    assert sizes == [s.stat().st_size for s in shards]
    attention = model.model.layers[3].self_attn
    assert done.removed == sum(p.nbytes for p in attention.parameters())
    index = read_json(tmp_path / "out/model.safetensors.index.json")
    assert set(index["weight_map"]) == stored_names(tmp_path / "out")
    stays = {id(p): p.nbytes for p in model.parameters()}
    assert index["metadata"]["total_size"] == sum(stays.values()) - done.removed


def test_single_file_is_rewritten(tmp_path: Path) -> None:
    tiny_model(dtype="bfloat16").save_pretrained(tmp_path / "base")
    dropped_from(tmp_path, sublayers("mlp", [2, 5]))
    assert not list((tmp_path / "out").glob("*.index.json"))
    with (
        safe_open(tmp_path / "base/model.safetensors", framework="pt") as base,
        safe_open(tmp_path / "out/model.safetensors", framework="pt") as out,
    ):
        assert out.metadata() == base.metadata()
        assert not any(
            ".2.mlp." in name or ".5.mlp." in name for name in stored_names(tmp_path / "out")
        )
        for name in stored_names(tmp_path / "out"):
            assert torch.equal(out.get_tensor(name), base.get_tensor(name))


def test_copy_keeps_every_type_and_refuses_damaged_files(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.arange(5, dtype=torch.float64),
        "c": torch.ones(7, dtype=torch.bfloat16).to(torch.float8_e4m3fn),
        "d": torch.zeros(0),
    }
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    save_file(tensors, source)
    copy_without(source, target, {"b"})
    with safe_open(target, framework="pt") as handle:
        assert set(handle.keys()) == {"a", "c", "d"}
        for name in ("a", "c", "d"):
            assert handle.get_tensor(name).dtype == tensors[name].dtype
            assert torch.equal(handle.get_tensor(name).float(), tensors[name].float())
    copy_without(source, tmp_path / "nothing", tensors)
    assert not (tmp_path / "nothing").exists()
    source.write_bytes(source.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="damaged: it has"):
        copy_without(source, target, {"b"})
    source.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="damaged"):
        copy_without(source, target, {"b"})


def test_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing, which"):
        dropped_from(tmp_path, sublayers("attn", [3]))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# -- DeciLM


@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_decilm_folder_is_the_forced_base_for_a_server(
    family: str, target: str, tmp_path: Path
) -> None:
    folder, base = static(tmp_path, family, target, form="decilm", **WIDE)
    ids = whole_ids(2, 12)
    with torch.no_grad():
        found, expected = load_decilm(folder)(ids), base(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_decilm_config_says_what_each_layer_has(tmp_path: Path) -> None:
    folder, base = static(tmp_path, "mistral", "attn", form="decilm", **WIDE)
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert config["num_key_value_heads"] == base.config.num_key_value_heads
    assert config["rope_parameters"] == base.config.rope_parameters
    ffn = {"ffn_mult": 12.0, "no_op": False, "replace_with_linear": False}
    for index, block in enumerate(config["block_configs"]):
        no_op = index in LAYERS
        group = None if no_op else 2
        attention = {"n_heads_in_group": group, "no_op": no_op, "replace_with_linear": False}
        assert block == {"attention": attention, "ffn": ffn}
    norms = {f"model.layers.{layer}.input_layernorm.weight" for layer in LAYERS}
    assert not norms & stored_names(folder)
    assert "model.layers.1.post_attention_layernorm.weight" in stored_names(folder)


def test_decilm_ends_with_the_last_layer_that_computes_something(tmp_path: Path) -> None:
    model = tiny_model("llama", **WIDE)
    model.save_pretrained(tmp_path / "base")
    dropped_from(tmp_path, sublayers("block", [4, 5]), "decilm")
    config = read_json(tmp_path / "out/config.json")
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 4
    model.model.layers = model.model.layers[:4]
    ids = whole_ids(2, 12)
    with torch.no_grad():
        found, expected = load_decilm(tmp_path / "out")(ids), model.eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("qwen3", {}, "model_type is qwen3, expected llama or mistral"),
        ("llama", {}, "intermediate_size is 48, and ffn_mult stands for multiples of 256"),
        ("llama", {**WIDE, "attention_bias": True}, r"has biases \(model.layers.0.self_attn"),
        ("llama", {**WIDE, "hidden_act": "gelu"}, "hidden_act is gelu, expected silu"),
        ("mistral", {**WIDE, "sliding_window": 8}, "attention slides"),
    ],
)
def test_decilm_refuses_what_it_cannot_express(
    family: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        static(tmp_path, family, form="decilm", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=["plain", "llama3"],
)
def test_decilm_says_the_rotary_embedding_to_old_readers_and_new(
    scaling: dict[str, Any], tmp_path: Path
) -> None:
    rope = {"rope_theta": 5000.0, **scaling}
    folder, base = static(tmp_path, form="decilm", rope_parameters=rope, **WIDE)
    stored = read_json(folder / "config.json")
    assert stored["rope_theta"] == 5000.0
    assert stored.get("rope_scaling", {"rope_type": "default"})["rope_type"] == rope["rope_type"]
    loaded = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert loaded.rope_parameters == base.config.rope_parameters == rope


def test_multiplier_stands_for_the_sizes_of_published_models() -> None:
    sizes = {(4096, 14336), (4096, 11008), (8192, 28672), (5120, 13824), (2048, 5632), (576, 1536)}
    for hidden, size in sizes:
        mult = ffn_mult(size, hidden)
        assert mult is not None
        assert intermediate_size_of(mult, hidden) == size
    assert ffn_mult(28672, 8192) == 5.25  # as in Llama-3.1-Nemotron-51B
    assert ffn_mult(4864, 896) == 8.142857
    assert ffn_mult(352, 128) is None


# -- which layers

CAPACITY = {2: 0.6, 3: 0.2, 4: 0.4, 5: 0.2}


def test_layers_are_chosen_by_capacity() -> None:
    assert choose_dropped(CAPACITY, below=0.5) == (3, 4, 5)
    assert choose_dropped(CAPACITY, below=0.4) == (3, 5)
    assert choose_dropped(CAPACITY, count=1) == (5,)
    assert choose_dropped(CAPACITY, count=3) == (3, 4, 5)
    assert choose_dropped(CAPACITY, layers=[5, 2, 5]) == (2, 5)
    assert choose_dropped(CAPACITY, layers=list(CAPACITY)) == (2, 3, 4, 5)
    assert choose_dropped({0: 0.0, **CAPACITY}, count=2) == (3, 5)
    assert sublayers("block", (3, 5)) == {"attn": [3, 5], "mlp": [3, 5]}
    assert sublayers("mlp", (3,)) == {"attn": [], "mlp": [3]}


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({}, "exactly one way .* found none"),
        ({"below": 0.5, "count": 2}, "found --below and --count"),
        ({"below": 0.1}, "drops nothing: the lowest capacity is 0.200, of layer 5"),
        ({"below": 0.9}, r"drops every routed layer \(2-5\)"),
        ({"below": 3.0}, r"--below 3 is outside \(0, 1\]"),
        ({"count": 0}, r"--count 0 is outside \[1, 4\]"),
        ({"count": 9}, r"--count 9 is outside \[1, 4\]"),
        ({"count": 4}, "--count 4 drops every routed layer"),
        ({"layers": [0, 3]}, "layer 0 is never dropped"),
        ({"layers": [3, 9]}, "layer 9 has no router; the routed ones are 2-5"),
        ({"layers": []}, "names no layer"),
    ],
)
def test_wrong_choices_say_what_to_change(way: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_dropped(CAPACITY, **way)


@pytest.mark.parametrize(
    ("dropped", "error", "message"),
    [
        ({"attn": [0]}, ConfigError, "expected one of layers 1 to 5"),
        ({"attn": [6]}, ConfigError, "expected one of layers 1 to 5"),
        ({"attn": []}, ConfigError, "nothing to drop"),
        ({"block": [3]}, ConfigError, "nothing to drop"),
    ],
)
def test_folder_refuses_what_cannot_be_dropped(
    dropped: dict[str, list[int]], error: type[Exception], message: str, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.raises(error, match=message):
        dropped_from(tmp_path, dropped)
    with pytest.raises(ConfigError, match="not one of hf, decilm"):
        dropped_from(tmp_path, {"attn": [3]}, "gguf")


def test_tensors_that_are_not_clear_are_refused() -> None:
    text = ["model.layers.3.self_attn.q_proj.weight", "model.norm.weight"]
    assert names_of_dropped(text, {"attn": [3]}) == {text[0]}
    with pytest.raises(UnsupportedModelError, match="2 stacks of layers .*vision.layers"):
        names_of_dropped([*text, "vision.layers.3.self_attn.q_proj.weight"], {"attn": [3]})
    with pytest.raises(UnsupportedModelError, match=r"layer 3 has no .* \(it has self_attn\)"):
        names_of_dropped(text, {"mlp": [3]})
    with pytest.raises(UnsupportedModelError, match="0 stacks"):
        names_of_dropped(["h.3.attn.weight"], {"attn": [3]})


# -- what is measured


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_capacity_is_the_share_of_real_units_over_all_batches(granularity: str) -> None:
    model = tiny_model()
    routers = attach_routers(model, RouterConfig(granularity=granularity, layers=LAYERS))
    randomise(routers)
    lengths = (5, 12, 9, 7, 3)
    rows = [
        Row(
            input_ids=whole_ids(1, n, seed=n)[0].numpy().astype(np.int32),
            supervised=np.zeros(n, dtype=bool),
            prompt_length=0,
            source=0,
        )
        for n in lengths
    ]
    parts = [
        collate(rows[i : i + 2], pad_token_id=0, prompt_tokens=32) for i in range(0, len(rows), 2)
    ]
    found = measure_capacity(model, routers, parts)
    alone: dict[int, list[float]] = {layer: [] for layer in LAYERS}
    for row in rows:
        with torch.no_grad():
            model(torch.from_numpy(row.input_ids[None].astype(np.int64)), use_cache=False)
        for layer, decision in routers.decisions().items():
            alone[layer] += decision.keep.flatten().tolist()
    assert found == pytest.approx({layer: np.mean(kept) for layer, kept in alone.items()})
    assert 0 < sum(found.values()) < len(LAYERS)
    with pytest.raises(DataError, match="no tokens"):
        measure_capacity(model, routers, [])


def test_verify_compares_a_fresh_process_with_the_forced_base(tmp_path: Path) -> None:
    folder, _ = static(tmp_path, "gemma2", "block")
    verified = verify_static(folder, tmp_path / "base", "block", LAYERS)
    assert verified.passed, verified
    assert not verify_static(folder, tmp_path / "base", "block", LAYERS[:1]).passed


# -- the tool


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HOME", str(tmp_path))  # where tokenised data are kept
    return export_static_command.main


def demo_routers(folder: Path) -> list[str]:
    """Save routers of the demo that differ by text; returns the flags that lead to them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO)
    routers = attach_routers(model)
    randomise(routers)
    save_routers(folder / "routers", routers)
    lines = [json.dumps({"text": f"{n} and {n * n} make {n + n * n}. "}) for n in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["--routers", str(folder / "routers"), "--base", str(DEMO)]


def test_tool_measures_drops_and_verifies(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = demo_routers(tmp_path)
    out = tmp_path / "out"
    data = ["--data", str(tmp_path / "text.jsonl"), "--rows", "24"]
    tool([*source, *data, "--count", "2", "--output", str(out), "--verify"])
    said = capsys.readouterr().out
    assert "24 rows of" in said
    assert said.count("(gone)") == 2
    assert "differ by at most" in said
    assert len(read_json(out / "config.json")["dropped"]["attn"]) == 2
    assert "capacity per layer" in (out / "README.md").read_text(encoding="utf-8")
    tool([*source, "--layers", "5", "--output", str(tmp_path / "five")])
    assert read_json(tmp_path / "five/config.json")["dropped"]["attn"] == [5]
    assert "not measured" in capsys.readouterr().out


def test_tool_writes_the_tokenizer_that_is_named_and_nothing_of_the_base_s(
    tool: Any, tmp_path: Path
) -> None:
    source = demo_routers(tmp_path)
    base = tmp_path / "base"
    shutil.copytree(DEMO, base)
    (base / "vocab.json").write_text("{}")
    tokenizer = load_tokenizer(DEMO)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "named")
    named = ["--base", str(base), "--tokenizer", str(tmp_path / "named")]
    tool([*source, *named, "--layers", "5", "--output", str(tmp_path / "out")])
    assert "<new>" in load_tokenizer(tmp_path / "out").get_vocab()
    assert not (tmp_path / "out/vocab.json").exists()
    assert (tmp_path / "out/generation_config.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--count", "1"], "give --data"),
        (["--layers", "1"], "layer 1 has no router"),
        (["--layers", "3-"], "neither a number nor a range"),
        (["--count", "1", "--format", "decilm"], "intermediate_size is 352"),
        (["--count", "1", "--format", "decilm", "--verify"], "has no DeciLM"),
        (["--count", "1", "--rows", "0"], "--rows 0"),
    ],
)
def test_tool_refuses_before_it_loads_anything(
    tool: Any, flags: list[str], message: str, tmp_path: Path
) -> None:
    source = demo_routers(tmp_path)
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        tool([*source, *flags, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
