"""The tokenizer of a run, fast or SentencePiece."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import is_sentencepiece_available

from megaskip.errors import ConfigError
from megaskip.extras import MissingExtraError

SENTENCEPIECE = "tokenizer.model"
"""The file of a SentencePiece model."""
_UNUSABLE = (
    OSError,
    ValueError,
    LookupError,
    ImportError,
    TypeError,
    AttributeError,
    RuntimeError,
)
"""What transformers and its libraries raise for files that are damaged, missing or of a newer
kind."""


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder or hub id, with a token to pad with.

    Raises ConfigError when there is none, and MissingExtraError for a SentencePiece model without
    the library that reads it.
    """
    tokenizer = read_tokenizer(source, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any token does.
        tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return tokenizer


def read_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder or hub id as it is; errors as `load_tokenizer`'s."""
    path = Path(source)
    if (path.is_absolute() or str(source).startswith(".")) and not path.exists():
        raise ConfigError(f"no tokenizer in {source}: there is no such folder")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        # tokenizers raises a bare Exception for a tokenizer.json that it cannot read.
        if not isinstance(error, _UNUSABLE) and type(error) is not Exception:
            raise
        if (path / SENTENCEPIECE).is_file() and not is_sentencepiece_available():
            raise MissingExtraError("sentencepiece", "train", SENTENCEPIECE) from None
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"no tokenizer in {source} ({reason}); put its files there, or name one with "
            "--tokenizer where a command has that"
        ) from None
