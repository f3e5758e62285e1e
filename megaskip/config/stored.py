"""Settings as files of earlier runs hold them: read back as strictly as flags are."""

import dataclasses
import typing
from typing import Any, TypeVar

from megaskip.config.checks import did_you_mean
from megaskip.config.value_types import is_of, shown, type_name
from megaskip.errors import ConfigError

Settings = TypeVar("Settings")


def stored_settings(kind: type[Settings], content: Any, source: str) -> Settings:
    """Return the settings that `content` holds as `dataclasses.asdict` and JSON have written them;
    those that it lacks have their defaults.

    Raises ConfigError, which begins with `source`, for a setting that is unknown or wrong.
    """
    if not is_of(content, dict):
        raise ConfigError(f"{source} is {shown(content)}, expected an object")
    names = {item.name for item in dataclasses.fields(typing.cast(Any, kind))}
    for name in content:
        if name not in names:
            raise ConfigError(f"{source} has no setting {shown(name)}{did_you_mean(name, names)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(*(f"{source}: {problem}" for problem in error.problems)) from None


def stored_value(content: Any, path: str, hint: Any, source: str) -> Any:
    """Return the value at a path such as "config.model.tokenizer" of a JSON object.

    Raises ConfigError, which begins with `source`, when it is missing or of another type.
    """
    value = content
    for name in path.split("."):
        if not is_of(value, dict) or name not in value:
            raise ConfigError(f"{source} lacks {path}; is it written by `megaskip train`?")
        value = value[name]
    if not is_of(value, hint):
        raise ConfigError(f"{source}: {path} is {shown(value)}, expected {type_name(hint)}")
    return value
