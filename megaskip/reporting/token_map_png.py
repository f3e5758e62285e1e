"""A token map as a PNG, drawn with matplotlib."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megaskip.extras import extra
from megaskip.reporting.token_map import (
    SHOWN_TOKENS,
    TokenMap,
    cut_note,
    deepest_first,
    label,
    shows_prompt_end,
    summary,
    visible,
)

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.font_manager import findfont, get_font
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

PANEL_TOKENS = 80
RAN, SKIPPED, PROMPT_END = "#2b6ca3", "#f3d7a4", "#c8102e"
FONT = "DejaVu Sans Mono"  # Comes with matplotlib, so labels look alike everywhere.


def draw(shown: TokenMap, path: Path) -> None:
    """Write a token map as PNG, laid out in inches from the top: title, summary, legend, panels,
    note."""
    count = min(len(shown.tokens), SHOWN_TOKENS)
    columns = -(-count // -(-count // PANEL_TOKENS))
    cell = max(0.165, min(0.3, 5.6 / columns))
    left, right, body = 0.65, 0.85, _row_height(shown) * len(shown.layers)
    width = max(7.0, left + columns * cell + right)
    drawable = _drawable()
    labels = [label(token, drawable) for token in shown.tokens[:count]]
    panels = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    below = [0.2 + 0.062 * max(len(labels[token]) for token in panel) for panel in panels]
    head = _header_lines(shown, width, drawable)
    top = 0.4 + 0.19 * len(head)
    note = cut_note(shown)
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
    title = textwrap.wrap(visible(shown.title, drawable), int(width / 0.1))
    text = textwrap.wrap(summary(shown), int(width / 0.062))
    return [(line, 11.0) for line in title] + [(line, 8.5) for line in text]


def _legend(figure: Figure, shown: TokenMap, corner: tuple[float, float]) -> None:
    entries: list[Any] = [Patch(color=RAN, label="ran"), Patch(color=SKIPPED, label="skipped")]
    if shows_prompt_end(shown):
        text = f"end of the prompt ({shown.prompt_tokens} of {len(shown.tokens)} tokens)"
        entries.append(Line2D([], [], color=PROMPT_END, linewidth=2, label=text))
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
    rows = deepest_first(shown)[::-1]
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
    if shows_prompt_end(shown) and shown.prompt_tokens - 1 in panel:
        x = shown.prompt_tokens - panel.start
        axes.plot([x, x], [0, len(rows) + 0.3], color=PROMPT_END, linewidth=2, clip_on=False)
