"""Which tokenizer a run was given, read from its run.json."""

from pathlib import Path
from typing import Any

from megaskip.checkpoint.atomic import read_json
from megaskip.config.stored import stored_value
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError


def other_tokenizer(
    named: str | None, run: Path | None, base: Path, *, trust_remote_code: bool = False
) -> Any | None:
    """Return the tokenizer that replaces the base model's; None to use the base's own.

    `named` (a folder or hub id) comes first; else what the run in the folder `run` was given with
    --tokenizer and --chat_template, as its run.json says. Raises ConfigError when that is gone.
    Code that a tokenizer brings along runs with `trust_remote_code` only, whatever the run allowed:
    the run may be somebody else's.
    """
    if named is not None:
        return load_tokenizer(named, trust_remote_code=trust_remote_code)
    if run is None or not (run / "run.json").is_file():
        return None
    content = read_json(run / "run.json")
    tokenizer, template = (
        stored_value(content, f"config.{name}", str | None, str(run / "run.json"))
        for name in ("model.tokenizer", "data.chat_template")
    )
    if tokenizer is None and template is None:
        return None
    return given_tokenizer(tokenizer or base, template, trust_remote_code=trust_remote_code)


def given_tokenizer(source: str | Path, template: str | None, *, trust_remote_code: bool) -> Any:
    """Return the tokenizer of `source` with the chat template in the file `template`, if any."""
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if template is not None:
        tokenizer.chat_template = _template_in(Path(template).expanduser())
    return tokenizer


def _template_in(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"the run was trained with --chat_template {file}, which cannot be read ({why}); put "
            "it back, or name a tokenizer with --tokenizer"
        ) from None
