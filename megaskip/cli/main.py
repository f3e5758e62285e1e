"""The console script `megaskip`: names its commands and hands over to one of them.

Nothing heavy is imported before the options of a command are known, so that help comes at once.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megaskip._version import __version__
from megaskip.cli.run import run_cli
from megaskip.config.checks import did_you_mean
from megaskip.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Command:
    """A command: a module with `parse(argv, prog)` and `main(argv, prog)`, and what it does."""

    module: str
    summary: str
    after_interrupt: str = ""
    """How it goes on after Ctrl-C; "" where it begins anew."""


_GOES_ON = "the same command goes on where it stood"

COMMANDS = {
    "train": Command(
        "megaskip.cli.train",
        "router-tune a frozen model",
        "--resume auto continues from the newest checkpoint of the run folder, if there is one",
    ),
    "plan": Command("megaskip.cli.plan", "what a training would do and need, without weights"),
    "inspect-data": Command(
        "megaskip.cli.inspect_data", "what each row of the data becomes, and why"
    ),
    "evaluate": Command("megaskip.cli.evaluate", "lm-eval tasks, routed beside dense"),
    "generate": Command("megaskip.cli.generate", "text from a model, and what ran for it"),
    "calibrate": Command("megaskip.cli.calibrate", "thresholds for the capacities you ask for"),
    "convert": Command("megaskip.cli.convert", "a run to a Hugging Face folder"),
    "export-static": Command("megaskip.cli.export_static", "drop sublayers for good"),
    "fit": Command(
        "megaskip.cli.fit", "layers to drop, and maps in their places, in closed form", _GOES_ON
    ),
    "fit-routers": Command(
        "megaskip.cli.fit_routers",
        "routers that predict what skipping costs, in closed form",
        _GOES_ON,
    ),
    "drop": Command("megaskip.cli.drop", "a model to a smaller one: fit, train, export", _GOES_ON),
    "import-routers": Command("megaskip.cli.import_routers", "take in published routers"),
    "compare": Command("megaskip.cli.compare", "methods of skipping, at equal skip", _GOES_ON),
    "runs": Command("megaskip.cli.runs", "a table of run folders, finished or not"),
    "bench": Command(
        "megaskip.cli.bench",
        "speed and memory of this machine, in one report",
        "the same command with the same --output goes on where it stood",
    ),
    "doctor": Command("megaskip.cli.doctor", "versions, devices, memory, disk: for a bug report"),
}


def main(argv: Sequence[str] | None = None, *, prog: str = "megaskip") -> None:
    """Run the command that `argv` (sys.argv without its first) names; `prog` is how it was
    called."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # `deepspeed --module megaskip train` puts it in front; the rank comes from the environment.
    while arguments and arguments[0].startswith(("--local_rank", "--local-rank")):
        del arguments[: 1 if "=" in arguments[0] else 2]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(prog))
    elif arguments[0] == "--version":
        print(f"megaskip {__version__}")
    else:
        run_command(arguments[0], arguments[1:], prog=f"{prog} {arguments[0]}")


def run_command(name: str, argv: Sequence[str] | None = None, *, prog: str) -> None:
    """Run one command on `argv` (sys.argv without its first); its help calls it `prog`."""

    def run(arguments: Sequence[str]) -> None:
        if name not in COMMANDS:
            raise ConfigError(
                f"unknown command {name!r}{did_you_mean(name, COMMANDS)} "
                f"(commands: {', '.join(COMMANDS)})"
            )
        importlib.import_module(COMMANDS[name].module).main(arguments, prog)

    hint = COMMANDS[name].after_interrupt if name in COMMANDS else ""
    run_cli(run, argv, after_interrupt=hint)


def _help(prog: str) -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {prog} COMMAND [flags]",
            "",
            "A frozen language model learns what it can skip.",
            "",
            *lines,
            "",
            f"{prog} COMMAND --help explains the flags of a command.",
        ]
    )
