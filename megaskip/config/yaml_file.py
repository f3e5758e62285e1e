"""Flags from a YAML file; unknown keys and wrong types are problems, not defaults."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megaskip.config.checks import did_you_mean
from megaskip.config.options import Flag
from megaskip.config.value_types import shown
from megaskip.errors import ConfigError


def read_yaml(file: str, flags: Mapping[str, Flag], problems: list[str]) -> dict[str, Any]:
    """Return {flag: value} of a file of 'flag: value' lines; what is wrong in it goes to
    `problems`. Raises ConfigError when it is no such file."""
    values = {}
    for key, value in _content(file).items():
        if key not in flags:
            name = shown(key)
            problems.append(f"--config {file}: unknown key {name}{did_you_mean(key, flags)}")
        elif value is not None:
            try:
                values[key] = _coerced(flags[key], value)
            except (TypeError, ValueError, OverflowError):
                expected = flags[key].kind.__name__
                problems.append(f"--config {file}: {key} is {shown(value)}, expected {expected}")
    return values


def _content(file: str) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--config {file}: {why}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"--config {file}: not valid YAML ({why})") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {file}: expected 'flag: value' lines, found {type(content).__name__}"
        )
    return content


def _coerced(flag: Flag, value: Any) -> Any:
    """Return a value as the flag's type; YAML reads 1e-3 as a string and 5 as an int for a
    float."""
    if flag.takes_list and isinstance(value, list):
        return tuple(map(flag.kind, value)) if flag.is_tuple else tuple(value)
    if isinstance(value, bool) != (flag.kind is bool) or isinstance(value, (list, dict)):
        raise TypeError
    return (flag.kind(value),) if flag.is_tuple else flag.kind(value)
