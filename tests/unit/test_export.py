"""An exported folder loads where megaskip is not, and is the trained model."""

import ast
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from routed_models import export, padded_ids
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megaskip import RouterConfig, attach_routers, detach_routers, load_routers, save_routers
from megaskip.checkpoint.base import describe_folder
from megaskip.checkpoint.routers import read_router_config, update_router_config
from megaskip.cli import convert
from megaskip.config.commands.convert import MODES
from megaskip.errors import CheckpointError, ConfigError
from megaskip.export.bundle import bundled_code
from megaskip.export.folder import base_name, export_folder
from megaskip.export.verify import verify_folder
from megaskip.generation.job import load_alone
from megaskip.inference.routed import MegaskipForCausalLM

pytestmark = pytest.mark.usefixtures("warm_python")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "olmoe", "gemma2")
LOADED = {**dict.fromkeys(FAMILIES, "attn_sequence"), "deepseek_v3": "expert_token"}
MAPS = {"mistral": "bias", "qwen2": "low_rank"}
"""Families of LOADED whose skipped sequences get a compensation."""

CHILD = """
import sys
sys.modules["megaskip"] = None  # any import of it fails
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
root = Path(sys.argv[1])
EXPERTS = "deepseek_v3"
inputs = load_file(root / "inputs.safetensors")
ids, mask = inputs["ids"], inputs["mask"]
found = {}
for folder in sorted(root.glob("*/exported")):
    family = folder.parent.name
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(folder.parent / "again")
    again = AutoModelForCausalLM.from_pretrained(folder.parent / "again", trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="bfloat16")
    router, *others = half.skip_routers.parameters()
    assert all(p.dtype == torch.float32 for p in (router, *others))
    assert router.shape == (1 + 3 * (family == EXPERTS), 32)
    assert half.get_input_embeddings().weight.dtype == torch.bfloat16
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "MegaskipConfig" and config.model_type == f"megaskip_{family}"
    with torch.no_grad():
        found[f"{family}.logits"] = model(ids, attention_mask=mask).logits
        found[f"{family}.again"] = again(ids, attention_mask=mask).logits
        hidden = base(ids, attention_mask=mask).last_hidden_state
        found[f"{family}.hidden"] = hidden.contiguous()
        inner = model.get_decoder()(ids, attention_mask=mask).last_hidden_state
        found[f"{family}.inner"] = inner.contiguous()
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    found[f"{family}.tokens"] = model.generate(ids, attention_mask=mask, **options)
    options["cache_implementation"] = "static"
    found[f"{family}.static"] = model.generate(ids, attention_mask=mask, **options)
save_file({k: v.contiguous().clone() for k, v in found.items()}, root / "found.safetensors")
"""


REAL_PYTHON = sys.executable


def in_fresh_process(code: str, *arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache)}
    return subprocess.run(
        [REAL_PYTHON, "-c", code, *arguments],
        env=environment,
        cwd=cache,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a folder of exports, and what a process without megaskip made of them."""
    root = tmp_path_factory.mktemp("exports")
    for family, granularity in LOADED.items():
        export(family, root / family, granularity, compensation=MAPS.get(family, "none"))
    ids, mask = padded_ids()
    save_file({"ids": ids, "mask": mask}, root / "inputs.safetensors")
    cache = tmp_path_factory.mktemp("modules")
    child = in_fresh_process(CHILD, str(root), cache=cache)
    assert child.returncode == 0, child.stderr[-3000:]
    return root, load_file(root / "found.safetensors")


@pytest.mark.parametrize("family", LOADED)
def test_folder_loads_without_megaskip_and_is_the_trained_model(
    family: str, loaded: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    root, found = loaded
    model = from_base(root / family / "base")
    routers = load_routers(model, root / family / "routers")
    ids, mask = padded_ids()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    assert 0 < routers.capacity() < 1
    assert routers.config.compensation == MAPS.get(family, "none")
    real = mask.bool()
    for name in ("logits", "again"):
        logits = found[f"{family}.{name}"]
        torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
    hidden, inner = found[f"{family}.hidden"], found[f"{family}.inner"]
    torch.testing.assert_close(hidden[real], inner[real], rtol=0, atol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(found[f"{family}.tokens"], tokens)
    assert torch.equal(found[f"{family}.static"], tokens)


def from_base(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_load_without_trust_is_refused_never_dense_in_silence(
    loaded: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    code = (
        "import sys, transformers\ntransformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    )
    child = in_fresh_process(code, str(loaded[0] / "llama/exported"), cache=tmp_path)
    assert child.returncode != 0
    assert "trust_remote_code" in child.stderr


@pytest.mark.parametrize("kind", ["routed", "dropped"])
def test_code_imports_torch_and_transformers_only(kind: str) -> None:
    roots = set()
    for node in ast.walk(ast.parse(bundled_code(kind))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}


@pytest.mark.parametrize("kind", ["routed", "dropped"])
def test_code_is_what_the_modules_say_without_their_documentation(kind: str) -> None:
    code = bundled_code(kind)
    modules = re.findall(r"^# -- (megaskip/\S+\.py):", code, re.MULTILINE)
    sources = [(Path(__file__).parents[2] / module).read_text() for module in modules]
    everything, bundled = [t for s in sources for t in statements(s)], statements(code)
    kept = set(bundled)
    assert [text for text in everything if text in kept] == bundled
    names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    for text in set(everything) - kept:
        (left_out,) = ast.parse(text).body
        if "(Protocol)" in text:
            continue  # only annotations name it, which are not looked up
        assert getattr(left_out, "name", text.split(" = ")[0]) not in names


def statements(source: str) -> list[str]:
    """Return what a source runs, statement by statement, without imports and documentation."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and len(node.body) > 1:
            plain = isinstance(node, ast.ClassDef) and "@dataclass" not in ast.unparse(node)
            kept = [c for c in node.body if not is_text(c) and not (plain and is_bare(c))]
            node.body = kept or node.body[:1]
    kept = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    return [ast.unparse(node) for node in kept]


def is_bare(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and node.value is None


def is_text(node: ast.stmt) -> bool:
    value = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def test_code_is_short_and_has_nothing_of_training() -> None:
    code = bundled_code("routed")
    # 1,600 until decode was recorded on static caches: what a step is, and when it cannot be, is
    # 180 lines that an exported folder needs as much as an attached model. Rows that are selected
    # for all layers at once are another 95, and --router_input first (decisions of all layers, read
    # by the host in one copy) 60. Experts that are skipped token by token are 180: where layers
    # have them, what their gate decides, and running what is kept; what vLLM is told that lacks the
    # plugin is 13. Float32 under autocast and casts, samples of packed rows and four refusals: 80.
    assert len(code.splitlines()) < 2225
    assert len(bundled_code("dropped").splitlines()) < 600
    training = "Budget|Counts|Steering|DenseExecutor|straight_through|noise|carried_keep|observe"
    assert not re.findall(training, code)


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize("mode", ["overlay", "copy"])
def test_base_tensors_are_bit_identical_and_base_folder_untouched(
    mode: str, tmp_path: Path
) -> None:
    exported = export("llama", tmp_path, mode=mode)
    before = hashes(tmp_path / "base")
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    again = {}
    for file in sorted(set(index.values())):
        tensors = load_file(exported / file)
        again |= tensors
        original = tmp_path / "base" / file
        if original.exists():
            assert hashes(exported)[file] == before[file]
            assert (original.stat().st_ino == (exported / file).stat().st_ino) == (
                mode == "overlay"
            )
    assert set(index) == set(again)
    base = {}
    for file in (tmp_path / "base").glob("*.safetensors"):
        base |= load_file(file)
    assert set(again) - set(base) == {f"skip_routers.{layer}.attn.weight" for layer in (2, 3, 4)}
    assert all(torch.equal(again[name], base[name]) for name in base)
    (exported / "config.json").write_text("{}")
    (exported / "generation_config.json").write_text("{}")
    assert hashes(tmp_path / "base") == before


@pytest.mark.parametrize("indexed", [False, True], ids=["alone", "with an index"])
def test_a_single_base_file_is_not_taken_for_the_whole_model(indexed: bool, tmp_path: Path) -> None:
    base, routers, exported = tmp_path / "base", tmp_path / "routers", tmp_path / "new"
    export("llama", tmp_path, shard="1GB", mode="adapter")
    single = base / "model.safetensors"
    if indexed:
        weight_map = dict.fromkeys(load_file(single), single.name)
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    export_folder(routers, base, exported)
    assert single.is_file()
    assert not (exported / "model.safetensors").exists()
    assert verify_folder(exported, base, routers).passed


def test_adapter_holds_the_routers_alone(tmp_path: Path) -> None:
    exported = export("llama", tmp_path, mode="adapter")
    names = {file.name for file in exported.iterdir()}
    assert names == {"README.md", "router_config.json", "routers.safetensors"}
    routers = load_routers(tiny_model("llama"), exported)
    assert routers.layers == (2, 3, 4)


def test_verifying_an_adapter_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export("llama", tmp_path / "one")
    source = ["--routers", str(tmp_path / "one/routers"), "--base", str(tmp_path / "one/base")]
    with pytest.raises(ConfigError, match="an adapter is loaded with its base"):
        convert.main([*source, "--output", str(tmp_path / "out"), "--mode", "adapter", "--verify"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("granularity", "mode"),
    [("attn_token", "adapter"), ("attn_sequence", "overlay"), ("mlp_token", "copy")],
)
def test_dropping_keys_and_values_that_an_export_cannot_drop_is_refused(
    granularity: str, mode: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--kv drop"):
        export("llama", tmp_path, granularity, mode=mode, kv="drop")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("granularity", "says"),
    [("attn_sequence", None), ("mlp_token", None), ("block_token", "dropped")],
)
def test_card_tells_of_keys_and_values_where_single_tokens_skip_attention(
    granularity: str, says: str | None, tmp_path: Path
) -> None:
    card = export("llama", tmp_path, granularity, kv="drop" if says else "keep") / "README.md"
    row = f"| keys and values of skipped tokens | {says} |"
    assert ("keys and values of skipped" in card.read_text()) == (says is not None)
    assert (row in card.read_text()) == (says is not None)


def test_card_names_the_kind_of_router(tmp_path: Path) -> None:
    base, routers = tmp_path / "base", tmp_path / "routers"
    model = tiny_model()
    model.save_pretrained(base)
    for kind in ("linear", "affine", "mlp"):
        made = attach_routers(model, RouterConfig(router=kind))
        save_routers(routers, made, base=describe_folder(base))
        detach_routers(model)
        export_folder(routers, base, tmp_path / kind)
        assert f", one {kind} router a layer |" in (tmp_path / kind / "README.md").read_text()


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("adapter", "megaskip.load_routers(model, folder)"),
        ("overlay", "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"),
    ],
)
def test_the_closing_table_says_how_the_folder_is_loaded(
    mode: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export("llama", tmp_path, mode="adapter")
    source = ["--routers", str(tmp_path / "routers"), "--base", str(tmp_path / "base")]
    convert.main([*source, "--output", str(tmp_path / "out"), "--mode", mode])
    loads = [line for line in capsys.readouterr().out.splitlines() if "load" in line]
    assert len(loads) == 1
    assert says in loads[0]


def test_card_names_base_licence_and_what_is_skipped(tmp_path: Path) -> None:
    export("llama", tmp_path / "first")
    base = tmp_path / "first/base"
    (base / "README.md").write_text("---\nlicense: llama3\nlicense_link: LICENSE\n---\n# Base\n")
    facts = {"data": "my.jsonl"}
    export_folder(tmp_path / "first/routers", base, tmp_path / "again", facts=facts)
    card = (tmp_path / "again/README.md").read_text()
    for text in ("license: llama3", "attn_sequence of layers 2-4", "my.jsonl", "base_model: base"):
        assert text in card, text


def test_only_a_name_that_is_no_folder_here_is_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert base_name("acme/tiny", Path("models/snapshots/0123abcd")) == "acme/tiny"
    (tmp_path / "acme/tiny").mkdir(parents=True)
    assert base_name("acme/tiny", Path("acme/tiny")) == "tiny"


def test_wrong_base_and_used_folder_are_refused(tmp_path: Path) -> None:
    exported = export("llama", tmp_path / "one")
    routers = tmp_path / "one/routers"
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_folder(routers, tmp_path / "one/base", exported)
    tiny_model("llama", seed=3).save_pretrained(tmp_path / "other")
    for mode in MODES:
        with pytest.raises(CheckpointError, match="belongs to another base model"):
            export_folder(routers, tmp_path / "other", tmp_path / "new", mode=mode)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="config.json"):
        export_folder(routers, tmp_path / "empty", tmp_path / "new")


def cut_off(file: Path, size: int) -> None:
    with open(file, "r+b") as handle:
        handle.truncate(size if size >= 0 else file.stat().st_size + size)


@pytest.mark.parametrize("size", [-1, 100, 4], ids=["last byte", "header", "first bytes"])
@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("shard", ["60KB", "1GB"])
@pytest.mark.parametrize("mode", ["overlay", "copy"])
def test_a_base_shard_that_is_cut_off_is_refused(
    mode: str, shard: str, described: bool, size: int, tmp_path: Path
) -> None:
    export("llama", tmp_path, shard=shard, mode="adapter")
    if not described:
        config = tmp_path / "routers/router_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model": None}))
    last = sorted((tmp_path / "base").glob("*.safetensors"))[-1]
    cut_off(last, size)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=f"{last.name} is damaged.*download it again"):
        export_folder(tmp_path / "routers", tmp_path / "base", tmp_path / "new", mode=mode)
    with pytest.raises(CheckpointError, match=f"{last.name} is damaged"):
        load_alone(str(tmp_path / "routers"), "auto", str(tmp_path / "base"))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_exported_folder_that_is_cut_off_does_not_load(tmp_path: Path) -> None:
    exported = export("llama", tmp_path, mode="copy")
    cut_off(sorted(exported.glob("model*.safetensors"))[0], -1)
    with pytest.raises(CheckpointError, match="is damaged: it has"):
        load_alone(str(exported), "auto", None)
    with pytest.raises(SafetensorError):
        MegaskipForCausalLM.from_pretrained(exported)


def test_a_router_file_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    export("llama", tmp_path, mode="adapter")
    file = tmp_path / "routers/routers.safetensors"
    tensors = load_file(file)
    del tensors["skip_routers.3.attn.weight"]
    save_file(tensors, file)
    before = sorted(tmp_path.rglob("*"))
    for mode in MODES:
        with pytest.raises(CheckpointError, match=r"missing \['skip_routers.3.attn.weight'\]"):
            export_folder(tmp_path / "routers", tmp_path / "base", tmp_path / "new", mode=mode)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
def test_verification_knows_that_a_folder_drops_keys_and_values(
    granularity: str, tmp_path: Path
) -> None:
    exported = export("llama", tmp_path, granularity, kv="drop")
    base, routers = tmp_path / "base", tmp_path / "routers"
    assert verify_folder(exported, base, routers).passed
    config = json.loads((exported / "config.json").read_text())
    config["routing"]["threshold"] = 0.2
    (exported / "config.json").write_text(json.dumps(config))
    assert not verify_folder(exported, base, routers).passed


def test_verification_notices_a_wrong_folder(tmp_path: Path) -> None:
    exported = export("llama", tmp_path)
    shard = exported / "skip_routers.safetensors"
    save_file({k: -v for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    verified = verify_folder(exported, tmp_path / "base", tmp_path / "routers")
    assert verified.difference > 1e-3
    assert not verified.passed


def test_verification_notices_routers_that_were_not_loaded_where_all_keep(tmp_path: Path) -> None:
    base, routers, exported = tmp_path / "base", tmp_path / "routers", tmp_path / "new"
    export("llama", tmp_path, mode="adapter")
    config, layers, _ = read_router_config(routers)
    update_router_config(routers, dataclasses.replace(config, layers=layers, threshold=1e-12))
    export_folder(routers, base, exported)
    assert verify_folder(exported, base, routers).passed
    shard = exported / "skip_routers.safetensors"
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(shard).items()}
    save_file(zeros, shard, metadata={"format": "pt"})
    verified = verify_folder(exported, base, routers)
    assert verified.difference == 0
    assert not verified.passed
    assert set(verified.wrong_routers) == set(zeros)


PIPELINE = """
import sys
sys.modules["megaskip"] = None
from transformers import pipeline
generate = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
options = dict(max_new_tokens=5, do_sample=False)
question = [{"role": "user", "content": "What is 12 plus 7?"}]
print("answer:", generate(question, **options)[0]["generated_text"][-1]["content"])
print("batch:", len(generate(["King Henry said", "The"], batch_size=2, **options)))
"""


def test_text_generation_pipeline_works_on_an_exported_folder(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "megaskip/demo/backbone"
    routers = attach_routers(from_base(demo), RouterConfig())
    save_routers(tmp_path / "routers", routers, base=describe_folder(demo))
    export_folder(tmp_path / "routers", demo, tmp_path / "exported")
    child = in_fresh_process(PIPELINE, str(tmp_path / "exported"), cache=tmp_path)
    assert child.returncode == 0, child.stderr[-3000:]
    assert "answer:  19" in child.stdout
    assert "batch: 2" in child.stdout


def test_a_base_that_says_use_cache_false_generates(tmp_path: Path) -> None:
    export("llama", tmp_path, mode="adapter")
    for name in ("config.json", "generation_config.json"):
        file = tmp_path / "base" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "use_cache": False}))
    export_folder(tmp_path / "routers", tmp_path / "base", tmp_path / "out")
    model = MegaskipForCausalLM.from_pretrained(tmp_path / "out")
    ids, mask = padded_ids()
    model.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="use_cache=False does not go"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, use_cache=False)


def test_a_folder_that_lost_its_routers_is_refused(tmp_path: Path) -> None:
    folder = export("llama", tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    kept = {k: v for k, v in content["weight_map"].items() if not k.startswith("skip_routers")}
    index.write_text(json.dumps({**content, "weight_map": kept}))
    (folder / "skip_routers.safetensors").unlink()
    with pytest.raises(OSError, match=r"3 routers are missing \(skip_routers\.2\.attn\.weight"):
        MegaskipForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="nothing would be skipped"):
        load_alone(str(folder), "auto", None)
