"""The table and the figure of a comparison: quality against what is spent. Knows points, not
models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megaskip.extras import extra
from megaskip.measures.paired import Difference
from megaskip.reporting.summary import or_dash

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

_LINEAR = 0.002
"""Nats up to which the figure's loss axis is linear; it is logarithmic from there on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The accuracy of one task of questions; gaps are to the dense model, paired by question."""

    questions: int
    acc: float
    """The right option has the highest log-likelihood, as lm-eval's acc."""
    acc_gap: Difference
    acc_norm: float
    """The right option has the highest log-likelihood over its characters: lm-eval's acc_norm."""
    acc_norm_gap: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One method at one share of all layers' attention (or MLPs, ...) that it skips, over its
    seeds."""

    method: str
    asked: float
    """Share that was to be skipped."""
    skipped: float
    """Share that was, on the held-out text."""
    seeds: int
    loss: float
    """Held out, nats a token."""
    loss_gap: Difference
    """To the dense model, paired by document."""
    pairs: float | None
    """Accuracy on minimal pairs, by log-likelihood."""
    pairs_gap: Difference | None
    choice: float | None
    """Mean over multiple-choice tasks of their acc_norm."""
    choice_gap: Difference | None
    exact: float
    """Share of held-out documents whose every supervised token greedy decoding would produce."""
    exact_gap: Difference
    """To the dense model, paired by document."""
    flops: float
    """Of a forward pass over the documents, over those of the dense model."""
    kv: float
    """Memory of keys and values of the documents, over that of the dense model."""
    latency: float | None
    """Of a prefill, measured, over that of the dense model; None where it was not."""
    skipped_by_layer: Mapping[int, float]
    """Share of the units that each routed layer skips."""
    domains: Mapping[str, Difference] = field(default_factory=dict)
    """Loss over the dense model's by source of the documents."""
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    """Of every task of questions, minimal pairs included."""
    same: float | None = None
    """Share of the dense model's greedy tokens that are the most likely ones here."""
    likelihood: float | None = None
    """Mean log-likelihood that the dense model gives to greedy continuations, nats a token."""
    train_seconds: float | None = None
    """Of a training, on average over seeds; None for what is not trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """One method minus another at the same skip, paired by document."""

    method: str
    against: str
    skip: float
    loss: Difference
    pairs: Difference | None
    choice: Difference | None
    exact: Difference

    def __str__(self) -> str:
        """Return a line of text."""
        parts = [f"loss {interval(self.loss, '+.4f')}", f"exact {interval(self.exact, '+.2%')}"]
        if self.pairs is not None:
            parts.append(f"pairs {interval(self.pairs, '+.2%')}")
        if self.choice is not None:
            parts.append(f"choice {interval(self.choice, '+.2%')}")
        return f"{self.method} - {self.against} at {self.skip:.1%}: " + ", ".join(parts)


HEADER = (
    "method",
    "asked",
    "skipped",
    "loss",
    "to dense",
    "pairs",
    "to dense",
    "choice acc_norm",
    "to dense",
    "exact",
    "to dense",
    "FLOPs x",
    "KV x",
    "prefill x",
    "same tokens",
    "dense ll",
    "training s",
)


def table_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Return the comparison as rows of text, below HEADER."""
    return [
        (
            f"{point.method} ({point.seeds})" if point.seeds > 1 else point.method,
            f"{point.asked:.1%}",
            f"{point.skipped:.1%}",
            f"{point.loss:.4f}",
            interval(point.loss_gap, "+.4f"),
            or_dash(point.pairs, ".2%"),
            interval(point.pairs_gap, "+.2%"),
            or_dash(point.choice, ".2%"),
            interval(point.choice_gap, "+.2%"),
            f"{point.exact:.2%}",
            interval(point.exact_gap, "+.2%"),
            f"{point.flops:.3f}",
            f"{point.kv:.3f}",
            or_dash(point.latency, ".3f"),
            or_dash(point.same, ".1%"),
            or_dash(point.likelihood, ".3f"),
            or_dash(point.train_seconds, ".0f"),
        )
        for point in points
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def draw(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Write the figure to `path` (PNG): loss over FLOPs, and over prefill time."""
    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    loss_axes(left, points, [point.flops for point in points])
    timed = [(point, point.latency) for point in points if point.latency is not None]
    loss_axes(right, [point for point, _ in timed], [latency for _, latency in timed])
    left.set(
        xlabel="FLOPs, of the dense model's", ylabel="loss over the dense model's, nats a token"
    )
    right.set(xlabel="prefill time, of the dense model's (measured)")
    left.legend()
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(str(path))


def draw_layers(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Write a heat map to `path`: what each method skips, by layer."""
    FigureCanvasAgg(layers_figure(points, title=title)).print_png(str(path))


def layers_figure(points: Sequence[Point], *, title: str) -> Figure:
    """Return a heat map of what each method skips, by layer."""
    shown = [point for point in points if point.skipped > 0]
    layers = sorted({layer for point in shown for layer in point.skipped_by_layer})
    shares = [[point.skipped_by_layer[layer] for point in shown] for layer in layers]
    size = (2.5 + 0.42 * len(shown), 1.9 + 0.28 * len(layers))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="magma_r")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    names = [f"{point.method} {point.asked:.1%}" for point in shown]
    axes.set_xticks(range(len(shown)), names, rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="layer", title=title)
    figure.colorbar(drawn, ax=axes, label="share of units that skip it")
    return figure


def loss_axes(axes: Axes, points: Sequence[Point], spent: Sequence[float]) -> None:
    """Draw the loss over the dense model's of each method, with intervals, over what is `spent`."""
    for method in dict.fromkeys(point.method for point in points):
        mine = [(x, p) for x, p in zip(spent, points, strict=True) if p.method == method]
        gaps = [p.loss_gap for _, p in mine]
        low = [gap.value - gap.low for gap in gaps]
        high = [gap.high - gap.value for gap in gaps]
        places = ([x for x, _ in mine], [gap.value for gap in gaps])
        axes.errorbar(*places, yerr=[low, high], marker="o", capsize=3, label=method)
    # Methods that lose little would lie on each other beside one that loses much.
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.grid(alpha=0.3)


def interval(gap: Difference | None, form: str) -> str:
    """Return a difference with its interval for a table, and "-" for one that is not known."""
    if gap is None:
        return "-"
    return f"{gap.value:{form}} [{gap.low:{form}}, {gap.high:{form}}]"
