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
    content, texts, twice = _content(file)
    problems += [f"--config {file}: {shown(key)} is there twice; leave one out" for key in twice]
    for key, value in content.items():
        if key not in flags:
            name = shown(key)
            problems.append(f"--config {file}: unknown key {name}{did_you_mean(key, flags)}")
        elif value is not None:
            try:
                values[key] = _coerced(flags[key], value, texts.get(key))
            except (TypeError, ValueError, OverflowError):
                expected = flags[key].kind.__name__
                problems.append(f"--config {file}: {key} is {shown(value)}, expected {expected}")
    return values


def _content(file: str) -> tuple[dict[Any, Any], dict[str, Any], list[str]]:
    """Return (the keys and values of a file, the text of each value as it is written, or of each
    entry of a list; the keys that are there twice)."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        content, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
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
    assert isinstance(root, yaml.MappingNode), "a dict is one"
    keys = [key.value for key, _ in root.value if isinstance(key, yaml.ScalarNode)]
    twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
    texts = {k.value: _written(v) for k, v in root.value if isinstance(k, yaml.ScalarNode)}
    return content, texts, twice


def _written(node: yaml.Node) -> Any:
    """Return the text of a value, or of each entry of a list; None for what is no text."""
    if isinstance(node, yaml.SequenceNode):  # one level: a list may hold itself
        return [e.value if isinstance(e, yaml.ScalarNode) else None for e in node.value]
    return node.value if isinstance(node, yaml.ScalarNode) else None


def _coerced(flag: Flag, value: Any, written: Any) -> Any:
    """Return a value as the flag's type; YAML reads 1e-3 as a string and 5 as an int for a
    float."""
    if flag.takes_list and isinstance(value, list):
        if not flag.is_tuple:
            return tuple(value)
        return tuple(_single(flag, *pair) for pair in zip(value, written, strict=True))
    return (_single(flag, value, written),) if flag.is_tuple else _single(flag, value, written)


def _single(flag: Flag, value: Any, written: Any) -> Any:
    """Return one value; a text is as it is written: YAML has 1.1 for 1.10 and 83 for 0123."""
    if isinstance(value, bool) != (flag.kind is bool) or isinstance(value, list | dict | None):
        raise TypeError
    if flag.kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    if isinstance(value, str) and not value.strip():
        raise ValueError
    return flag.kind(value if flag.kind is not str or isinstance(value, str) else written)
