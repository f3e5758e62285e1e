"""What SECURITY.md promises: whose code runs, what is read, what pages and templates may."""

import ast
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.dynamic_module_utils
from data_samples import fast_tokenizer, write_lines

from megaskip.checkpoint.run_tokenizer import other_tokenizer
from megaskip.checkpoint.weight_index import INDEX, read_weight_map
from megaskip.config import ModelConfig
from megaskip.config.commands.source import RouterSource, TextSource
from megaskip.data.corpus import parse_rows
from megaskip.data.source import find_source
from megaskip.data.tokenize import SampleTokenizer
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import CheckpointError, ConfigError, DataError
from megaskip.export.folder import own_config, put_rest
from megaskip.export.published import import_published
from megaskip.generation.conversation import prompt_ids
from megaskip.parallel.loading.source import DEMO_FOLDER, resolve_source
from megaskip.reporting.token_map import TokenMap
from megaskip.reporting.token_map_html import page
from megaskip.runs.source import read_as
from megaskip.study.page import page as comparison_page

ROOT = Path(__file__).parents[2]
BASE = DEMO_FOLDER / "backbone"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a model folder whose code leaves a file called "ran" beside it."""
    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder)
    (folder / "own_code.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnTokenizer(LlamaTokenizerFast):\n    pass\n"
    )
    names: dict[str, dict[str, Any]] = {
        "config.json": {"model_type": "own", "auto_map": {"AutoConfig": "own_code.OwnConfig"}},
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own_code.OwnTokenizer"]},
        },
    }
    for name, changes in names.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))
    return folder


def has_run(folder: Path) -> bool:
    return (folder.parent / "ran").exists()


def test_code_of_a_model_runs_with_trust_remote_code_alone(hostile: Path) -> None:
    with pytest.raises(ConfigError, match="config.json"):
        resolve_source(ModelConfig(model=str(hostile)))
    assert not has_run(hostile)
    resolve_source(ModelConfig(model=str(hostile), trust_remote_code=True))
    assert has_run(hostile)


def test_code_of_a_tokenizer_runs_with_trust_remote_code_alone(hostile: Path) -> None:
    shutil.copy(BASE / "config.json", hostile)
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(hostile)
    assert not has_run(hostile)
    load_tokenizer(hostile, trust_remote_code=True)
    assert has_run(hostile)


def test_what_a_run_was_trained_with_lets_no_code_run(hostile: Path, tmp_path: Path) -> None:
    model = {"model": str(hostile), "tokenizer": str(hostile), "trust_remote_code": True}
    config = {"model": model, "data": {"data": ["demo"], "chat_template": None}}
    for name in ("run.json", "report.json"):
        (tmp_path / name).write_text(json.dumps({"config": config}))
    with pytest.raises(ConfigError, match="no tokenizer"):
        other_tokenizer(None, tmp_path, hostile)
    with pytest.raises(ConfigError, match="--trust_remote_code; give it here, too"):
        read_as(RouterSource(run=tmp_path), TextSource(), hostile)
    assert not has_run(hostile)
    allowed = RouterSource(run=tmp_path, trust_remote_code=True)
    assert read_as(allowed, TextSource(), hostile)[1].trust_remote_code


def test_an_export_names_no_code_but_its_own(hostile: Path, tmp_path: Path) -> None:
    content = json.loads((hostile / "config.json").read_text())
    named = own_config(content)["auto_map"].values()
    assert all(name.startswith("modeling_megaskip.") for name in named)
    (tmp_path / "exported").mkdir()
    put_rest(tmp_path / "exported", hostile)
    assert not has_run(hostile)


class Harmful:
    """Leaves a file when it is unpickled by a loader that runs what a pickle says."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_is_refused_and_not_run(is_zip: bool, tmp_path: Path) -> None:
    content = {"model.layers.1.router.weight": Harmful(tmp_path / "ran")}
    file = tmp_path / "pytorch_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        import_published(file, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize(
    "shard", ["../../x.safetensors", "/etc/passwd", "..", "a/../../x", "C:\\x", "..\\x", ""]
)
def test_a_shard_outside_of_its_folder_is_refused(shard: str, tmp_path: Path) -> None:
    index = tmp_path / INDEX
    index.write_text(json.dumps({"weight_map": {"model.layers.1.router.weight": shard}}))
    with pytest.raises(CheckpointError, match="index"):
        read_weight_map(index)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="index"):
        import_published(tmp_path, tmp_path / "out")


SCRIPT = "<script>alert(1)</script>\" onmouseover='x' &amp;"


def test_pages_show_text_as_text() -> None:
    token_map = TokenMap(
        tokens=["a", SCRIPT, "\n<b>"],
        layers=(3,),
        ran=np.ones((1, 3), dtype=bool),
        num_layers=6,
        prompt_tokens=1,
        title=SCRIPT,
        target="attn",
    )
    comparison = comparison_page((), (), [SCRIPT], title=SCRIPT, settings=[(SCRIPT, SCRIPT)])
    for text in (page(token_map), comparison):
        assert "<script" not in text
        assert "onmouseover='" not in text.replace("&#x27;", "")
        assert "<b>" not in text
        assert "&lt;script&gt;" in text


ESCAPES = (
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.listdir('/') }}",
    "{{ ''.__class__.__base__ }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}",
)


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_does_not_leave_the_sandbox(escape: str, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    (tmp_path / "own.jinja").write_text(escape + "{{ messages[0].content }}")
    template = str(tmp_path / "own.jinja")
    samples = SampleTokenizer(fast_tokenizer(), seq_length=32, template_file=template)
    (parsed,) = parse_rows(find_source(rows))
    assert not isinstance(parsed.sample, DataError)
    with pytest.raises(DataError, match="template"):
        samples.tokenise(parsed.sample, source=0)
    with pytest.raises(DataError, match="template"):
        prompt_ids(fast_tokenizer(escape), [{"role": "user", "content": "a"}])


REFUSED_CALLS = {
    **dict.fromkeys(("eval", "exec", "compile", "os.system", "os.popen"), "runs text as code"),
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler"), "runs what is in a file"),
    **dict.fromkeys(("yaml.load", "yaml.full_load", "yaml.unsafe_load"), "use yaml.safe_load"),
    **dict.fromkeys(("jinja2.Environment", "jinja2.Template"), "use transformers' sandbox"),
    **dict.fromkeys(("shutil.unpack_archive", "tarfile.open"), "unpacks files to anywhere"),
}


def test_no_module_does_what_is_not_promised() -> None:
    folders = [ROOT / name for name in ("megaskip", "launch", "tools")]
    problems = []
    for file in sorted(path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                problems += [f"{file}:{node.lineno}: {why}" for why in refusals(node)]
    assert not problems


def refusals(call: ast.Call) -> Iterator[str]:
    """Yield why a call may not stand in the package."""
    name = ast.unparse(call.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in REFUSED_CALLS:
        yield REFUSED_CALLS[name]
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if keywords.get("shell", "False") != "False":
        yield "a command in a shell"


@pytest.mark.parametrize(
    "text", ["eval('1')", "torch.load('x')", "jinja2.Template('')", "run('x', shell=True)"]
)
def test_the_search_for_such_calls_finds_them(text: str) -> None:
    (node,) = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    assert list(refusals(node))
