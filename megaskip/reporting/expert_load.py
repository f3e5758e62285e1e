"""A picture of the load of a mixture's experts: tokens given to each, and tokens that it ran."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaskip.extras import extra

with extra("report"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

_BARS = 32
"""Most experts of which every one is named below the bars."""


def draw_expert_load(
    assigned: np.ndarray[Any, Any],
    ran: np.ndarray[Any, Any],
    layers: Sequence[int],
    path: Path,
    *,
    title: str,
) -> None:
    """Draw tokens by layer and expert, [R layers, E experts], and write the picture to `path`.

    On top the load of each expert over the mean load assigned in its layer, as assigned and as run,
    with one scale; below the same for the layer with the busiest expert.
    """
    mean = np.maximum(assigned.mean(axis=1, keepdims=True), 1e-9)
    before, after = assigned / mean, ran / mean
    experts = assigned.shape[1]
    width = min(max(8.0, 0.3 * experts), 20.0)
    figure = Figure(figsize=(width, 3.4 + 0.28 * len(layers)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[max(0.28 * len(layers), 1.2), 2.0])
    left = figure.add_subplot(grid[0, 0])
    panels = [(left, before, "assigned"), (figure.add_subplot(grid[0, 1]), after, "ran")]
    for axes, shown, name in panels:
        drawn = axes.imshow(
            shown,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            vmin=0,
            vmax=float(before.max()),
            cmap="viridis",
        )
        axes.set_title(f"{name}: {shown.mean():.2f} of the mean load")
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_xlabel("expert")
    left.set_ylabel("layer")
    figure.colorbar(drawn, ax=[axes for axes, _, _ in panels], label="load / mean load assigned")
    bars = figure.add_subplot(grid[1, :])
    places = np.arange(experts)
    busiest = int(before.max(axis=1).argmax())
    bars.bar(places, before[busiest], color="#f3d7a4", label="assigned")
    bars.bar(places, after[busiest], color="#2b6ca3", width=0.5, label="ran")
    bars.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    bars.set(xlabel="expert", ylabel=f"load in layer {layers[busiest]}", xlim=(-0.6, experts - 0.4))
    if experts <= _BARS:
        bars.set_xticks(places)
    bars.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    figure.suptitle(title)
    figure.savefig(path)
