"""Write docs/cli.md from the flags of all commands.

python tools/make/cli_docs.py
"""

import importlib
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a clone

from megaskip.cli.main import COMMANDS  # noqa: E402
from megaskip.config.cli import CONFIG_FILE_DOC  # noqa: E402
from megaskip.config.options import Flag, flags_of, is_section  # noqa: E402
from megaskip.config.run import RunConfig  # noqa: E402

_INTRO = """\
# Command line

<!-- Written by tools/make/cli_docs.py from the options of the commands: change those, not this. -->

`megaskip COMMAND [flags]`; in a clone that is not installed, `python -m megaskip COMMAND [flags]`.
Under `deepspeed` and `torchrun` start the file in the second column, or the module:
`torchrun -m megaskip COMMAND`, `deepspeed --module megaskip COMMAND`. A flag that is on by default
is switched off by `--no-flag`. All problems of a command line are told at once, and end it with
status 2. With Python 3.11 `torchrun` takes `--run` for one of its own flags; put `--` before the
file: `torchrun --nproc_per_node 2 -- tools/calibrate.py --run RUN --capacity 0.5`.

| command | file | what it does |
|---|---|---|
"""
_FILES = {
    "train": "launch/train.py",
    "evaluate": "launch/evaluate.py",
    "generate": "launch/generate.py",
    "calibrate": "tools/calibrate.py",
    "convert": "tools/convert_to_hf.py",
    "export-static": "tools/export_static.py",
    "import-routers": "tools/import_routers.py",
    "compare": "tools/compare.py",
}
_HEADER = "| flag | default | explanation |\n|---|---|---|\n"


def main() -> None:
    """Write the file."""
    (ROOT / "docs/cli.md").write_text(document(), encoding="utf-8")


def document() -> str:
    """Return the text of docs/cli.md."""
    rows = [
        f"| [`{name}`](#megaskip-{name}) | {_code(_FILES.get(name, ''))} | {command.summary} |\n"
        for name, command in COMMANDS.items()
    ]
    sections = [_section(name, command.module) for name, command in COMMANDS.items()]
    return _INTRO + "".join(rows) + "".join(sections)


def _section(name: str, module_name: str) -> str:
    module = importlib.import_module(module_name)
    text = f"\n## megaskip {name}\n\n```text\n{(module.__doc__ or '').strip()}\n```\n\n"
    if name == "plan":
        return f"{text}The flags are those of [`train`](#megaskip-train), without `--dry_run`.\n"
    if name == "train":
        return text + _tables_of_train()
    flags = flags_of(typing.get_type_hints(module.parse)["return"]).values()
    return text + _table(sorted(flags, key=lambda flag: not flag.is_required))


def _tables_of_train() -> str:
    """Return a table for each section of a run, and one for the flags that are in none."""
    flags = list(flags_of(RunConfig).values())
    config_file = f"| `--config run.yaml` | | {CONFIG_FILE_DOC} |\n"
    text = _table(flag for flag in flags if flag.owner is RunConfig) + config_file
    for section, cls in typing.get_type_hints(RunConfig).items():
        if is_section(cls):
            text += f"\n**{section}**: {' '.join((cls.__doc__ or '').split())}\n\n"
            text += _table(flag for flag in flags if flag.owner is cls)
    return text


def _table(flags: Iterable[Flag]) -> str:
    return _HEADER + "".join(map(_row, flags))


def _row(flag: Flag) -> str:
    explanation, default = flag.doc, _code(flag.default_text)
    if flag.is_required:
        default = "required"
    elif computed := re.search(r" ?\[([^\[\]]+)\]\.?$", explanation):
        # A default that is not a value: "[what the routers name]" at the end of the explanation.
        explanation, default = f"{explanation[: computed.start()]}.", computed[1]
    if flag.kind is bool:
        shown, default = f"--{flag.name}", "on" if flag.default else "off"
    else:
        shown = f"--{flag.name} {flag.metavar}"
    if flag.choices and not all(choice in f"{flag.metavar} {flag.doc}" for choice in flag.choices):
        explanation += f" One of {_list(flag.choices)}."
    cells = (_code(shown), default, explanation)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _list(choices: Iterable[str]) -> str:
    return ", ".join(map(_code, choices))


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    main()
