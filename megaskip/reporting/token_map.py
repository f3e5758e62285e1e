"""Which (token, layer) pairs of one text ran in a routed model, to be written as PNG or as HTML.
Knows texts and booleans, not models."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TARGETS = {
    "attn": "attention",
    "mlp": "MLP",
    "block": "whole block",
    "expert": "mixture of experts",
}
SHOWN_TOKENS = 400
LABEL_LENGTH = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMap:
    """What each routed layer did with each token of one text."""

    tokens: tuple[str, ...]
    """The text, token by token, as token_map_texts returns it."""
    layers: tuple[int, ...]
    """The routed layers, in the order of the rows of `ran`."""
    ran: np.ndarray[Any, Any]
    """bool [R layers, T tokens]: whether the layer's target ran on the token."""
    num_layers: int
    """Depth of the whole model."""
    prompt_tokens: int
    """So many of the first tokens are the prompt; the model generated the others."""
    title: str
    """One line above the picture."""
    target: str
    """What the routers skip: attn, mlp or block."""

    def __post_init__(self) -> None:
        """Raise ValueError for fields that do not belong together."""
        expected = (len(self.layers), len(self.tokens))
        if self.ran.shape != expected or self.ran.dtype != np.bool_:
            raise ValueError(
                f"ran is {self.ran.dtype} {self.ran.shape}, need bool [layers, tokens] {expected}"
            )
        if 0 in expected:
            raise ValueError(f"{expected[0]} layers and {expected[1]} tokens; need one of each")
        if len(set(self.layers)) < len(self.layers) or not (
            0 <= min(self.layers) <= max(self.layers) < self.num_layers
        ):
            raise ValueError(
                f"layers {self.layers} are not distinct layers of a model of {self.num_layers}"
            )
        if not 0 <= self.prompt_tokens <= len(self.tokens):
            raise ValueError(f"prompt_tokens is {self.prompt_tokens} of {len(self.tokens)} tokens")
        if self.target not in TARGETS:
            raise ValueError(f"target {self.target!r} is not one of {', '.join(TARGETS)}")

    def write_png(self, path: Path) -> None:
        """Draw layers x tokens, the deepest layer on top; long texts go on in panels below.

        Raises MissingExtraError without matplotlib.
        """
        from megaskip.reporting.token_map_png import draw

        draw(self, path)

    def write_html(self, path: Path) -> None:
        """Write one page that needs no other file: the shaded text and a table with hover texts."""
        from megaskip.reporting.token_map_html import page

        path.write_text(page(self), encoding="utf-8")


def token_map_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each token id, with its leading space.

    Bytes that are no character on their own become escapes such as `\\xe4`; an id without a text
    becomes `<id>`.
    """
    byte_level = _has(tokenizer, "\u0120") and not _has(tokenizer, "\u2581")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    texts = []
    for token_id in map(int, ids):
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            text = tokenizer.decode([token_id])
        elif token_id in added and (byte_level or added[token_id].special):
            text = token
        else:
            text = _from_bytes(token) if byte_level else _from_sentencepiece(token)
        texts.append(text or f"<{token_id}>")
    return tuple(texts)


def _has(tokenizer: Any, token: str) -> bool:
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == token


def _from_sentencepiece(token: str) -> str:
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(byte[1]).decode("utf-8", "backslashreplace")
    return token.replace("\u2581", " ")


def _from_bytes(token: str) -> str:
    """Undo GPT-2's table, in which bytes that do not print are the characters from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    table = {chr(byte): byte for byte in printed}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    if not set(token) <= table.keys():
        return token
    return bytes(table[character] for character in token).decode("utf-8", "backslashreplace")


# -- what both kinds of picture say


def visible(text: str, drawable: Callable[[str], bool] = str.isprintable) -> str:
    """Return text with escapes for line ends and for what cannot be drawn."""
    return "".join(
        character if drawable(character) else character.encode("unicode_escape").decode()
        for character in text
    )


def label(token: str, drawable: Callable[[str], bool] = str.isprintable) -> str:
    """Return a token as a short label in which spaces can be seen."""
    text = visible(token, drawable).replace(" ", "\u2423")
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "\u2026"


def summary(shown: TokenMap) -> str:
    """Return one sentence on how much ran."""
    routed, total = len(shown.layers), shown.num_layers
    share = float(shown.ran.mean())
    overall = (share * routed + total - routed) / total
    always = f"; {overall:.0%} over all {total} layers" if routed < total else ""
    return (
        f"The {TARGETS[shown.target]} of {routed} of {total} layers is routed. {share:.0%} of "
        f"their {shown.ran.size:,} (token, layer) pairs ran{always}."
    )


def cut_note(shown: TokenMap) -> str:
    """Return the sentence that says that a text was cut, empty for one that was not."""
    total = len(shown.tokens)
    if total <= SHOWN_TOKENS:
        return ""
    return f"Cut: the first {SHOWN_TOKENS} of {total:,} tokens; shares are over all {total:,}."


def shows_prompt_end(shown: TokenMap) -> bool:
    """Return whether the end of the prompt lies inside the tokens that are shown."""
    return 0 < shown.prompt_tokens < len(shown.tokens) and shown.prompt_tokens <= SHOWN_TOKENS


def deepest_first(shown: TokenMap) -> list[int]:
    """Return the rows of `ran` in the order in which they are drawn."""
    return sorted(range(len(shown.layers)), key=lambda row: -shown.layers[row])
