"""How a command of the documents is run in a test: on what, at which size, on how many ranks.

A command that no rule covers is an error, so that a new one in a document gets a rule here.
"""

import hashlib
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from documents import ROOT, Command
from spawn import ALIKE, start

from megaskip.cli.main import COMMANDS

MOST_RANKS = 2
TIMEOUT = 300
"""Seconds; a command takes one to ten where nothing else runs."""

STAND_INS = {
    r"(.*/)?(Meta-Llama-\S*|SmolLM2-\S*|init)|MODEL|(.*/)?run/model|path/to/(base|model)": "{demo}",
    r"(.*/)?(my_data|train|text|alpaca)\.jsonl?": "{data}",
    r"(.*/)?held_?out(_text)?\.jsonl": "{held_out}",
    r"BLIMP(_DIR)?|blimp(/data)?": "{blimp}",
    r"RUN": "runs/first",
    r"path/to/runs": "runs",
    r"PUBLISHED": "{published}",
    r"1-LAST|1-28|1-11": "1-6",
    r"llama3-1b": "demo-110m",
    r"URL": "url",
}
"""What a whole word of a command stands for in a test; names in braces are files of the
workspace."""

TASKS = dict.fromkeys(("demo", "gsm8k", "arc_challenge,gsm8k", "arc_easy"), "demo_choice")
"""What stands for tasks that are on the hub, or more than one."""

DEMOS = {"--model": "demo", "--data": "data"}
"""Files that stand for the name demo behind a flag: fewer rows, and one name for one thing."""

_TRAIN = """--max_steps 2 --seq_length 64 --micro_batch_size 1 --max_samples 96 --held_out 8
--calibration_rows 8 --dtype float32 --no-progress --no-tensorboard"""
_COMPARE = """--steps 2 --documents 8 --pairs 2 --seq_length 32 --calibration_rows 16 --skip 25
--seeds 0 --methods static,ours --ours ours --model {demo} --layers 1-6
--eval_data {held_out} --blimp {blimp} --continuations 1"""
_FIT = """--drop 25 --eval_data {held_out} --rows 8 --order_rows 8 --held_out 8 --seq_length 64
--compensation_rank 4 --dtype float32 --micro_batch_size 1"""
SIZES = {
    "train": _TRAIN,
    "plan": "--seq_length 64 --max_steps 2",
    "evaluate": "--limit 1",
    "lm-eval": "--limit 1",
    "generate": "--max_new_tokens 4 --prompts {prompts} --dtype float32",
    "calibrate": "--rows 16 --dtype float32",
    "convert": "",
    "export-static": "--rows 8 --dtype float32",
    "import-routers": "",
    "compare": _COMPARE,
    "inspect-data": "--rows 2",
    "fit": _FIT,
    "fit-routers": """--eval_data {held_out} --rows 16 --cost_rows 16 --groups 2 --held_out 8
        --seq_length 64 --compensation_rank 4 --dtype float32 --micro_batch_size 1""",
    "drop": f"{_FIT} --steps 2 --batch_size 4",
    "doctor": "",
    "runs": "",
    "bench": "--parts zero3 --minutes 4",
    "tools/bench/inference.py": """--batch 2 --prompt 8 --capacity 0.5 --repeats 1 --warmup 0
        --threads 1 --decode_steps 2 --layers_used 3 --layers 1-2 --cpu_time""",
    "tools/bench/pipeline.py": """--micro_batches 1 2 --hidden 64 --width 64 --layers 4 --heads 1
        --tokens 16 --repeats 1""",
    "tools/bench/prefix.py": "--model demo --rows 1 --seq_length 16 --turns 1",
}
"""Flags that make a command small; the last of two equal flags counts."""

MAY_MISS = {"calibrate": "does not hold on other text", "bench": "torch sees no GPU here"}
"""Errors that are the honest answer of a command to a training of two steps, or to this machine."""

SAME_COMMAND = {
    "launch/train.py": "train",
    "launch/evaluate.py": "evaluate",
    "launch/generate.py": "generate",
    "tools/convert_to_hf.py": "convert",
    "tools/calibrate.py": "calibrate",
    "tools/export_static.py": "export-static",
    "tools/import_routers.py": "import-routers",
    "tools/compare.py": "compare",
    "megaskip.evaluation": "lm-eval",
}

EXIST = (
    r"bash (launch/quickstart|tests/run|tests/lowest|tests/serving/(run|gguf))\.sh",
    # It needs vLLM, whose environment tests/serving/run.sh makes.
    r"python tools/bench/serving\.py",
    # Its files are those of others; tests/unit/test_split_texts.py runs it.
    r"python tools/make/split_texts\.py",
    # It needs llama.cpp, whose environment tests/serving/gguf.sh makes.
    r"python tools/make/decilm_to_gguf\.py",
    r"\. launch/setup\.sh( dev)?",
    r"python tests/(two_nodes|faults/faults)\.py",
    # They start ranks of their own, one after another, which takes a minute.
    r"python tools/bench/(memory|convert)\.py",
    r"python -m pytest",
    # It writes into the clone; tests/unit/test_cli.py holds it to its word.
    r"python tools/make/cli_docs\.py",
)
"""Commands whose files must exist, and which are not run here: what they run is run by the
test-suite, or by hand."""
SHELL = (
    r".*\bCOMMAND\b.*",
    r"cd \w+",
    r"git clone url megaskip",
    r"pre-commit install",
    # What vLLM does is tested by tests/serving, on these very lines.
    r"pip install megaskip\[vllm\]",
    r"vllm serve .*",
    r"python -m vllm\.entrypoints\.openai\.api_server .*",
    r"curl -s .*",
    r"\. \.venv/bin/activate",
)
NEW = {"--output", "--output_dir", "--picture"}
"""Flags whose value is written: each command writes into a folder of its own, but comparisons share
one, for runs that exist are taken as they are."""
REPEATED = {"--data", "--eval_data"}
"""Flags that may be given several times; of others the last one counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A folder that looks like the root of a clone in which the tutorial was typed."""

    folder: Path
    """Where commands run: it links to launch/, tools/ and ds_configs/, and has runs/first, runs/any
    and exported."""
    files: dict[str, str]
    """What stands for the files that a reader has, by their name in STAND_INS."""

    @property
    def done(self) -> Path:
        """Return the folder that has a file for each command that was begun."""
        return self.folder / "done"

    def is_first(self, command: object) -> bool:
        """Return whether nobody began this command before: documents repeat each other."""
        name = hashlib.sha256(repr(command).encode()).hexdigest()
        try:
            (self.done / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def run(command: Command, workspace: Workspace, output: Path) -> None:
    """Run a command of a document at a small size; raises AssertionError when it fails."""
    words = [
        stand_in(word, before, workspace)
        for before, word in zip(("", *command.words), command.words, strict=False)
    ]
    text = " ".join(words)
    if any(re.fullmatch(pattern, text) for pattern in SHELL) or words[0] == "export":
        return
    if any(re.match(pattern, text) for pattern in EXIST):
        files = [word for word in words if "/" in word and not word.startswith("-")]
        assert all((ROOT / file).exists() for file in files), files
        return
    if words[0] in ("bash", "sbatch"):
        run_shell(command, words, workspace, output)
        return
    ranks, script, flags = split(words)
    name = SAME_COMMAND.get(script, script)
    if is_mention(command):
        named = {word.strip(",") for word in words[1:] if not word.startswith("-")}
        assert named <= COMMANDS.keys(), text
        return
    assert name in SIZES or script == "--help", f"no rule of tests/docs/commands.py covers {text!r}"
    if "--help" in words or "..." in words:
        start_ranks(script, ["--help"] if script != "--help" else [], 1, workspace, output)
        return
    flags += sized(name, workspace)
    if name == "train" and ranks > 1:  # the front door has a test of its own
        flags, ranks = [*flags, "--dry_run"], 1
    if workspace.is_first((name, ranks, what_counts(flags))):
        start_ranks(script, written_to(flags, output, workspace), ranks, workspace, output)


def is_mention(command: Command) -> bool:
    """Return whether a sentence names commands, or a flag without its value: `megaskip compare`,
    `megaskip train --init_routers`."""
    first, *rest = command.words
    values = [word for word in rest[1:] if word != "..." and word.strip(",") not in COMMANDS]
    return (
        not command.is_typed
        and first == "megaskip"
        and values[1:] == []
        and not any(not word.startswith("-") for word in values)
    )


def stand_in(word: str, before: str, workspace: Workspace) -> str:
    """Return what a word of a command stands for, behind the word `before`."""
    if before == "--tasks":
        return TASKS.get(word, word)
    if word == "demo" and before in DEMOS:
        return workspace.files[DEMOS[before]]
    for pattern, replacement in STAND_INS.items():
        if re.fullmatch(pattern, word):
            return replacement.format(**workspace.files)
    return word


def sized(name: str, workspace: Workspace) -> list[str]:
    """Return the flags that make a command small."""
    return SIZES[name].format(**workspace.files).split()


def what_counts(flags: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the flags with their values, without those that a later one overrides, and without
    the names of what is written."""
    given: dict[str, list[str]] = {}
    name = ""
    for word in flags:
        if word.startswith("--"):
            name = word
            given[name] = given.get(name, []) if name in REPEATED else []
        elif name not in NEW:
            given.setdefault(name, []).append(word)
    return sorted((name, *sorted(set(values))) for name, values in given.items())


def written_to(flags: Sequence[str], output: Path, workspace: Workspace) -> list[str]:
    """Return the flags, with what is written put under `output`."""
    output.mkdir(parents=True, exist_ok=True)
    before = ("", *flags)
    return [
        str((workspace.folder if flag == "comparison" else output) / Path(flag).name)
        if flag_before in NEW
        else flag
        for flag_before, flag in zip(before, flags, strict=False)
    ]


def split(words: Sequence[str]) -> tuple[int, str, list[str]]:
    """Return (ranks, script or name of the command, its flags) of a command line."""
    program, rest = words[0], list(words[1:])
    ranks = 1
    if program == "megaskip":
        return 1, rest[0], rest[1:]
    if program in ("deepspeed", "torchrun"):
        ranks = 2
        while rest[0].startswith("-") or rest[0] == "...":
            if rest[0] == "--nproc_per_node":
                ranks = min(int(rest[1]), MOST_RANKS)
            del rest[: 1 if rest[0] in ("--standalone", "--", "...") else 2]
    elif program == "python" and rest[0] == "-m":
        del rest[0]
    return ranks, rest[0], rest[1:]


def start_ranks(
    script: str, flags: Sequence[str], ranks: int, workspace: Workspace, output: Path
) -> None:
    """Run a script, or a command of megaskip, on so many ranks in the workspace."""
    if script in COMMANDS or script.startswith("-"):
        argv = ["megaskip/__main__.py", script, *flags]
    elif script == "megaskip.evaluation":
        argv = ["megaskip/evaluation/__main__.py", *flags]
    else:
        argv = [script, *flags]
    for flag in {"--pipeline_stages", "--sequence_parallel_size"}.intersection(argv):
        at = argv.index(flag) + 1
        argv[at] = str(min(int(argv[at]), MOST_RANKS))
    started = start(argv, ranks, output / "log", where=workspace.folder)
    statuses = started.wait(TIMEOUT)
    if any(statuses) and MAY_MISS.get(SAME_COMMAND.get(script, script), "\0") in started.text(0):
        return
    assert statuses == [0] * ranks, f"{' '.join(argv)}: {statuses}\n{started.tails()}"


def run_shell(command: Command, words: list[str], workspace: Workspace, output: Path) -> None:
    """Run a script of launch/ that starts a training: as a plan, on this machine."""
    script = next(word for word in words if word.startswith("launch/"))
    flags = words[words.index(script) + 1 :]
    assert (ROOT / script).is_file(), script
    if words[0] == "sbatch":  # no Slurm here: the flags behind the script are those of train
        start_ranks("train", [*flags, *sized("plan", workspace), "--dry_run"], 1, workspace, output)
        return
    environment = {"HEAD": "127.0.0.1", "NNODES": "1", "NPROC": "1", "PORT": "29417"}
    done = subprocess.run(
        ["bash", script, *flags, *sized("plan", workspace), "--dry_run"],
        cwd=workspace.folder,
        env={**ALIKE, **environment, "PATH": f"{sys.prefix}/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run" in done.stdout
