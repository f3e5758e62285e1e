"""Which tokenizer a run was given, read from its run.json."""

from pathlib import Path
from typing import Any

from megaskip.checkpoint.atomic import read_json
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError


def other_tokenizer(named: str | None, run: Path | None, base: Path) -> Any | None:
    """Return the tokenizer that replaces the base model's; None to use the base's own.

    `named` (a folder or hub id) comes first; else what the run in the folder `run` was given with
    --tokenizer and --chat_template, as its run.json says. Raises ConfigError when that is gone.
    """
    if named is not None:
        return load_tokenizer(named)
    if run is None or not (run / "run.json").is_file():
        return None
    config = read_json(run / "run.json")["config"]
    model, template = config["model"], config["data"]["chat_template"]
    if model["tokenizer"] is None and template is None:
        return None
    trust = model["trust_remote_code"]
    return given_tokenizer(model["tokenizer"] or base, template, trust_remote_code=trust)


def given_tokenizer(source: str | Path, template: str | None, *, trust_remote_code: bool) -> Any:
    """Return the tokenizer of `source` with the chat template in the file `template`, if any."""
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if template is not None:
        tokenizer.chat_template = _template_in(Path(template).expanduser())
    return tokenizer


def _template_in(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the run was trained with --chat_template {file}, which cannot be read "
            f"({error.strerror or error}); put it back, or name a tokenizer with --tokenizer"
        ) from None
