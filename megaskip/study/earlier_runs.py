"""Runs that an earlier start of a comparison left behind: were they trained as it asks now?"""

from pathlib import Path

from megaskip.checkpoint.atomic import read_json
from megaskip.config import RunConfig
from megaskip.config.stored import stored_value
from megaskip.errors import ConfigError

_SETTINGS = {
    "data.data": "--data",
    "data.seq_length": "--seq_length",
    "model.dtype": "--dtype",
    "optim.max_steps": "--steps",
    "optim.calibration_rows": "--calibration_rows",
    "router.compensation_rank": "--compensation_rank",
    "adapter.lora_rank": "--lora_rank",
    "adapter.lora_lr": "--lora_lr or --adapter_lr",
}
_OF_NEW_ROUTERS = {
    "router.granularity": "--granularity",
    "router.layers": "--layers",
    "router.capacity": "--skip",
    "router.capacity_low": "--skip",
}
"""Flags of `megaskip compare` by the settings of a training that they decide; the second ones where
it does not start from routers that are there (--init_routers), which have these settings."""


def require_as_asked(run: Path, asked: RunConfig) -> None:
    """Raise ConfigError where the folder of a run holds one, finished or not, with other settings
    than `asked`."""
    file = run / "run.json"
    if not file.is_file():
        return
    content = read_json(file)
    starts_anew = asked.model.init_routers is None
    for path, flag in (_SETTINGS | (_OF_NEW_ROUTERS if starts_anew else {})).items():
        section, name = path.split(".")
        expected = getattr(getattr(asked, section), name)
        expected = list(expected) if isinstance(expected, tuple) else expected
        trained = stored_value(content, f"config.{path}", object, str(file))
        if trained != expected:
            raise ConfigError(
                f"{run} was trained with {name} {trained}, {flag} asks for {expected}: name "
                "another --output or remove the run; --no_training takes it as it is"
            )
