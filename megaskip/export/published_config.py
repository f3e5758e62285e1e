"""What the config.json of published routers records, field by field. Knows no weights."""

import re
from pathlib import Path
from typing import Any

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.base import BaseModel
from megaskip.config import SUBLAYER_GRANULARITIES, RouterConfig
from megaskip.config.checks import one_of
from megaskip.errors import CheckpointError, ConfigError

_CUSTOM_TYPE = re.compile(r"(.+)_(?:mindskip|mod)")
_FLAGS = ("is_mindskip", "is_mod")
_CAPACITIES = ("target_capacity", "mod_capacity", "mindskip_capacity")
_UNRECORDED_CAPACITY = 0.5
"""The capacity of the published main experiment."""
_PUBLISHED_THRESHOLD = 0.5


class PublishedConfig:
    """A published config.json, read field by field; `notes` collects what it left open."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist; say where config.json is with --config")
        self.file = file
        self.notes: list[str] = []
        self._content = read_json(file)

    def integer(self, name: str) -> int | None:
        """Return a positive integer, None when it is not recorded."""
        value = self._content.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(name, value, "a positive integer")
        return value

    def flagged(self, num_layers: int | None) -> set[int] | None:
        """Return the layers that are flagged as routed; None when it says only that some are."""
        name, value = self._first(*_FLAGS)
        other = self._content.get(_FLAGS[1])
        if other is not None and other != value:
            raise self._wrong(_FLAGS[1], other, f"what {name} says, {value!r}")
        if value is None or value is True:
            if value is None:
                self.notes.append(f"neither {' nor '.join(_FLAGS)} is recorded; took all routers")
            return None
        if value is False:
            return set()
        if not isinstance(value, list) or not all(isinstance(flag, bool) for flag in value):
            raise self._wrong(name, value, "true, or a list with true or false for each layer")
        if num_layers is not None and len(value) != num_layers:
            raise CheckpointError(
                f"{self.file}: {name} has {len(value)} flags, expected one for each of "
                f"{num_layers} layers"
            )
        return {layer for layer, routed in enumerate(value) if routed}

    def granularity(self, flag: str | None) -> str:
        """Return what the routers skip; `flag` answers when it is not recorded."""
        name, value = self._first("granularity", "mindskip_granularity")
        known = value in SUBLAYER_GRANULARITIES
        if flag is None:
            if value is None:
                raise ConfigError(
                    f"{self.file} records no granularity; say what the routers skip with "
                    f"--granularity, one of {', '.join(SUBLAYER_GRANULARITIES)}"
                )
            if not known:
                expected = (
                    f"one of {', '.join(SUBLAYER_GRANULARITIES)} (--granularity says it instead)"
                )
                raise self._wrong(name, value, expected)
            return str(value)
        for problem in one_of("granularity", flag, SUBLAYER_GRANULARITIES):
            raise ConfigError(problem)
        if known and value != flag:
            raise ConfigError(
                f"--granularity {flag}, but {self.file} records {value}; leave it out"
            )
        if not known:
            self.notes.append(f"granularity {flag} is from --granularity, recorded: {value}")
        return flag

    def threshold(self) -> float:
        """Return the recorded threshold, or the published one."""
        value = self._number("threshold", self._content.get("threshold"))
        if value is None:
            self.notes.append(f"threshold not recorded; took the published {_PUBLISHED_THRESHOLD}")
        return _PUBLISHED_THRESHOLD if value is None else value

    def capacity(self, layers: tuple[int, ...]) -> float:
        """Return the recorded target, the mean of the routed layers when it is a list."""
        name, value = self._first(*_CAPACITIES)
        if isinstance(value, list):
            if max(layers) >= len(value):
                raise self._wrong(name, value, "a number, or one for each layer")
            each = [self._number(name, value[layer]) for layer in layers]
            given = [number for number in each if number is not None]
            if len(given) < len(layers):
                raise self._wrong(name, value, "a number for each routed layer")
            self.notes.append(f"capacity is the mean of {name} over the routed layers")
            return sum(given) / len(given)
        number = self._number(name, value)
        if number is None:
            self.notes.append(f"target capacity not recorded; wrote {_UNRECORDED_CAPACITY}")
        return _UNRECORDED_CAPACITY if number is None else number

    def penalty_weight(self) -> float:
        """Return the recorded factor of the hinge; decisions do not depend on it."""
        value = self._number("gradient_scale", self._content.get("gradient_scale"))
        default = RouterConfig().penalty_weight
        if value is None:
            self.notes.append(f"gradient_scale not recorded; wrote penalty weight {default}")
        return default if value is None else value

    def base_model(self) -> BaseModel | None:
        """Return the base model's shape; None when it is not recorded."""
        model_type = self._content.get("model_type")
        layers, hidden = self.integer("num_hidden_layers"), self.integer("hidden_size")
        if not isinstance(model_type, str) or layers is None or hidden is None:
            self.notes.append("base model not recorded; it is not checked when they are loaded")
            return None
        custom = _CUSTOM_TYPE.fullmatch(model_type)
        if custom:
            self.notes.append(f"base model {custom[1]}, recorded as {model_type}")
        return BaseModel(
            name=str(self._content.get("_name_or_path") or ""),
            revision=None,
            model_type=custom[1] if custom else model_type,
            num_layers=layers,
            hidden_size=hidden,
            weights=None,
        )

    def _first(self, *names: str) -> tuple[str, Any]:
        for name in names:
            if self._content.get(name) is not None:
                return name, self._content[name]
        return names[0], None

    def _number(self, name: str, value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, value, "a number")
        return float(value)

    def _wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {name} is {value!r}, expected {expected}")
