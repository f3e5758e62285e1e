"""The command line: help without torch, options as dataclasses, all problems at once."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megaskip.cli import doctor, export_static, plan, train
from megaskip.cli.main import COMMANDS, main
from megaskip.config import option, parse_options
from megaskip.config.commands.compare import BASELINES, FITTED_BASELINES, METHODS, CompareOptions
from megaskip.config.options import Checked, exactly_one, flags_of
from megaskip.errors import ConfigError
from megaskip.study.cost_routers import BY_COST
from megaskip.study.recipes import RECIPES
from megaskip.study.static_drops import STATIC

ROOT = Path(__file__).parents[2]
STUBS = {
    "launch/train.py": "train",
    "launch/evaluate.py": "evaluate",
    "launch/generate.py": "generate",
    "tools/calibrate.py": "calibrate",
    "tools/compare.py": "compare",
    "tools/convert_to_hf.py": "convert",
    "tools/export_static.py": "export-static",
    "tools/import_routers.py": "import-routers",
}
SMALLEST = {
    # The flags without which a command does not start.
    "evaluate": ["--model", "demo", "--tasks", "demo", "--output", "out.json"],
    "generate": ["--model", "demo"],
    "calibrate": ["--run", "run", "--capacity", "0.5"],
    "convert": ["--run", "run", "--output", "out"],
    "export-static": ["--run", "run", "--count", "1", "--output", "out"],
    "import-routers": ["--source", "in", "--output", "out"],
    "compare": ["--model", "demo", "--data", "demo", "--output", "out"],
    "fit": ["--model", "demo", "--data", "demo", "--output", "out"],
    "fit-routers": ["--model", "demo", "--data", "demo", "--output", "out"],
    "drop": ["--model", "demo", "--data", "demo", "--output", "out"],
    "bench": ["--device", "cpu"],
}


def module_of(command: str) -> Any:
    return importlib.import_module(COMMANDS[command].module)


def options_of(command: str) -> Any:
    return typing.get_type_hints(module_of(command).parse)["return"]


def python(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


# -- help


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_comes_without_importing_anything_heavy(command: str | None) -> None:
    argv = ["--help"] if command is None else [command, "--help"]
    code = (
        "import sys\nfrom megaskip.cli.main import main\n"
        f"try: main({argv!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert len(sys.modules) < 250, len(sys.modules)"
    )
    done = python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: megaskip")


@pytest.mark.parametrize(("stub", "command"), STUBS.items())
def test_stubs_run_from_a_clone_and_call_themselves_by_their_name(
    stub: str, command: str, tmp_path: Path
) -> None:
    """Without site-packages: neither an installed megaskip nor any library answers for it."""
    done = python("-E", "-S", str(ROOT / stub), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {stub} ")
    assert (inspect.getdoc(module_of(command)) or "").split("\n")[0] in done.stdout
    assert len((ROOT / stub).read_text().splitlines()) < 25


def test_help_lists_every_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert sum(line.split() == [name, *command.summary.split()] for line in lines) == 1
        assert (ROOT / f"{command.module.replace('.', '/')}.py").is_file()


def test_an_unknown_command_is_one_message_with_a_suggestion() -> None:
    done = python("-m", "megaskip", "trian", "--model", "demo", cwd=ROOT)
    assert done.returncode == 2
    assert "unknown command 'trian'; did you mean 'train'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_docs_of_the_command_line_are_current() -> None:
    spec = importlib.util.spec_from_file_location("cli_docs", ROOT / "tools/make/cli_docs.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    current = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert current == writer.document(), "run python tools/make/cli_docs.py"


# -- every command


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_a_frozen_dataclass_whose_flags_are_explained(command: str) -> None:
    options = options_of(command)
    assert dataclasses.is_dataclass(options)
    assert options.__dataclass_params__.frozen
    assert hasattr(options, "__slots__")
    for flag in flags_of(options).values():
        assert flag.doc.endswith((".", "].")), f"--{flag.name}: {flag.doc!r}"
        assert flag.doc[0].isupper() or not flag.doc[0].isalpha() or flag.choices


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("launcher", [["--local_rank=1"], ["--local-rank", "1"]])
def test_the_ranks_of_launchers_are_accepted(command: str, launcher: list[str]) -> None:
    usual = SMALLEST.get(command, [])
    parse = module_of(command).parse
    assert parse([*launcher, *usual]) == parse(usual)


def test_a_launcher_may_put_its_rank_before_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for launcher in (["--local_rank=0"], ["--local_rank", "0"]):
        with pytest.raises(SystemExit) as ended:
            main([*launcher, "train", "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith("usage: megaskip train")


def test_torchrun_takes_no_flag_for_several_of_its_own() -> None:
    """It refuses those before the script sees them, where Python is older than 3.12."""
    from torch.distributed.run import get_args_parser

    its_own = get_args_parser()._option_string_actions
    refused = {
        name
        for command in ("train", "evaluate", "calibrate", "doctor")
        for name in flags_of(options_of(command))
        if sum(other.startswith(f"--{name}") for other in its_own) > 1
    }
    assert refused == {"run"}  # docs/cli.md says what to do


@pytest.mark.parametrize("command", SMALLEST)
def test_missing_flags_are_all_named(command: str) -> None:
    with pytest.raises(ConfigError) as caught:
        module_of(command).parse([])
    required = [name for name, flag in flags_of(options_of(command)).items() if flag.is_required]
    for name in required:
        assert f"--{name} is required: " in str(caught.value)


def test_all_problems_of_a_command_come_at_once() -> None:
    argv = ["--run", "a", "--routers", "b", "--below", "0.3", "--count", "2", "--format", "decilm"]
    with pytest.raises(ConfigError) as caught:
        export_static.parse([*argv, "--output", "out", "--verify", "--rows", "0", "--outptu", "x"])
    assert [text.split(":")[0].split(";")[0] for text in caught.value.problems] == [
        "unknown flag --outptu",
        "--run and --routers exclude each other",
    ]
    with pytest.raises(ConfigError) as caught:
        export_static.parse(["--run", "a", *argv[4:], "--output", "o", "--verify", "--rows", "0"])
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="one of --run, --routers is required"):
        export_static.parse(["--count", "2", "--output", "out"])


def test_a_plan_is_a_training_that_is_not_run() -> None:
    argv = ["--world_size", "16", "--capacity", "0.25"]
    assert plan.parse(argv) == train.parse([*argv, "--dry_run"])
    with pytest.raises(ConfigError, match="unknown flag --dry_run"):
        plan.parse(["--dry_run"])
    with pytest.raises(ConfigError, match="--world_size 16 is for --dry_run"):
        train.parse(argv)


def test_methods_that_can_be_named_are_those_that_there_are() -> None:
    assert set(METHODS) == {*BASELINES, *FITTED_BASELINES, *STATIC, *BY_COST, *RECIPES}


# -- parse_options


@dataclass(frozen=True, slots=True, kw_only=True)
class Where(Checked):
    """A section."""

    run: Path | None = None
    """A folder."""
    name: str | None = None
    """Another way to say it."""

    def _problems(self) -> Iterator[str]:
        yield from exactly_one({"run": self.run, "name": self.name})


@dataclass(frozen=True, slots=True, kw_only=True)
class Example(Checked):
    """Every kind of field that there is."""

    where: Where
    count: int = option(metavar="N")
    """Without a default: required."""
    share: float = 0.5
    """A number, 50 % by default."""
    dtype: str | None = option(None, choices=("float32", "bfloat16"))
    """One of two [that of the model]."""
    data: tuple[str, ...] = ("demo",)
    """Repeatable."""
    seeds: tuple[int, ...] = option((0, 1), separator=",")
    """A list in one flag."""
    verify: bool = False
    """Off."""
    progress: bool = True
    """On."""
    follower: int = option(0, is_flag=False, follows="count")
    """Has no flag of its own."""


def parse(*argv: str) -> Example:
    return parse_options(Example, argv, prog="example")


def test_fields_become_flags_of_their_types() -> None:
    least = parse("--count", "3", "--name", "x")
    assert least == Example(where=Where(name="x"), count=3, follower=3)
    full = parse(
        *("--count=4", "--run", "~/a", "--share", "1e-1", "--dtype", "float32", "--verify"),
        *("--data", "a", "--data", "b:2", "--seeds", "3, 4", "--no-progress"),
    )
    assert full == Example(
        where=Where(run=Path.home() / "a"),
        count=4,
        share=0.1,
        dtype="float32",
        data=("a", "b:2"),
        seeds=(3, 4),
        verify=True,
        progress=False,
        follower=4,
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--count", "x"], "--count 'x': expected a whole number"),
        (["--share", "half"], "--share 'half': expected a number"),
        (["--seeds", "1,b"], "--seeds 'b': expected a whole number"),
        (["--dtype", "flot32"], "is not one of float32, bfloat16; did you mean 'float32'"),
        (["--cuont", "3"], "unknown flag --cuont; did you mean '--count'"),
        (["--count", "3", "stray"], "unexpected argument 'stray'"),
        (["--count"], "--count: expected one argument"),
        (["--follower", "3"], "unknown flag --follower"),
        (["--no-verify"], "unknown flag --no-verify"),
        (["--name", "x", "--run", "y", "--count", "3"], "--run and --name exclude each other"),
        (["--count", "3"], "one of --run, --name is required"),
    ],
)
def test_what_is_wrong_is_said(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("drop", ["--drop", "0.25"], "--drop 0.25 is in percent; a share of 0.25 is written 25"),
        ("fit", ["--drop", "100"], r"--drop 100 must lie inside \[1, 100\): it is in percent"),
        ("compare", ["--skip", "0.5,25"], "--skip 0.5 is in percent; a share of 0.5 is written 50"),
        ("compare", ["--skip", "125"], r"--skip 125 must lie inside \[1, 100\)"),
        ("plan", ["--capacity", "80"], r"outside \[0, 1\]; 80 percent is written 0.8"),
        ("fit-routers", ["--capacity", "80"], r"\(0, 1\).*; 80 percent is written 0.8"),
        ("calibrate", ["--capacity", "80"], "; 80 percent is written 0.8"),
    ],
)
def test_a_share_is_not_taken_for_a_percentage_nor_the_other_way_round(
    command: str, flags: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        module_of(command).parse([*SMALLEST.get(command, []), *flags])


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("compare", "block_token; experts are not compared here: tools/bench/experts.py compares"),
        ("fit-routers", "block_token; routers of experts are not fitted: train them with"),
    ],
)
def test_where_experts_are_not_offered_it_is_said_what_takes_them(command: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        module_of(command).parse([*SMALLEST.get(command, []), "--granularity", "expert_token"])


def test_choices_are_checked_in_python_too() -> None:
    with pytest.raises(ConfigError, match="--dtype 'int8' is not one of"):
        Example(where=Where(name="x"), count=1, dtype="int8")
    where = {"model": "m", "data": ("text.txt",), "output": Path("out")}
    with pytest.raises(ConfigError, match=r"experts are not compared here: tools/bench/experts.py"):
        CompareOptions(**where, granularity="expert_token")


def test_help_shows_sections_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: example --count N [flags]" in text
    assert "--share FLOAT A number, 50 % by default. [0.5]" in text
    assert "--dtype {float32,bfloat16} One of two [that of the model]." in text
    assert "--seeds INT A list in one flag. [0,1]" in text
    assert "--verify Off." in text
    assert "--progress, --no-progress On. [True]" in text
    assert "where: A section. --run PATH A folder." in text


# -- doctor


def test_the_doctor_tells_what_a_bug_report_needs_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # put back what a group of one sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    doctor.main(["--json"])
    text = capsys.readouterr().out
    report = json.loads(text)
    assert "hf_secret" not in text
    assert report["environment"]["NCCL_DEBUG"] == "WARN"
    assert report["software"]["torch"]
    assert report["processor"]["torch_threads"] >= 1
    assert report["processor"]["bfloat16_time_ratio"] > 0
    assert 0 < report["memory"]["available_bytes"] <= report["memory"]["total_bytes"]
    assert report["disk"]["working_folder"]["free_bytes"] > 0
    assert report["collectives"]["ranks"] == 1
    assert report["collectives"]["all_reduce_seconds"]["gloo"] > 0
    doctor.main([])
    table = capsys.readouterr().out
    for name in ("torch", "memory", "cores", "bfloat16 on the CPU", "all-reduce, gloo"):
        assert f"\n{name}  " in table


def test_missing_libraries_are_named_with_the_extra_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megaskip.doctor import job

    software = job.software()
    monkeypatch.setattr(job, "software", lambda: software | {"deepspeed": "not installed"})
    notes = job.examination()["notes"]
    assert any("deepspeed not installed: pip install megaskip[train]" in note for note in notes)


# -- what the house forbids


def test_only_one_module_knows_argparse_and_none_changes_the_path() -> None:
    for file in (ROOT / "megaskip").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import))
        names = {alias.name for node in imports for alias in node.names}
        assert "argparse" not in names or file == ROOT / "megaskip/config/cli.py", file
        assert "sys.path" not in map(ast.unparse, ast.walk(tree)), file


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        ("BrokenPipeError", 141, ""),  # a reader that has read enough
        ("KeyboardInterrupt", 130, "\ninterrupted by Ctrl-C; it goes on\n"),
    ],
)
def test_what_ends_a_command_from_outside_shows_no_traceback(
    error: str, status: int, says: str
) -> None:
    code = f"from megaskip.cli.run import run_cli\ndef f(a): raise {error}\n"
    done = python("-c", f"{code}run_cli(f, [], after_interrupt='it goes on')", cwd=ROOT)
    assert (done.returncode, done.stderr) == (status, says)


def test_commands_that_can_go_on_say_so_after_an_interrupt() -> None:
    told = {name for name, command in COMMANDS.items() if command.after_interrupt}
    assert told == {"train", "fit", "fit-routers", "drop", "compare", "bench"}
