"""The figures of a report as tables in Markdown. Pure: rows in, text out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaskip.bench.setup import Row
from megaskip.bench.shapes import SHAPES
from megaskip.bench.variants import MAP

GIB = 2**30
METHODS = {"routers": "router-tuning", "lora": "LoRA", "full": "full"}
MEMORY_KINDS = {
    "backbone": "frozen weights",
    "trained": "trained weights",
    "gradients": "gradients",
    "moments": "optimizer",
    "activations": "activations, temporaries",
}
NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its title, and what it shows of a row."""

    title: str
    cell: Callable[[Row], str]


def markdown_table(columns: Sequence[Column], rows: Iterable[Row]) -> str:
    """Return rows as a Markdown table."""
    lines = [[column.title for column in columns], ["---"] * len(columns)]
    lines += [[column.cell(row) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def number(name: str, form: str) -> Callable[[Row], str]:
    """Return what shows the number `name` of a row."""

    def cell(row: Row) -> str:
        value = row.get(name)
        return NOTHING if value is None else format(value, form)

    return cell


def gib(name: str) -> Callable[[Row], str]:
    """Return what shows the bytes `name` of a row in GiB."""

    def cell(row: Row) -> str:
        size = row[name] / GIB
        return format(size, ".2f" if size >= 1 else ".3f")

    return cell


def with_error(name: str, error: str) -> Callable[[Row], str]:
    """Return what shows a number with its standard error, if there is one."""

    def cell(row: Row) -> str:
        if row.get(name) is None:
            return NOTHING
        spread = row.get(error)
        is_exact = spread in (None, 0.0)  # a single pair, or the base beside itself
        return f"{row[name]:.2f}" + ("" if is_exact else f" +- {spread:.2f}")

    return cell


def train_table(rows: Sequence[Row]) -> str:
    """Return the table of training steps; `/ router-tuning` compares the same rows of text."""
    base = {_text_of(r): r for r in rows if r["method"] == "routers" and "ms" in r}

    def relative(row: Row) -> str:
        own = base.get(_text_of(row))
        if own is None or own is row or "ms" not in row:
            return NOTHING if own is not row else "1.00"
        ratio = {"value": row["ms"] / own["ms"]}
        errors = [other["ms_error"] for other in (row, own)]
        if None not in errors:
            parts = [other["ms_error"] / other["ms"] for other in (row, own)]
            ratio["error"] = ratio["value"] * math.hypot(*parts)
        return with_error("value", "error")(ratio)

    columns = [
        Column("model", _model),
        Column("method", lambda row: METHODS[row["method"]]),
        Column("rows x tokens", lambda row: row["case"]),
        Column("ms/step", lambda row: row.get("failure") or f"{row['ms']:.1f}"),
        Column("tokens/s", number("tokens_per_second", ",.0f")),
        Column("time / router-tuning", relative),
        Column("tokens/s / first case", with_error("speedup", "error")),
        Column("MFU", number("mfu", ".2f")),
        Column("launches", number("launches", ",.0f")),
        Column("waits", number("waits", ",.0f")),
        Column("peak GiB", gib("peak_bytes")),
    ]
    return markdown_table(columns, rows)


def stack_table(rows: Sequence[Row]) -> str:
    """Return the table of what whole models would take, by a line through two depths."""
    columns = [
        Column("model", lambda row: row["shape"]),
        Column("method", lambda row: METHODS[row["method"]]),
        Column("rows x tokens", lambda row: row["case"]),
        Column("measured layers", lambda row: " and ".join(map(str, row["measured_layers"]))),
        Column("ms a layer", number("ms_a_layer", ".2f")),
        Column("layers", number("layers", ".0f")),
        Column("tokens/s a device, extrapolated", number("extrapolated_tokens_per_second", ",.0f")),
    ]
    return markdown_table(columns, rows)


def memory_table(rows: Sequence[Row]) -> str:
    """Return the table of a step's peak memory by kind, GiB."""

    def kind(name: str) -> Callable[[Row], str]:
        return lambda row: gib(name)(row["memory"])

    columns = [
        Column("model", _model),
        Column("method", lambda row: METHODS[row["method"]]),
        Column("rows x tokens", lambda row: row["case"]),
        *(Column(title, kind(name)) for name, title in MEMORY_KINDS.items()),
        Column("sum", gib("peak_bytes")),
    ]
    return markdown_table(columns, [row for row in rows if "memory" in row])


def serve_table(rows: Sequence[Row]) -> str:
    """Return the table of prefill and decode."""
    columns = [
        *_serve_columns(),
        Column("prefill ms", lambda row: row.get("failure") or f"{row['prefill_ms']:.1f}"),
        Column("x dense", with_error("prefill_speedup", "prefill_error")),
        Column("ideal", number("prefill_ideal", ".2f")),
        Column("MFU", number("prefill_mfu", ".2f")),
        Column("decode ms/step", number("decode_ms", ".2f")),
        Column("tokens/s", number("decode_tokens_per_second", ",.0f")),
        Column("x dense", with_error("decode_speedup", "decode_error")),
        Column("ideal", number("decode_ideal", ".2f")),
        Column("of bandwidth", number("decode_bandwidth_share", ".2f")),
        Column("first 3 steps ms", number("decode_start_ms", ".0f")),
        Column("pairs", number("pairs", ".0f")),
    ]
    return markdown_table(columns, rows)


def call_table(rows: Sequence[Row]) -> str:
    """Return the table of launches, waits and memory of prefill and of a decode step."""
    columns = [
        *_serve_columns(),
        Column("prefill: operators", number("prefill_operators", ",.0f")),
        Column("launches", number("prefill_launches", ",.0f")),
        Column("waits", number("prefill_waits", ",.0f")),
        Column("busy ms", number("prefill_busy_ms", ".1f")),
        Column("decode step: operators", number("decode_operators", ",.0f")),
        Column("launches", number("decode_launches", ",.0f")),
        Column("waits", number("decode_waits", ",.0f")),
        Column("busy ms", number("decode_busy_ms", ".2f")),
        Column("weights GiB", gib("weight_bytes")),
        Column("KV GiB", gib("kv_bytes")),
        Column("peak beyond weights GiB", gib("peak_bytes")),
    ]
    return markdown_table(columns, [row for row in rows if "kv_bytes" in row])


def sanity_table(rows: Sequence[Row]) -> str:
    """Return the table of checks."""
    columns = [
        Column("check", lambda row: row["check"]),
        Column("passed", lambda row: "yes" if row["passed"] else "**no**"),
        Column("measured", number("measured", ".3g")),
        Column("allowed", number("allowed", ".3g")),
        Column("what", lambda row: row["unit"]),
    ]
    return markdown_table(columns, rows)


def variant_name(row: Mapping[str, Any]) -> str:
    """Return what a variant of prefill and decode does, in words."""
    if row["variant"] == "dense":
        return "dense"
    target = row["granularity"].split("_")[0]
    name = row["variant"].replace(MAP, " with maps")
    if name.startswith("dropped"):
        return f"{target} {name}"
    kept = {0.0: "all skipped", 1.0: "everything runs"}
    share = kept.get(row["kept"], f"{row['kept']:.0%} kept")
    return f"{target} {name}, {share}"


def _text_of(row: Row) -> tuple[Any, ...]:
    """Return what rows have in common whose methods are compared."""
    return row["shape"], row["layers"], row["case"]


def _serve_columns() -> list[Column]:
    return [
        Column("model", lambda row: row["shape"]),
        Column("rows", number("batch", ".0f")),
        Column("prompt", number("prompt", ".0f")),
        Column("variant", variant_name),
    ]


def _model(row: Row) -> str:
    whole = SHAPES[row["shape"]].layers
    return row["shape"] if row["layers"] == whole else f"{row['shape']}, {row['layers']} layers"
