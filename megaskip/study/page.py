"""The page of a comparison: all its figures and tables in one HTML file that needs nothing else.

Knows points, not models.
"""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape

from megaskip.extras import extra
from megaskip.measures.paired import Difference
from megaskip.study.pareto import (
    HEADER,
    Contrast,
    Point,
    TaskResult,
    interval,
    layers_figure,
    loss_axes,
    table_rows,
)
from megaskip.study.training_costs import COST_HEADER, TrainingCost

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1500px;padding:0 1em;"
    "color:#222}h1{font-size:1.5em}h2{font-size:1.15em;margin:1.8em 0 .4em}"
    "figure{display:inline-block;margin:0 1em 1em 0;vertical-align:top}"
    "img{max-width:100%;max-height:640px}figcaption{max-width:36em;color:#555}div{overflow-x:auto}"
    "table{border-collapse:collapse;white-space:nowrap}"
    "td,th{padding:3px 9px;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}"
)

_TASK_NOTE = (
    "<p>acc: the right option has the highest log-likelihood; acc_norm: the highest log-likelihood "
    "over its characters; as in lm-eval, without examples in the prompt.</p>"
)

_COST_NOTE = (
    "<p>FLOPs: of the fit, and of the first training step times their number. Ratios are to "
    "dense_adapted of this comparison (LoRA of as many parameters, as many steps), fit included. "
    "Seconds are those of trainings beside each other where several ran at a time.</p>"
)

Value = Callable[[Point], float | None]


def page(
    points: Sequence[Point],
    contrasts: Sequence[Contrast],
    left_out: Sequence[str],
    costs: Sequence[TrainingCost] = (),
    *,
    title: str,
    settings: Sequence[tuple[str, str]],
) -> str:
    """Return the page; `settings` are (name, value) of what was compared, in their order."""
    figures = "".join(_figure(figure, caption) for figure, caption in _figures(points))
    differences = [_contrast_row(contrast) for contrast in contrasts]
    sections = [
        f"<h1>{escape(title)}</h1>",
        "<p>Points are means over seeds; bars and brackets are 95 % intervals, paired with the "
        "dense model by document or by pair.</p>",
        figures,
        "<h2>All points</h2>" + _table(HEADER, table_rows(points)),
    ]
    if domains := _domain_rows(points):
        header = ("method", "skipped", *_domains(points))
        sections.append("<h2>Loss over dense by source of the text</h2>" + _table(header, domains))
    if tasks := _task_rows(points):
        header = (
            "method",
            "skipped",
            "task",
            "questions",
            "acc",
            "to dense",
            "acc_norm",
            "to dense",
        )
        sections.append("<h2>Questions by task</h2>" + _TASK_NOTE + _table(header, tasks))
    if differences:
        header = ("difference, at equal skip", "skip", "loss", "pairs", "choice acc_norm", "exact")
        sections.append("<h2>Paired differences</h2>" + _table(header, differences))
    if costs:
        rows = [cost.row() for cost in costs]
        sections.append("<h2>What it takes to make</h2>" + _COST_NOTE + _table(COST_HEADER, rows))
    if left_out:
        items = "".join(f"<li>{escape(why)}</li>" for why in left_out)
        sections.append(f"<h2>Left out</h2><ul>{items}</ul>")
    sections.append("<h2>Settings</h2>" + _table(("setting", "value"), settings))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>{''.join(sections)}</html>\n"
    )


# -- figures


def _figures(points: Sequence[Point]) -> list[tuple[Figure, str]]:
    """Return (figure, caption) of everything that was measured."""
    figures = [_loss_figure(points, lambda point: 100 * (1 - point.flops), "FLOPs saved, %")]
    if any(point.kv < 1 for point in points):
        saved = "bytes of keys and values saved, %"
        figures.append(_loss_figure(points, lambda point: 100 * (1 - point.kv), saved))
    if any(point.latency is not None for point in points):
        figures.append(_loss_figure(points, _time_saved, "prefill time saved (measured), %"))
    captioned = [(figure, "Loss over the dense model's: lower is better.") for figure in figures]
    if len(_domains(points)) > 1:
        captioned.append((_domain_figure(points), "The same by source of the text."))
    if any(point.pairs is not None for point in points):
        figure = _skip_figure(points, _pairs_gap, "minimal pairs over dense, points")
        captioned.append((figure, "Minimal pairs (BLiMP): the likelier sentence is the good one."))
    if any(point.choice is not None for point in points):
        figure = _skip_figure(points, _choice_gap, "multiple choice over dense, points of acc_norm")
        captioned.append((figure, "Multiple choice: mean of the tasks' acc_norm."))
    if any(point.same is not None for point in points):
        figure = _skip_figure(points, _same, "greedy tokens as the dense model's, %")
        caption = "Generation, which multiple choice hides: tokens that the dense model writes."
        captioned.append((figure, caption))
    if any(point.skipped > 0 for point in points):
        captioned.append((layers_figure(points, title=""), "What each method skips, by layer."))
    return captioned


def _time_saved(point: Point) -> float | None:
    return None if point.latency is None else 100 * (1 - point.latency)


def _pairs_gap(point: Point) -> Difference | None:
    return _in_points(point.pairs_gap)


def _choice_gap(point: Point) -> Difference | None:
    return _in_points(point.choice_gap)


def _in_points(gap: Difference | None) -> Difference | None:
    if gap is None:
        return None
    return Difference(value=100 * gap.value, low=100 * gap.low, high=100 * gap.high)


def _same(point: Point) -> Difference | None:
    if point.same is None:
        return None
    return Difference(value=100 * point.same, low=100 * point.same, high=100 * point.same)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    return figure, figure.subplots()


def _loss_figure(points: Sequence[Point], spent: Value, label: str) -> Figure:
    figure, axes = _axes()
    known = [(point, x) for point in points if (x := spent(point)) is not None]
    loss_axes(axes, [point for point, _ in known], [x for _, x in known])
    axes.set(xlabel=label, ylabel="loss over dense, nats a token")
    axes.legend()
    return figure


def _skip_figure(
    points: Sequence[Point], measured: Callable[[Point], Difference | None], label: str
) -> Figure:
    figure, axes = _axes()
    known = [(point, gap) for point in points if (gap := measured(point)) is not None]
    for method in dict.fromkeys(point.method for point, _ in known):
        mine = [(100 * point.skipped, gap) for point, gap in known if point.method == method]
        _bars(axes, [x for x, _ in mine], [gap for _, gap in mine], method)
    axes.grid(alpha=0.3)
    axes.set(xlabel="skipped, %", ylabel=label)
    axes.legend()
    return figure


def _domain_figure(points: Sequence[Point]) -> Figure:
    figure, axes = _axes()
    shown = [point for point in points if point.skipped > 0]
    for position, domain in enumerate(_domains(points)):
        at = [row + 0.8 * position / len(_domains(points)) for row in range(len(shown))]
        _bars(axes, at, [point.domains[domain] for point in shown], domain, line="none")
    names = [f"{point.method} {point.skipped:.1%}" for point in shown]
    axes.set_xticks(range(len(shown)), names, rotation=40, ha="right", fontsize=8)
    axes.grid(alpha=0.3)
    axes.set(ylabel="loss over dense, nats a token")
    axes.legend()
    return figure


def _bars(
    axes: Axes, at: Sequence[float], gaps: Sequence[Difference], label: str, line: str = "-"
) -> None:
    values = [gap.value for gap in gaps]
    errors = [[gap.value - gap.low for gap in gaps], [gap.high - gap.value for gap in gaps]]
    axes.errorbar(at, values, yerr=errors, marker="o", capsize=3, label=label, linestyle=line)


def _figure(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    drawn = base64.b64encode(buffer.getvalue()).decode("ascii")
    image = f'<img src="data:image/svg+xml;base64,{drawn}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


# -- tables


def _domains(points: Sequence[Point]) -> list[str]:
    return sorted({domain for point in points for domain in point.domains})


def _domain_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    domains = _domains(points)
    return [
        (
            point.method,
            f"{point.skipped:.1%}",
            *(interval(point.domains[domain], "+.4f") for domain in domains),
        )
        for point in points
        if point.asked > 0 and len(domains) > 1
    ]


def _task_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    return [
        (point.method, f"{point.skipped:.1%}", task, *_accuracies(result))
        for point in points
        for task, result in point.tasks.items()
    ]


def _accuracies(result: TaskResult) -> tuple[str, ...]:
    return (
        str(result.questions),
        f"{result.acc:.2%}",
        interval(result.acc_gap, "+.2%"),
        f"{result.acc_norm:.2%}",
        interval(result.acc_norm_gap, "+.2%"),
    )


def _contrast_row(contrast: Contrast) -> tuple[str, ...]:
    return (
        f"{contrast.method} - {contrast.against}",
        f"{contrast.skip:.1%}",
        interval(contrast.loss, "+.4f"),
        interval(contrast.pairs, "+.2%"),
        interval(contrast.choice, "+.2%"),
        interval(contrast.exact, "+.2%"),
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div><table><tr>{head}</tr>{body}</table></div>"
