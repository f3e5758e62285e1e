"""RunConfig from the command line and a YAML file: flags win over the file, all problems come at
once."""

import argparse
import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megaskip.config.checks import did_you_mean
from megaskip.config.run import RunConfig
from megaskip.errors import ConfigError


def build_parser(description: str, **kwargs: Any) -> argparse.ArgumentParser:
    """Return the parser of all run flags, grouped by section, each explained by its field's
    text."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [--ds_config JSON] [--model DIR] [--data PATH] [flags]",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
        **kwargs,
    )
    parser.add_argument(
        "--config", metavar="run.yaml", help="flags from a YAML file; the command line wins"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        default=None,
        help=_wrap(_field_docs(RunConfig)["dry_run"]),
    )
    # The deepspeed launcher adds it; the rank itself comes from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    for section, cls in _sections().items():
        group = parser.add_argument_group(section, (cls.__doc__ or "").strip())
        docs = _field_docs(cls)
        for item in _flags(cls):
            _add_flag(group, item, typing.get_type_hints(cls)[item.name], docs.get(item.name, ""))
    return parser


def parse_run_config(argv: Sequence[str], description: str = "") -> RunConfig:
    """Return the run that `argv` and its --config file describe; raises ConfigError with every
    problem."""
    parser = build_parser(description, exit_on_error=False)
    problems: list[str] = []
    try:
        namespace, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name or 'command line'}: {error.message}") from None
    problems += _unknown_arguments(unknown)
    given = {
        k: v
        for k, v in vars(namespace).items()
        if v is not None and k not in ("config", "local_rank")
    }
    values = {**_read_yaml(namespace.config, problems), **given} if namespace.config else given
    return _assemble(values, problems)


def flag_names() -> dict[str, str]:
    """Return {flag: section} of every run flag."""
    return {item.name: section for section, cls in _sections().items() for item in _flags(cls)}


def _assemble(values: Mapping[str, Any], problems: list[str]) -> RunConfig:
    sections: dict[str, Any] = {}
    for section, cls in _sections().items():
        chosen = {item.name: values[item.name] for item in _flags(cls) if item.name in values}
        if section == "data":
            chosen |= {k: values[k] for k in ("seed", "prompt_tokens") if k in values}
        try:
            sections[section] = cls(
                **{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
            )
        except ConfigError as error:
            problems += [text for text in error.problems if text not in problems]
        except TypeError as error:
            problems.append(f"{section}: a value has the wrong type ({error})")
    if problems:
        raise ConfigError(*problems)
    return RunConfig(**sections, dry_run=bool(values.get("dry_run", False)))


def _read_yaml(path: str, problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--config {path}: not valid YAML ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {path}: expected 'flag: value' lines, found {type(content).__name__}"
        )
    known = flag_names()
    values = {}
    for key, value in content.items():
        if key not in known and key != "dry_run":
            problems.append(f"--config {path}: unknown key {key!r}{did_you_mean(key, known)}")
            continue
        values[key] = _coerce(key, value, path, problems)
    return {key: value for key, value in values.items() if value is not None}


def _coerce(key: str, value: Any, path: str, problems: list[str]) -> Any:
    """Return a YAML value as the flag's type; YAML reads 1e-3 as a string and 5 as an int for a
    float."""
    if value is None or key == "dry_run":
        return value
    cls = _sections()[flag_names()[key]]
    kind = _plain_type(typing.get_type_hints(cls)[key])
    if kind is tuple:
        return tuple(value) if isinstance(value, list) else (str(value),)
    if key == "layers":
        return value if isinstance(value, list) else str(value)
    if isinstance(value, bool) != (kind is bool) or isinstance(value, (list, dict)):
        problems.append(f"--config {path}: {key} is {value!r}, expected {kind.__name__}")
        return None
    try:
        return kind(value)
    except (TypeError, ValueError):
        problems.append(f"--config {path}: {key} is {value!r}, expected {kind.__name__}")
        return None


@functools.cache
def _sections() -> dict[str, Any]:
    hints = typing.get_type_hints(RunConfig)
    return {f.name: hints[f.name] for f in dataclasses.fields(RunConfig) if f.name != "dry_run"}


def _flags(cls: Any) -> list[dataclasses.Field[Any]]:
    return [item for item in dataclasses.fields(cls) if item.metadata.get("flag", True)]


def _add_flag(group: Any, item: dataclasses.Field[Any], hint: Any, doc: str) -> None:
    kind, name = _plain_type(hint), f"--{item.name}"
    default = " ".join(item.default) if isinstance(item.default, tuple) else item.default
    text = _wrap(doc if item.default in (None, ()) else f"{doc} [{default}]")
    if kind is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif kind is tuple:
        group.add_argument(name, action="append", metavar="PATH[:weight]", help=text)
    else:
        metavar = "SPEC" if item.name == "layers" else kind.__name__.upper()
        group.add_argument(name, type=kind, metavar=metavar, help=text)


def _plain_type(hint: Any) -> Any:
    """Return the type a flag is parsed with: str for unions that hold it, tuple for repeatable
    flags."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return str if str in options else options[0]
    return typing.get_origin(hint) or hint


@functools.cache
def _field_docs(cls: Any) -> dict[str, str]:
    """Return the string under each field of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs = {}
    for node, after in zip(body, body[1:], strict=False):
        named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[node.target.id] = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
    return docs


def _wrap(text: str) -> str:
    return textwrap.fill(text, width=84).replace("%", "%%")


def _unknown_arguments(unknown: Sequence[str]) -> list[str]:
    """Return what is wrong with arguments that no flag took; a stray flag's value is part of it."""
    flags = [f"--{name}" for name in flag_names()]
    problems = []
    for before, text in zip(["", *unknown], unknown, strict=False):
        if text.startswith("--"):
            name = text.split("=")[0]
            problems.append(f"unknown flag {name}{did_you_mean(name, flags)}")
        elif not before.startswith("--"):
            problems.append(f"unexpected argument {text!r}")
    return problems
