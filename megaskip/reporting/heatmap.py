"""A picture of what a run learned to skip: capacity by layer and step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaskip.extras import extra

with extra("report"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure


def capacity_heatmap(
    shares: np.ndarray[Any, Any], layers: Sequence[int], steps: Sequence[int], path: Path
) -> np.ndarray[Any, Any]:
    """Draw shares [R layers, S steps] in [0, 1], write it to `path` and return it, uint8 [H, W,
    3]."""
    figure = Figure(figsize=(9, 1.6 + 0.28 * len(layers)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes, mean = figure.subplots(2, 1, sharex=True, height_ratios=[max(len(layers), 3), 2.5])
    extent = (steps[0] - 0.5, steps[-1] + 0.5, -0.5, len(layers) - 0.5)
    drawn = axes.imshow(
        shares,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=extent,
        vmin=0,
        vmax=1,
        cmap="viridis",
    )
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.set_title("share of units that run, by layer and step")
    figure.colorbar(drawn, ax=axes, label="capacity")
    mean.plot(steps, shares.mean(axis=0), color="tab:blue", linewidth=1)
    mean.set(xlabel="step", ylabel="mean", ylim=(-0.02, 1.02))
    mean.grid(alpha=0.3)
    figure.savefig(path)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
