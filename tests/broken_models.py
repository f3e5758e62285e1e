"""Model folders with one fault each, as downloads, converters and wrappers leave them behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.1.self_attn.q_proj"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
Weights = dict[str, Tensor]
Fault = Callable[[Path], Any]


def good_folder(folder: Path, **overrides: Any) -> Path:
    """Write a model of two layers with one weight file."""
    settings = {"num_hidden_layers": 2, "tie_word_embeddings": False, **overrides}
    tiny_model("llama", **settings).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **entries: Any) -> None:
    """Change entries of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def edit_weights(folder: Path, change: Callable[[Weights], Weights | None]) -> None:
    """Rewrite the weight file as `change` leaves or returns its tensors."""
    weights = load_file(folder / SINGLE)
    changed = change(weights) or weights
    contiguous = {name: tensor.clone().contiguous() for name, tensor in changed.items()}
    save_file(contiguous, folder / SINGLE, metadata={"format": "pt"})


def shard(folder: Path, change_map: Callable[[dict[str, str]], None] = lambda files: None) -> None:
    """Replace the weight file by two shards and an index, whose map is then changed."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    half = len(weights) // 2
    files: dict[str, str] = {}
    for number, names in enumerate((sorted(weights)[:half], sorted(weights)[half:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: weights[n] for n in names}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    change_map(files)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def prefixed(prefix: str) -> Fault:
    """Return the fault of a wrapper's names."""
    return lambda folder: edit_weights(folder, lambda w: {prefix + n: t for n, t in w.items()})


def without(name: str) -> Fault:
    """Return the fault of a tensor that is not there."""
    return lambda folder: edit_weights(folder, lambda w: {n: w[n] for n in w if n != name})


def replaced(name: str, **tensors: Tensor) -> Fault:
    """Return the fault of a tensor that is stored in another form, by what follows its name."""
    others = {f"{name}.{key}": tensor for key, tensor in tensors.items()}

    def apply(folder: Path) -> None:
        edit_weights(
            folder, lambda w: {n: t for n, t in w.items() if n != f"{name}.weight"} | others
        )

    return apply


def quantised(settings: dict[str, Any] | None, **tensors: Tensor) -> Fault:
    """Return the fault of packed numbers, with or without a quantization_config."""

    def apply(folder: Path) -> None:
        if tensors:
            replaced(QUERY, **tensors)(folder)
        if settings is not None:
            edit_config(folder, quantization_config=settings)

    return apply


def _stale_single(folder: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    shard(folder)
    (folder / SINGLE).write_bytes(whole)


def _renamed_weights(name: str) -> Fault:
    return lambda folder: (folder / SINGLE).rename(folder / name)


def _content(content: bytes) -> Fault:
    return lambda folder: (folder / SINGLE).write_bytes(content)


def _cut_off(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])


def _too_long(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes() + b"\0" * 8)


def _without_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _twice(folder: Path) -> None:
    shard(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    weights = load_file(second)
    again = next(iter(load_file(first).items()))
    save_file({**weights, again[0]: again[1]}, second, metadata={"format": "pt"})


def _elsewhere(named: Callable[[Path], str]) -> Fault:
    """Return the fault of an index that leads out of the folder, to a good file."""

    def apply(folder: Path) -> None:
        shutil.copy(folder / SINGLE, folder.parent / f"{folder.name}.safetensors")
        shard(folder, lambda files: files.update({HEAD: named(folder)}))

    return apply


def _link_out(folder: Path) -> None:
    outside = folder.parent / f"{folder.name}.safetensors"
    (folder / SINGLE).rename(outside)
    (folder / SINGLE).symlink_to(outside)


def _linked_folder(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)
    _elsewhere(lambda of: f"more/{of.name}.safetensors")(folder)


INT8 = torch.ones(32, 32, dtype=torch.int8)
FLOAT8 = torch.ones(32, 32).to(torch.float8_e4m3fn)
PACKED = torch.ones(4, 32, dtype=torch.int32)
BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
BNB = {"quant_method": "bitsandbytes", "load_in_8bit": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}

REFUSED: dict[str, tuple[Fault, str]] = {
    "int8": (quantised(BNB, weight=INT8, SCB=torch.ones(32)), "quantised .*bitsandbytes"),
    "int8_no_config": (
        quantised(None, weight=INT8),
        r"quantised \(.*q_proj.weight is stored as I8",
    ),
    "block_fp8": (
        quantised(BLOCK_FP8, weight=FLOAT8, weight_scale_inv=torch.ones(2, 2)),
        "quantised .*fp8",
    ),
    "fp8_scales_no_config": (
        quantised(None, weight=FLOAT8, weight_scale_inv=torch.ones(2, 2)),
        "quantised .*weight_scale_inv",
    ),
    "fp8_alone": (quantised(None, weight=FLOAT8), "quantised .*stored as F8_E4M3"),
    "gptq": (quantised(GPTQ, qweight=PACKED, qzeros=PACKED), "quantised .*gptq"),
    "awq_no_config": (
        quantised(None, qweight=PACKED, qzeros=PACKED, scales=torch.ones(2)),
        "quantised .*(qweight|qzeros|scales)",
    ),
    "nf4_no_config": (
        quantised(None, weight=torch.ones(512, 1, dtype=torch.uint8), absmax=torch.ones(16)),
        "quantised .*absmax",
    ),
    "scales_beside_plain": (
        quantised(None, weight=torch.ones(32, 32), weight_scale=torch.ones(32, 1)),
        "quantised .*weight_scale",
    ),
    "quantised_to_come": (quantised(BNB), "quantised .*bitsandbytes"),
    "compressed": (
        lambda f: edit_config(f, llm_config={"compression_config": {"quant_method": "x"}}),
        "quantised .*compression_config",
    ),
    "float8_asked": (
        lambda f: edit_config(f, dtype="float8_e4m3fn"),
        "their type is float8_e4m3fn",
    ),
    "prefix_module": (prefixed("module."), r"begin with 'module\.', which a wrapper"),
    "prefix_orig_mod": (prefixed("_orig_mod."), r"begin with '_orig_mod\.', which a wrapper"),
    "prefix_peft": (prefixed("base_model.model."), r"begin with 'base_model\.model\.'"),
    "missing_weight": (without(f"{QUERY}.weight"), rf"is {QUERY}.weight \(1 of \d+ weights"),
    "missing_head": (without(HEAD), "tie_word_embeddings to true"),
    "missing_embedding": (without(EMBEDDING), f"no stored tensor is {EMBEDDING}"),
    "tied_flag_real_head": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        "tie_word_embeddings, but lm_head.weight is stored with other values",
    ),
    "stale_single": (_stale_single, "holds both model.safetensors and"),
    "vocab_mismatch": (lambda f: edit_config(f, vocab_size=161), "vocab_size is 161"),
    "wrong_shape": (replaced(QUERY, weight=torch.ones(16, 32)), r"\(16, 32\), config.json asks"),
    "too_few_layers": (lambda f: edit_config(f, num_hidden_layers=1), "says 1 layers"),
    "too_many_layers": (lambda f: edit_config(f, num_hidden_layers=3), r"layers\.2\."),
    "other_family": (
        replaced(QUERY, weight=torch.ones(32, 32), bias=torch.ones(32)),
        "q_proj.bias, for which LlamaForCausalLM has no place",
    ),
    "both_names": (
        lambda f: edit_weights(f, lambda w: w | {"embed_tokens.weight": w[EMBEDDING]}),
        "are both the model's model.embed_tokens.weight",
    ),
    "lfs_pointer": (_content(LFS), "is a Git LFS pointer"),
    "lfs_tokenizer": (lambda f: (f / "tokenizer.json").write_bytes(LFS), "is a Git LFS pointer"),
    "empty": (_content(b""), "is empty"),
    "web_page": (_content(b"<!DOCTYPE html><html>Login</html>"), "is a web page"),
    "zeros": (_content(b"\0" * 4096), "is damaged"),
    "garbage": (_content(bytes(range(256)) * 16), "is no safetensors file"),
    "cut_off": (_cut_off, "is damaged"),
    "too_long": (_too_long, "is damaged"),
    "unfinished": (
        lambda f: (f / f"{SINGLE}.aria2").write_bytes(b"x"),
        "a download that did not finish",
    ),
    "partial_only": (_renamed_weights(f"{SINGLE}.part"), r"model.safetensors.part is there"),
    "torch_only": (_renamed_weights("pytorch_model.bin"), "holds no safetensors, only pytorch_mo"),
    "gguf_only": (_renamed_weights("model.gguf"), "holds model.gguf, but neither"),
    "shard_no_index": (
        _renamed_weights("model-00001-of-00001.safetensors"),
        "no model.safetensors.index.json",
    ),
    "missing_shard": (_without_a_shard, "00002.safetensors is missing"),
    "twice": (_twice, "is in model-00001-of-00002.safetensors and in"),
    "wrong_shard": (
        lambda f: shard(f, lambda m: m.update({HEAD: "model-00002-of-00002.safetensors"})),
        "does not hold lm_head.weight",
    ),
    "no_metadata": (
        lambda f: (shard(f), (f / INDEX).write_text((f / INDEX).read_text().replace("meta", "m"))),
        "has no metadata",
    ),
    "index_escapes": (_elsewhere(lambda f: f"../{f.name}.safetensors"), "not a file inside"),
    "index_absolute": (_elsewhere(lambda f: f"{f.parent}/{f.name}.safetensors"), "not a file ins"),
    "index_by_link": (_linked_folder, "is a link to"),
    "link_escapes": (_link_out, "is a link to"),
    "adapter_beside": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "an adapter such as LoRA's",
    ),
    "other_file_named": (
        lambda f: edit_config(f, transformers_weights="x"),
        "transformers_weights",
    ),
}
"""Faults that end every engine and command with one sentence, and a pattern of that sentence."""


def _equal_head(folder: Path) -> None:
    edit_weights(folder, lambda w: w | {HEAD: w[EMBEDDING]})
    edit_config(folder, tie_word_embeddings=True)


def _tied_under(*, stored: str) -> Fault:
    """Return what is a tied model of which one name is stored."""

    def apply(folder: Path) -> None:
        edit_weights(
            folder,
            lambda w: (
                {n: t for n, t in w.items() if n not in (EMBEDDING, HEAD)} | {stored: w[EMBEDDING]}
            ),
        )
        edit_config(folder, tie_word_embeddings=True)

    return apply


def _bare_names(folder: Path) -> None:
    _tied_under(stored=EMBEDDING)(folder)
    edit_weights(folder, lambda w: {n.removeprefix("model."): t for n, t in w.items()})


def _hub_cache(folder: Path) -> None:
    """Make the weight file a link to a blob, as in the hub's cache; the folder is a snapshot."""
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir(exist_ok=True)
    (folder / SINGLE).rename(blobs / folder.name)
    (folder / SINGLE).symlink_to(Path("../../blobs") / folder.name)


def _shards_below(folder: Path) -> None:
    (folder / "parts").mkdir()
    (folder / SINGLE).rename(folder / "parts/a.safetensors")
    names = load_file(folder / "parts/a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "parts/a.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))


def _unlisted(folder: Path) -> None:
    shard(folder, lambda files: files.pop(HEAD) and None)


LOADED: dict[str, Fault] = {
    "plain": lambda f: None,
    "sharded": shard,
    "unlisted": _unlisted,
    "equal_head": _equal_head,
    "tied": _tied_under(stored=EMBEDDING),
    "tied_by_head": _tied_under(stored=HEAD),
    "bare_names": _bare_names,
    "half": lambda f: edit_weights(f, lambda w: {n: t.half() for n, t in w.items()}),
    "double": lambda f: edit_weights(f, lambda w: {n: t.double() for n, t in w.items()}),
    "stray_shard": lambda f: shutil.copy(f / SINGLE, f / "model-00009-of-00009.safetensors"),
    "torch_beside": lambda f: (f / "pytorch_model.bin").write_bytes(b"old"),
    "value_head": lambda f: edit_weights(f, lambda w: w | {"v_head.weight": torch.ones(1, 32)}),
    "old_rope": lambda f: edit_weights(
        f, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    ),
    "hub_cache": _hub_cache,
    "shards_below": _shards_below,
}
"""Folders that look odd and are read alike by every engine."""


def with_pictures(folder: Path) -> Path:
    """Write a model that is a decoder inside of one for pictures and text."""
    config = Gemma3Config(
        text_config=tiny_config("gemma3", num_hidden_layers=2).to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write(folder: Path, fault: Fault) -> Path:
    """Write a good model with a fault."""
    good_folder(folder)
    fault(folder)
    return folder
