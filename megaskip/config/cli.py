"""Settings from a command line: a frozen dataclass in, its flags parsed, all problems at once.

The only module that knows argparse. Imports nothing heavy: --help is answered without torch.
"""

import argparse
import contextlib
import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from megaskip.config.checks import did_you_mean, one_of
from megaskip.config.options import Flag, convert, flags_of, is_section
from megaskip.config.run import RunConfig
from megaskip.errors import ConfigError

Options = TypeVar("Options")

_RUN_USAGE = "[--ds_config JSON] [--model DIR] [--data PATH] [flags]"
_EXPECTED = {int: "a whole number", float: "a number"}
_CONFIG_FILE = "config"
CONFIG_FILE_DOC = "flags from a YAML file; the command line wins"


def parse_options(
    options: type[Options],
    argv: Sequence[str],
    *,
    prog: str,
    description: str = "",
    usage: str | None = None,
    config_file: bool = False,
    fixed: Mapping[str, Any] = types.MappingProxyType({}),
) -> Options:
    """Return the `options` that `argv` gives: every field of the dataclass is a flag.

    The string under a field is its help; `megaskip.config.options.option` gives a field choices,
    a list or another metavar. A field whose type is a dataclass is a section: its flags form a
    group. With `config_file` there is a flag --config for a YAML file with the same flags. Fields
    in `fixed` have that value and no flag. --help prints and raises SystemExit. Raises ConfigError
    with every problem found.
    """
    settings: Any = options
    flags = {name: flag for name, flag in flags_of(settings).items() if name not in fixed}
    parser = _make_parser(settings, flags, prog, description, usage, config_file)
    problems: list[str] = []
    values = _values(parser, argv, flags, problems)
    made = _make(options, {**values, **fixed}, problems)
    if problems:
        raise ConfigError(*problems)
    return typing.cast(Options, made)


def parse_run_config(
    argv: Sequence[str],
    description: str = "",
    *,
    prog: str = "megaskip train",
    fixed: Mapping[str, Any] = types.MappingProxyType({}),
) -> RunConfig:
    """Return the run that `argv` and its --config file describe, with settings in `fixed` that
    have no flag; raises ConfigError with every problem."""
    return parse_options(
        RunConfig,
        argv,
        prog=prog,
        description=description,
        usage=_RUN_USAGE,
        config_file=True,
        fixed=fixed,
    )


def _make_parser(
    options: Any,
    flags: Mapping[str, Flag],
    prog: str,
    description: str,
    usage: str | None,
    config_file: bool,
) -> argparse.ArgumentParser:
    """Return the parser of `flags`, grouped by the sections of `options`; values stay text."""
    required = (f"--{f.name} {f.metavar}" for f in flags.values() if f.is_required)
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        usage=f"%(prog)s {usage or ' '.join([*required, '[flags]'])}",
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=28
        ),
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
    )
    if config_file:
        parser.add_argument(f"--{_CONFIG_FILE}", metavar="run.yaml", help=CONFIG_FILE_DOC)
    # Launchers add it; the rank itself comes from the environment.
    for name in ("--local_rank", "--local-rank"):
        parser.add_argument(name, action=_Ignored, help=argparse.SUPPRESS)
    _add_flags(parser, parser, options, flags, config_file)
    return parser


class _Ignored(argparse.Action):
    """An argument that is accepted and not kept."""

    def __call__(self, *unused: Any, **keywords: Any) -> None:
        """Keep nothing."""


def _add_flags(
    parser: argparse.ArgumentParser,
    group: Any,
    options: Any,
    flags: Mapping[str, Flag],
    negatable: bool,
) -> None:
    hints = typing.get_type_hints(options)
    for item in dataclasses.fields(options):
        hint = hints[item.name]
        if is_section(hint):
            section = parser.add_argument_group(item.name, (hint.__doc__ or "").strip())
            _add_flags(parser, section, hint, flags, negatable)
        elif item.name in flags and item.name in flags_of(options):
            _add_flag(group, flags[item.name], negatable)


def _add_flag(group: Any, flag: Flag, negatable: bool) -> None:
    name, shown = f"--{flag.name}", flag.default_text
    if flag.kind is bool and not (negatable or flag.default):
        group.add_argument(name, action="store_true", help=_escaped(flag.doc))
        return
    text = _escaped(f"{flag.doc} [{shown}]" if shown else flag.doc)
    if flag.kind is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
    else:
        action = "append" if flag.is_repeatable else "store"
        group.add_argument(name, action=action, metavar=flag.metavar, help=text)


def _values(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    flags: Mapping[str, Flag],
    problems: list[str],
) -> dict[str, Any]:
    """Return {flag: value} of the command line and its --config file; what is wrong with them goes
    to `problems`."""
    try:
        namespace, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name or 'command line'}: {error.message}") from None
    given = {name: text for name, text in vars(namespace).items() if text is not None}
    file = None if _CONFIG_FILE in flags else given.pop(_CONFIG_FILE, None)
    problems += _unknown_arguments(unknown, flags)
    values: dict[str, Any] = {}
    if file is not None:
        from megaskip.config.yaml_file import read_yaml

        values |= read_yaml(file, flags, problems)
    for name, text in given.items():
        with _collected(problems):
            values[name] = _value(flags[name], text)
    problems += [
        f"--{name} is required: {flag.doc}"
        for name, flag in flags.items()
        if flag.is_required and name not in values and name not in given
    ]
    return values


def _value(flag: Flag, text: Any) -> Any:
    """Return what the texts of a flag mean; raises ConfigError."""
    if flag.kind is bool:
        return text
    if not flag.is_tuple:
        return _single(flag, text)
    texts = text if flag.separator is None else [t for t in text.split(flag.separator) if t.strip()]
    return tuple(_single(flag, value) for value in texts)


def _single(flag: Flag, text: str) -> Any:
    text = text.strip() if flag.separator else text
    if not text.strip():
        raise ConfigError(f"--{flag.name} is empty; give a value, or leave the flag out")
    if flag.choices:
        problems = list(one_of(flag.name, text, flag.choices, elsewhere=flag.elsewhere))
        if problems:
            raise ConfigError(*problems)
    try:
        return convert(text, flag.kind)
    except ValueError:
        expected = _EXPECTED.get(flag.kind, flag.kind.__name__)
        raise ConfigError(f"--{flag.name} {text!r}: expected {expected}") from None


def _make(options: Any, values: Mapping[str, Any], problems: list[str]) -> Any:
    """Return the dataclass with its sections, or None when a problem is noted instead."""
    hints, arguments, complete = typing.get_type_hints(options), {}, True
    for item in dataclasses.fields(options):
        followed = item.metadata.get("follows")
        source = followed or item.name
        if is_section(hints[item.name]):
            section = _make(hints[item.name], values, problems)
            complete &= section is not None
            arguments[item.name] = section
        elif source in values and (followed or item.metadata.get("flag", True)):
            value = values[source]
            arguments[item.name] = tuple(value) if isinstance(value, list) else value
        elif item.default is item.default_factory is dataclasses.MISSING:
            complete = False
    if not complete:
        return None
    try:
        return options(**arguments)
    except ConfigError as error:
        problems += [text for text in error.problems if text not in problems]
    except TypeError as error:
        problems.append(f"{options.__name__}: a value has the wrong type ({error})")
    return None


@contextlib.contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def _unknown_arguments(unknown: Sequence[str], flags: Mapping[str, Flag]) -> list[str]:
    """Return what is wrong with arguments that no flag took; a stray flag's value is part of it."""
    names = [f"--{name}" for name in flags]
    problems = []
    for before, text in zip(["", *unknown], unknown, strict=False):
        if text.startswith("--"):
            name = text.split("=")[0]
            problems.append(f"unknown flag {name}{did_you_mean(name, names)}")
        elif not before.startswith("--"):
            problems.append(f"unexpected argument {text!r}")
    return problems


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
