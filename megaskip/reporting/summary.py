"""The header and the closing table of a run, as text and as report.json."""

import platform
import resource
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megaskip.routing.compensation import describe_compensation

_COLUMNS = 110
"""Width of tables."""


def versions() -> dict[str, str]:
    """Return the versions of what a run's numbers depend on."""
    numbers = {"python": platform.python_version()}
    for name in ("megaskip", "torch", "transformers", "deepspeed", "datasets", "safetensors"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            continue
    return numbers


def peak_memory_gib(device: torch.device) -> float:
    """Return this rank's peak memory so far: of the GPU, or resident on a CPU. GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def table(rows: Iterable[Sequence[str]], *, title: str) -> list[str]:
    """Return rows of (name, value) as aligned lines under a title; long values are wrapped."""
    rows = [tuple(row) for row in rows]
    width = max(len(row[0]) for row in rows)
    lines = []
    for name, value in rows:
        wrapped = textwrap.wrap(value, _COLUMNS - width - 2, break_long_words=False) or [""]
        lines.append(f"{name:<{width}}  {wrapped[0]}")
        lines += [f"{'':<{width}}  {more}" for more in wrapped[1:]]
    rule = "-" * _COLUMNS
    return [rule, title, rule, *lines, rule]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines whose cells stand in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def or_dash(value: float | None, form: str) -> str:
    """Return a number for a table, and "-" for one that is not known."""
    return "-" if value is None else format(value, form)


def human_bytes(count: float) -> str:
    """Return a number of bytes with a fitting unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def capacity_line(shares: Mapping[int, float]) -> str:
    """Return capacity by layer in one line."""
    return "  ".join(f"{layer}: {share:.2f}" for layer, share in shares.items())


def _training_capacity(report: Mapping[str, Any]) -> str:
    steps = f"{report['training_capacity']:.3f} in the last {report['window']} steps"
    calibrated = report["calibrated_capacity"]
    return steps if calibrated is None else f"{calibrated:.3f} calibrated, {steps}"


def _early_stop(ending: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return the row about --early_stop; none without it."""
    if ending is None:
        return []
    evaluations = f"{ending['patience']} evaluations without a lower held-out loss"
    text = f"after {evaluations}" if ending["stopped"] else f"not stopped: fewer than {evaluations}"
    if ending["best_step"] is None:
        return [("early stop", f"{text}; none ran as little as was asked for")]
    best = f"step {ending['best_step']} is kept (held-out loss {ending['best_loss']:.4f})"
    return [("early stop", f"{text}; {best}")]


def _by_position(spans: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield a row for each span of positions of the held-out rows."""
    for span in spans:
        dense, routed = span["loss_dense"], span["loss_routed"]
        losses = f"dense {dense:.4f}, routed {routed:.4f} ({routed - dense:+.4f})"
        name = f"  positions {span['first']} to {span['stop'] - 1}"
        yield name, f"{losses}, {span['tokens']:,} tokens"


def closing_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the closing table from the content of report.json."""
    held_out = report.get("held_out")
    rows = [
        ("steps", f"{report['steps']} ({report['tokens']:,} tokens, {report['seconds']:.0f} s)"),
        *_early_stop(report.get("early_stop")),
    ]
    if held_out and "loss_dense" in held_out:
        dense, routed = held_out["loss_dense"], held_out["loss_routed"]
        rows += [
            ("held-out loss, dense", f"{dense:.4f}"),
            ("held-out loss, routed", f"{routed:.4f} ({routed - dense:+.4f})"),
            ("asked capacity", f"{report['asked_capacity']:.3f}"),
            (
                "realised capacity, held out",
                f"{held_out['capacity']:.3f} (standard error "
                f"{held_out['capacity_standard_error']:.3f})",
            ),
            ("realised capacity, training", _training_capacity(report)),
            ("capacity per layer, held out", capacity_line(held_out["capacity_per_layer"])),
            *_by_position(held_out.get("by_position", ())),
        ]
    elif held_out:
        rows.append(("held-out loss", f"{held_out['loss']:.4f}"))
    elif report["calibrated_capacity"] is not None:
        rows += [
            ("asked capacity", f"{report['asked_capacity']:.3f}"),
            ("realised capacity, training", _training_capacity(report)),
        ]
    if maps := report.get("compensation"):
        text = describe_compensation(
            maps["kind"], maps.get("rank", 0), layers=maps["layers"], parameters=maps["parameters"]
        )
        rows.append(("compensation", text))
    rows += [
        ("optimizer state", report["optimizer"]),
        ("peak memory a rank", f"{report['peak_memory_gib']:.2f} GiB"),
    ]
    return rows + [(name, str(path)) for name, path in report["written"].items()]
