"""A reader who types what the documents say gets what they say: every command runs at a small size,
every Python block runs, links and paths lead somewhere, flags and names exist."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documents
import pytest
import torch
import yaml
from commands import SIZES, TIMEOUT, Workspace, run, sized, start_ranks
from documents import DOCUMENTS, ROOT, Block, Command
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaskip import __version__
from megaskip.cli.compare import parse as parse_compare
from megaskip.cli.main import COMMANDS

pytestmark = pytest.mark.usefixtures("warm_python")

DEMO = ROOT / "megaskip/demo"
BACKBONE = DEMO / "backbone"
OF_OTHER_PROGRAMS = {
    "--check": "ruff",
    "--hostfile": "deepspeed",
    "--hypothesis-profile": "pytest",
    "--enable-lora": "vLLM",
    "--enforce-eager": "vLLM",
    "--master_port": "torchrun",
    "--max-model-len": "vLLM",
    "--model_args": "lm-eval",
    "--moments": "tests/faults",
    "--nodes": "sbatch",
    "--nproc_per_node": "torchrun",
    "--outfile": "llama.cpp",
    "--outtype": "llama.cpp",
    "--only": "tests/faults",
    "--port": "vLLM",
    "--standalone": "torchrun",
    "--trust-remote-code": "vLLM",
    "--help": "all of them",
    "--no-flag": "a word for all flags that switch something off",
}
"""Flags in the documents that are not ours."""
PATHS = re.compile(r"(?:megaskip|tests|launch|tools|docs|ds_configs)/[\w./-]*|[A-Z]+\.md")


def all_commands() -> list[Command]:
    """Return the commands of all documents, each once."""
    typed = [command for document in DOCUMENTS for command in documents.commands(document)]
    return list({(c.words, c.environment, c.is_typed): c for c in typed}.values())


def python_blocks() -> list[Block]:
    return [block for document in DOCUMENTS for block in documents.blocks(document, "python")]


# -- commands


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Return a clone in which the tutorial was typed: one tiny training serves all commands, and
    all processes of pytest."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / "clone.lock"):
        made = Workspace(folder=shared / "clone", files=files_in(shared / "clone"))
        if not made.done.exists():
            shutil.rmtree(made.folder, ignore_errors=True)
            make_clone(made)
            type_the_tutorial(made)
            made.done.mkdir()
    return made


def files_in(folder: Path) -> dict[str, str]:
    """Return what stands for a reader's files in the workspace."""
    names = {"data": "my_data.jsonl", "held_out": "held.jsonl", "prompts": "prompts.txt"}
    names |= {"blimp": "blimp", "published": "published"}
    return {name: str(folder / file) for name, file in names.items()} | {"demo": str(BACKBONE)}


def make_clone(workspace: Workspace) -> None:
    """Write what a reader has before the first command."""
    folder, files = workspace.folder, {k: Path(v) for k, v in workspace.files.items()}
    folder.mkdir()
    for name in ("launch", "tools", "ds_configs", "megaskip"):
        (folder / name).symlink_to(ROOT / name)
    rows = (DEMO / "instruct.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    files["data"].write_text("".join(rows[:96]), encoding="utf-8")
    files["held_out"].write_text("".join(rows[96:128]), encoding="utf-8")
    files["prompts"].write_text("What is the plural of box?\n", encoding="utf-8")
    files["blimp"].mkdir()
    pair = {"sentence_good": "The cat sleeps.", "sentence_bad": "The cat sleep."}
    (files["blimp"] / "agreement.jsonl").write_text(4 * (json.dumps(pair) + "\n"))
    published_routers(files["published"])


def published_routers(folder: Path) -> None:
    """Write routers as the published code saves them."""
    folder.mkdir()
    name = "model.layers.{}.router.weight"
    save_file({name.format(n): torch.ones(1, 32) for n in (2, 3)}, folder / "model.safetensors")
    config: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 32}
    config |= {"is_mod": [n in (2, 3) for n in range(6)], "granularity": "attn_sequence"}
    (folder / "config.json").write_text(json.dumps(config | {"threshold": 0.5}))


def type_the_tutorial(workspace: Workspace) -> None:
    """Train, calibrate and export, as docs/getting-started.md does."""
    folder = workspace.folder
    steps = {
        "train": ["--capacity_low", "0.4", "--lr", "1e-2", "--output_dir", "runs/first"],
        "convert": ["--run", "runs/first", "--output", "exported"],
    }
    for name, flags in steps.items():
        flags = [*flags, *sized(name, workspace)]
        start_ranks(name, flags, 1, workspace, folder / "logs" / name)
    shutil.copytree(folder / "runs/first", folder / "runs/any")
    flags = ["--run", "runs/any", "--capacity", "0.8,0.6,0.4", *sized("calibrate", workspace)]
    start_ranks("calibrate", flags, 1, workspace, folder / "logs/calibrate")
    shutil.copytree(folder / "runs/any/routers", folder / "my_routers")
    flags = ["--budget", "static", "--layers", "4,6", "--compensation", "low_rank"]
    flags += ["--compensation_rank", "4", "--fit_rows", "8", *sized("train", workspace)]
    flags += ["--output_dir", "runs/static"]
    start_ranks("train", flags, 1, workspace, folder / "logs/static")
    shutil.copytree(folder / "runs/static/routers", folder / "fitted")
    flags = ["--model", workspace.files["demo"], "--data", workspace.files["data"]]
    flags += ["--granularity", "mlp_token", "--capacity", "0.9,0.8966"]
    flags += ["--output", "by_cost", *sized("fit-routers", workspace)]
    start_ranks("fit-routers", flags, 1, workspace, folder / "logs/by_cost")
    shutil.copytree(folder / "runs/any", folder / "runs/by_cost")


@pytest.mark.parametrize("command", all_commands(), ids=lambda command: command.name)
def test_every_command_runs(command: Command, workspace: Workspace, tmp_path: Path) -> None:
    run(command, workspace, tmp_path)


def test_every_comparison_of_a_real_model_has_flags_that_exist(tmp_path: Path) -> None:
    """The script's own runs take hours: here it prints the commands instead of running them."""
    for name in ("train", "heldout"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.jsonl").touch()
    for name in ("blimp", "choice"):
        (tmp_path / name).mkdir()
    script = ["bash", "tools/bench/real_model.sh", str(BACKBONE), str(tmp_path), "out"]
    path = f"{sys.prefix}/bin:/usr/bin:/bin"
    said = subprocess.run(
        [*script, "--steps", "20"],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "RUN": r"printf %s\n"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    ).stdout
    _, *commands = re.split(r"^compare\n", said, flags=re.MULTILINE)
    compared = [parse_compare(flags.splitlines()) for flags in commands]
    assert [options.granularity for options in compared] == [
        *("attn_sequence", "mlp_sequence", "block_sequence"),
        *("attn_token", "mlp_token", "block_token"),
    ]
    assert {(options.layers, options.steps) for options in compared} == {("1-7", 20)}


def test_the_front_door_opens_with_its_launcher(workspace: Workspace, tmp_path: Path) -> None:
    """DeepSpeed's own launcher starts two ranks; the other tests start ranks by themselves."""
    flags = [*sized("train", workspace), "--output_dir", str(tmp_path / "run")]
    program = f"{sys.prefix}/bin/deepspeed"
    environment = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "LOCAL_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [program, "launch/train.py", "--ds_config", "ds_configs/zero3.json", *flags],
        cwd=workspace.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ZeRO-3 on 2 rank(s)" in done.stdout + done.stderr
    assert (tmp_path / "run/routers/routers.safetensors").is_file()


# -- Python


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.name)
def test_every_python_block_runs(
    block: Block, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("exported", "runs", "my_routers"):
        (tmp_path / name).symlink_to(workspace.folder / name)
    if "save_routers(" in block.text:
        (tmp_path / "my_routers").unlink()
    shutil.copyfile(workspace.files["data"], tmp_path / "my_data.jsonl")
    monkeypatch.chdir(tmp_path)
    text = block.text.replace("path/to/model", str(BACKBONE))
    exec(compile(text, block.name, "exec"), reader_has())  # noqa: S102


def reader_has() -> dict[str, Any]:
    """Return the names that a reader of a Python block has already."""
    model = AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    input_ids = torch.arange(3, 35).view(2, 16)
    attention_mask, labels = torch.ones_like(input_ids), input_ids.clone()
    labels[:, :8] = -100
    return {
        "__name__": "block",
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "model": model,
        "tokenizer": tokenizer,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "batches": [(input_ids, attention_mask, labels)],
    }


# -- what is named exists


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    for target in documents.links(document):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        named = (ROOT / document).parent / path if path else ROOT / document
        assert named.exists(), f"{document}: {target}"
        if anchor:
            there = documents.anchors(named.resolve().relative_to(ROOT).as_posix())
            assert anchor in there, f"{document}: {target}; {named.name} has {sorted(there)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document: str) -> None:
    packages = ROOT / "megaskip" if document == "docs/architecture.md" else ROOT
    for line, code in documents.inline_code(document):
        is_path = PATHS.fullmatch(code) or (
            packages != ROOT and re.fullmatch(r"[\w/]+\.py|\w+/", code)
        )
        if is_path and not code.startswith("tests/gpu"):
            there = (ROOT / code).exists() or (packages / code).exists()
            assert there, f"{document}:{line} names {code}, which does not exist"


def test_the_map_names_what_is_there() -> None:
    """docs/architecture.md writes `file.py` `Name`, or `Name` in `file.py`."""
    text = documents.text_of("docs/architecture.md")
    named = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", text)
    named += [(file, name) for name, file in re.findall(r"`([\w.]+)` in `([\w/]+\.py)`", text)]
    assert len(named) > 10
    for file, name in named:
        path = ROOT / file if (ROOT / file).exists() else ROOT / "megaskip" / file
        code = path.read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"\b(def |class )?{part}\b", code), f"{file} has no {name}"


def test_every_package_is_on_the_map() -> None:
    text = documents.text_of("docs/architecture.md")
    packages = {path.parent.name for path in (ROOT / "megaskip").glob("*/__init__.py")}
    assert {name for name in packages if f"| `{name}/`" not in text} == set()


def test_every_flag_exists(workspace: Workspace, tmp_path: Path) -> None:
    known = set(OF_OTHER_PROGRAMS)
    for name in COMMANDS:
        output = tmp_path / name
        start_ranks(name, ["--help"], 1, workspace, output)
        known |= flags_in((output / "log/rank0.log").read_text(encoding="utf-8"))
    for tool in (ROOT / "tools").rglob("*.py"):
        known |= flags_in(tool.read_text(encoding="utf-8"))
    for document in DOCUMENTS:
        unknown = {flag for flag in documents.flags(document) if flag not in known}
        assert not unknown, f"{document} names {sorted(unknown)}"


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][\w-]*", text))


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    """What varies in a message is written ... there."""
    said = "\n".join(
        text
        for folder in ("megaskip", "launch")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".sh")
        for text in (messages_of(path) if path.suffix == ".py" else [path.read_text("utf-8")])
    )
    rows = re.findall(r"^\| (.+?) \| ", documents.text_of("docs/troubleshooting.md"), re.MULTILINE)
    quoted = [row for cell in rows for row in re.findall(r"`([^`]+ [^`]+)`", cell)]
    assert len(quoted) > 30
    for message in quoted:
        if message.startswith("--") and message.count(" ") == 1:
            continue  # a flag with its value
        pattern = ".*".join(map(re.escape, message.split("...")))
        assert re.search(pattern, said), f"no code says {message!r}"


def messages_of(path: Path) -> list[str]:
    """Return the strings of a module; what is inserted into them is written as a tab."""
    tree = ast.parse(path.read_text("utf-8"))
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    texts = [
        "".join(v.value if isinstance(v, ast.Constant) else "\t" for v in node.values)
        for node in joined
    ]
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return texts + [text for text in constants if isinstance(text, str)]


# -- the rest of a project's papers


def test_the_readme_is_a_page() -> None:
    assert len(documents.text_of("README.md").splitlines()) <= 130


def test_versions_agree() -> None:
    citation = yaml.safe_load(documents.text_of("CITATION.cff"))
    assert citation["version"] == __version__
    newest = re.search(r"^## (\d\S+)", documents.text_of("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == __version__
    hook = yaml.safe_load(documents.text_of(".pre-commit-config.yaml"))["repos"][0]
    assert f"ruff=={hook['rev'].removeprefix('v')}\n" in documents.text_of("constraints.txt")


def test_the_workflow_runs_what_anybody_runs() -> None:
    workflow = yaml.safe_load(documents.text_of(".github/workflows/ci.yml"))
    steps: Iterator[str] = (step.get("run", "") for step in workflow["jobs"]["test"]["steps"])
    assert any(step == "bash .ci/run" for step in steps)


def test_every_rule_of_size_is_for_a_command() -> None:
    known = {*COMMANDS, "lm-eval"}
    assert {name for name in SIZES if name not in known and not (ROOT / name).is_file()} == set()
