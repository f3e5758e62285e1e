"""A picture of which (token, layer) pairs of one text ran in a routed model, as PNG and as HTML.
Knows texts and booleans, not models."""

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

TARGETS = {"attn": "attention", "mlp": "MLP", "block": "whole block"}
SHOWN_TOKENS = 400
PANEL_TOKENS = 80
LABEL_LENGTH = 14
RAN, SKIPPED, PROMPT_END = "#2b6ca3", "#f3d7a4", "#c8102e"
FONT = "DejaVu Sans Mono"  # Comes with matplotlib, so labels look alike everywhere.


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
        """Draw layers x tokens, the deepest layer on top; long texts go on in panels below."""
        _draw(self, path)

    def write_html(self, path: Path) -> None:
        """Write one page that needs no other file: the shaded text and a table with hover texts."""
        path.write_text(_page(self), encoding="utf-8")


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
    found = tokenizer.convert_tokens_to_ids(token)
    return found is not None and tokenizer.convert_ids_to_tokens(found) == token


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


def _visible(text: str, drawable: Callable[[str], bool] = str.isprintable) -> str:
    """Return text with escapes for line ends and for what cannot be drawn."""
    return "".join(
        character if drawable(character) else character.encode("unicode_escape").decode()
        for character in text
    )


def _label(token: str, drawable: Callable[[str], bool] = str.isprintable) -> str:
    """Return a token as a short label in which spaces can be seen."""
    text = _visible(token, drawable).replace(" ", "\u2423")
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "\u2026"


def _summary(shown: TokenMap) -> str:
    routed, total = len(shown.layers), shown.num_layers
    share = float(shown.ran.mean())
    overall = (share * routed + total - routed) / total
    always = f"; {overall:.0%} over all {total} layers" if routed < total else ""
    return (
        f"The {TARGETS[shown.target]} of {routed} of {total} layers is routed. {share:.0%} of "
        f"their {shown.ran.size:,} (token, layer) pairs ran{always}."
    )


def _cut_note(shown: TokenMap) -> str:
    total = len(shown.tokens)
    if total <= SHOWN_TOKENS:
        return ""
    return f"Cut: the first {SHOWN_TOKENS} of {total:,} tokens; shares are over all {total:,}."


def _shows_prompt_end(shown: TokenMap) -> bool:
    return 0 < shown.prompt_tokens < len(shown.tokens) and shown.prompt_tokens <= SHOWN_TOKENS


def _deepest_first(shown: TokenMap) -> list[int]:
    return sorted(range(len(shown.layers)), key=lambda row: -shown.layers[row])


def _draw(shown: TokenMap, path: Path) -> None:
    """Lay out in inches from the top: title, summary, legend, panels, note."""
    count = min(len(shown.tokens), SHOWN_TOKENS)
    columns = -(-count // -(-count // PANEL_TOKENS))
    cell = max(0.165, min(0.3, 5.6 / columns))
    left, right, body = 0.65, 0.85, _row_height(shown) * len(shown.layers)
    width = max(7.0, left + columns * cell + right)
    drawable = _drawable()
    labels = [_label(token, drawable) for token in shown.tokens[:count]]
    panels = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    below = [0.2 + 0.062 * max(len(labels[token]) for token in panel) for panel in panels]
    head = _header_lines(shown, width, drawable)
    top = 0.4 + 0.19 * len(head)
    note = _cut_note(shown)
    height = top + sum(0.3 + body + space for space in below) + (0.25 if note else 0)

    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    for index, (line, size) in enumerate(head):
        y = 1 - (0.26 + 0.19 * index) / height
        figure.text(0.15 / width, y, line, fontsize=size, parse_math=False)
    _legend(figure, shown, (0.08 / width, 1 - top / height))
    for panel, space in zip(panels, below, strict=True):
        top += 0.3 + body
        box = (left / width, 1 - top / height, len(panel) * cell / width, body / height)
        axes = figure.add_axes(box)
        _panel(axes, shown, panel, [labels[token] for token in panel])
        top += space
    figure.text(0.15 / width, 0.12 / height, note, fontsize=8.5, style="italic")
    figure.savefig(path)


def _row_height(shown: TokenMap) -> float:
    return max(0.12, min(0.22, 5 / len(shown.layers)))


def _drawable() -> Callable[[str], bool]:
    glyphs = get_font(findfont(FONT)).get_charmap()
    return lambda character: character.isprintable() and ord(character) in glyphs


def _header_lines(
    shown: TokenMap, width: float, drawable: Callable[[str], bool]
) -> list[tuple[str, float]]:
    """Return (line, font size) of title and summary, wrapped to a width in inches."""
    title = textwrap.wrap(_visible(shown.title, drawable), int(width / 0.1))
    summary = textwrap.wrap(_summary(shown), int(width / 0.062))
    return [(line, 11.0) for line in title] + [(line, 8.5) for line in summary]


def _legend(figure: Figure, shown: TokenMap, corner: tuple[float, float]) -> None:
    entries: list[Any] = [Patch(color=RAN, label="ran"), Patch(color=SKIPPED, label="skipped")]
    if _shows_prompt_end(shown):
        label = f"end of the prompt ({shown.prompt_tokens} of {len(shown.tokens)} tokens)"
        entries.append(Line2D([], [], color=PROMPT_END, linewidth=2, label=label))
    figure.legend(
        handles=entries,
        loc="lower left",
        bbox_to_anchor=corner,
        ncols=3,
        frameon=False,
        fontsize=8.5,
    )


def _panel(axes: Axes, shown: TokenMap, panel: range, labels: list[str]) -> None:
    """Draw the columns `panel` of all layers, one cell a unit."""
    rows = _deepest_first(shown)[::-1]
    cells = shown.ran[rows, panel.start : panel.stop]
    colours = ListedColormap([SKIPPED, RAN])
    axes.pcolormesh(cells, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
    size = min(8.0, 60 * _row_height(shown))
    middles = np.arange(len(rows)) + 0.5
    axes.set_yticks(middles, [str(shown.layers[row]) for row in rows], fontsize=size)
    axes.set_ylabel("layer", fontsize=9)
    axes.set(xlim=(0, len(panel)), ylim=(0, len(rows)))
    axes.set_xticks(
        np.arange(len(panel)) + 0.5,
        labels,
        rotation=90,
        fontsize=7.5,
        family=FONT,
        parse_math=False,
    )
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
    for middle, share in zip(middles, shown.ran[rows].mean(axis=1), strict=True):
        axes.text(len(panel) + 0.4, middle, f"{share:.0%}", fontsize=size, va="center")
    above = len(rows) + 0.06 / _row_height(shown)
    whole = len(panel) == len(shown.tokens)
    axes.text(len(panel) + 0.4, above, "ran" if whole else "ran, overall", fontsize=8)
    if not whole:
        axes.text(0, above, f"tokens {panel.start + 1} to {panel.stop}", fontsize=8)
    if _shows_prompt_end(shown) and shown.prompt_tokens - 1 in panel:
        x = shown.prompt_tokens - panel.start
        axes.plot([x, x], [0, len(rows) + 0.3], color=PROMPT_END, linewidth=2, clip_on=False)


def _page(shown: TokenMap) -> str:
    note = _cut_note(shown)
    share_of_token = shown.ran.mean(axis=0)
    return _PAGE.format(
        css=_CSS,
        title=escape(_visible(shown.title)),
        summary=escape(_summary(shown)),
        prompt_end=_PROMPT_END if _shows_prompt_end(shown) else "",
        note=f'<p class="note">{escape(note)}</p>' if note else "",
        text="".join(_text(shown, share_of_token)),
        head="".join(_heads(shown)),
        rows="\n".join(_row(shown, row) for row in _deepest_first(shown)),
    )


def _last_of_prompt(shown: TokenMap, token: int) -> bool:
    return token + 1 == shown.prompt_tokens and _shows_prompt_end(shown)


def _text(shown: TokenMap, shares: np.ndarray[Any, Any]) -> Iterator[str]:
    for index, token in enumerate(shown.tokens[:SHOWN_TOKENS]):
        hover = f"token {index + 1}: {shares[index]:.0%} of the routed layers ran"
        breaks = "\n" * token.count("\n")
        yield (
            f'<span style="--share:{shares[index]:.3f}" title="{hover}">'
            f"{escape(_visible(token))}</span>{breaks}"
        )
        if _last_of_prompt(shown, index):
            yield '<b title="the prompt ends here"></b>'


def _heads(shown: TokenMap) -> Iterator[str]:
    for index, token in enumerate(shown.tokens[:SHOWN_TOKENS]):
        end = ' class="end"' if _last_of_prompt(shown, index) else ""
        hover = escape(f"token {index + 1}: '{_visible(token)}'")
        yield f'<th{end} title="{hover}"><span>{escape(_label(token))}</span></th>'


def _row(shown: TokenMap, row: int) -> str:
    layer, ran = shown.layers[row], shown.ran[row]
    cells = [f'<th class="layer">{layer}</th><td class="share">{ran.mean():.0%}</td>']
    for index, token in enumerate(shown.tokens[:SHOWN_TOKENS]):
        state = "ran" if ran[index] else "skipped"
        end = " end" if _last_of_prompt(shown, index) else ""
        hover = escape(f"layer {layer}, token '{_visible(token)}': {state}")
        cells.append(f'<td class="{state}{end}" title="{hover}"></td>')
    return f"<tr>{''.join(cells)}</tr>"


_CSS = """\
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --faint: #5d6670;
  --line: #d5dae0; --ran: #2b6ca3; --skipped: #f3d7a4; --end: #c8102e; --tint: 43, 108, 163; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --ink: #e8ebee; --faint: #9aa5b1; --line: #38414b;
    --ran: #5aa2dd; --skipped: #594421; --end: #ff6b7f; --tint: 90, 162, 221; } }
body { margin: 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .3rem; font-size: 1.25rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; }
.note, .legend { color: var(--faint); }
.legend i { display: inline-block; width: 1em; height: 1em; margin: 0 .35em 0 1em;
  vertical-align: -.12em; border-radius: 2px; }
.legend i:first-child { margin-left: 0; }
.legend i.line { width: 3px; background: var(--end); }
.legend i.shades { width: 6em;
  background: linear-gradient(90deg, rgba(var(--tint), 0), rgba(var(--tint), .6));
  outline: 1px solid var(--line); }
.text { margin: 1rem 0; padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 6px;
  font: 14px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 22rem; overflow-y: auto; }
.text span { background: rgba(var(--tint), calc(var(--share) * .6)); padding: .15em 0;
  border-radius: 2px; box-shadow: inset -1px 0 var(--page); }
.text b { border-left: 3px solid var(--end); margin: 0 2px; padding: .15em 0; }
.scroll { overflow: auto; max-height: 92vh; padding-bottom: .7rem; }
table { border-spacing: 1px; font-size: 12px; font-variant-numeric: tabular-nums; }
th { font-weight: normal; }
thead th { vertical-align: bottom; padding: 0 0 3px; position: sticky; top: 0; z-index: 2;
  background: var(--page); }
thead span { writing-mode: vertical-rl; text-orientation: sideways; transform: rotate(180deg);
  font: 11px/16px ui-monospace, monospace; white-space: pre; display: inline-block; }
tbody td.ran, tbody td.skipped { min-width: 16px; height: 16px; padding: 0; border-radius: 2px; }
.ran { background: var(--ran); }
.skipped { background: var(--skipped); }
td.end, th.end { border-right: 3px solid var(--end); }
.layer, .share { position: sticky; background: var(--page); text-align: right; padding: 0 .5em;
  min-width: 2.6em; max-width: 2.6em; z-index: 1; box-shadow: 0 0 0 2px var(--page); }
.layer { left: 0; }
.share { left: calc(3.6em + 1px); color: var(--faint); }
thead .layer, thead .share { padding-bottom: 3px; z-index: 3; }
"""

_PROMPT_END = '<i class="line"></i>end of the prompt'

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<p class="legend"><i class="ran"></i>ran <i class="skipped"></i>skipped {prompt_end}
<i class="shades"></i>in the text: share of the routed layers that ran the token, 0 to 100%</p>
{note}
<div class="text">{text}</div>
<div class="scroll">
<table>
<thead><tr><th class="layer">layer</th><th class="share">ran</th>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</body>
</html>
"""
