"""Options of `megaskip doctor`."""

from dataclasses import dataclass

from megaskip.config.options import Checked


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions(Checked):
    """What a bug report needs."""

    json: bool = False
    """Print JSON, for programs."""
