"""The picture of a report: training speed, memory by kind, prefill and decode beside dense."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaskip.bench.setup import Row
from megaskip.bench.tables import GIB, MEMORY_KINDS, METHODS, variant_name
from megaskip.extras import extra

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

_METHOD_COLOURS = {"routers": "#1b6ca8", "lora": "#d98c21", "full": "#7a7a7a"}
_KIND_COLOURS = ("#c6d3de", "#7a7a7a", "#b5534b", "#d98c21", "#1b6ca8")
_MEASURED, _IDEAL = "#1b6ca8", "#c9dcea"


def draw(train: Sequence[Row], serve: Sequence[Row], title: str, path: Path) -> None:
    """Write the picture to `path` (PNG); a panel without figures says so."""
    figure = Figure(figsize=(14, 9.5), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2)
    measured = [row for row in train if "ms" in row]
    _training(axes[0][0], measured)
    _memory(axes[0][1], measured)
    smallest = _first_setting([row for row in serve if "pairs" in row])
    _against_dense(axes[1][0], smallest, "prefill")
    _against_dense(axes[1][1], smallest, "decode")
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(str(path))


def _training(axes: Axes, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(_setting(row) for row in rows))
    for index, (method, colour) in enumerate(_METHOD_COLOURS.items()):
        values = {_setting(r): r["tokens_per_second"] for r in rows if r["method"] == method}
        heights = [n + (index - 1) * 0.27 for n, name in enumerate(names) if name in values]
        lengths = [values[name] for name in names if name in values]
        axes.barh(heights, lengths, height=0.25, color=colour, label=METHODS[method])
        for height, length in zip(heights, lengths, strict=True):
            axes.text(length, height, f" {length:,.0f}", va="center", fontsize=6)
    _labelled(axes, names, "training, tokens/s (model, rows x tokens)")
    if names:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.12)
        axes.legend(fontsize=8)


def _memory(axes: Axes, rows: Sequence[Row]) -> None:
    shown = [row for row in rows if "padded" not in row["case"] and "packed" not in row["case"]]
    names = [f"{_setting(row)}, {METHODS[row['method']]}" for row in shown]
    left = [0.0] * len(shown)
    for (kind, label), colour in zip(MEMORY_KINDS.items(), _KIND_COLOURS, strict=True):
        sizes = [row["memory"][kind] / GIB for row in shown]
        axes.barh(range(len(shown)), sizes, left=left, color=colour, label=label)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    _labelled(axes, names, "peak memory of a training step, GiB")
    if names:
        axes.legend(fontsize=8)


def _against_dense(axes: Axes, rows: Sequence[Row], phase: str) -> None:
    rows = [row for row in rows if row["variant"] != "dense"]
    places = range(len(rows))
    ideal = [row[f"{phase}_ideal"] for row in rows]
    values = [row[f"{phase}_speedup"] for row in rows]
    errors = [row[f"{phase}_error"] or 0.0 for row in rows]
    axes.barh(places, ideal, color=_IDEAL, label="ideal")
    axes.barh(places, values, height=0.4, xerr=errors, color=_MEASURED, label="measured")
    about = ", ".join(f"{r['shape']}, batch {r['batch']}, prompt {r['prompt']}" for r in rows[:1])
    _labelled(axes, [variant_name(row) for row in rows], f"{phase}, times dense's speed ({about})")
    if rows:
        axes.axvline(1, color="black", linewidth=0.8)
        axes.legend(fontsize=8)


def _labelled(axes: Axes, names: Sequence[str], title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    if not names:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)


def _setting(row: Row) -> str:
    return f"{row['shape']}, {row['layers']} layers, {row['case']}"


def _first_setting(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the shape, batch and prompt that was measured first."""
    key: Any = None
    for row in rows:
        key = key or (row["shape"], row["batch"], row["prompt"])
    return [row for row in rows if (row["shape"], row["batch"], row["prompt"]) == key]
