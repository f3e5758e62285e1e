"""A model without the sublayers that seldom run: the same as the base with those forced off."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from dropped_models import LAYERS, dropped_from, static, stored_names
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
from megaskip.export.shards import copy_without, names_of_dropped
from megaskip.export.static import sublayers
from megaskip.export.static_folder import verify_static
from megaskip.export.static_measure import measure_capacity

DEMO = Path(__file__).parents[2] / "megaskip/demo/backbone"
pytestmark = pytest.mark.usefixtures("own_modules_cache", "warm_python")


def load(folder: Path) -> Any:
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


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
