"""The job of `megaskip export-static`: measure the capacity of each layer, choose, export."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaskip.arch.trainable import describe_layers
from megaskip.checkpoint.adapters import has_adapter, read_adapter
from megaskip.checkpoint.base import describe_folder
from megaskip.checkpoint.hub import require_hub
from megaskip.checkpoint.routers import read_router_config
from megaskip.config import RouterConfig, resolve_layers
from megaskip.config.commands.export_static import ExportStaticOptions
from megaskip.errors import ConfigError
from megaskip.export.job import LOAD, print_pushed
from megaskip.export.static import choose_dropped, describe_dropped, sublayers
from megaskip.export.static_folder import (
    NO_MAPS_IN_DECILM,
    StaticExport,
    export_static,
    require_exportable,
    verify_static,
)
from megaskip.export.static_maps import StaticMaps, read_static_maps
from megaskip.export.static_measure import TextMeasure
from megaskip.export.verify import Verified
from megaskip.log import get_logger, quiet_libraries
from megaskip.progress import progress_bar
from megaskip.reporting.summary import human_bytes, table
from megaskip.routing.adapters import AdapterSet
from megaskip.runs.source import chosen_tokenizer, find_routers

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticOutcome:
    """A static export, and what it was chosen by."""

    done: StaticExport
    seconds: float
    """That writing took."""
    dropped: Mapping[str, Sequence[int]]
    """Layers, by attn or mlp."""
    capacity: Mapping[int, float]
    """Measured capacity by routed layer; not a number where it was not measured."""
    facts: Mapping[str, str]
    """Rows of the model card on what was measured and left out."""
    maps: StaticMaps | None = None
    """What stands in the place of what is dropped; None for nothing."""
    adapters: AdapterSet | None = None
    """What is merged into the weights that stay; None for nothing."""
    verified: Verified | None = None
    """The comparison with the base whose sublayers are off; None where it was not asked for."""

    def require_verified(self) -> None:
        """Raise CheckpointError when the comparison found other logits."""
        if self.verified is not None:
            of_base = "those of the base with the same sublayers forced off"
            self.verified.require(self.done.folder, of_base)


def export_without_dropped(options: ExportStaticOptions) -> None:
    """Measure, choose, export and print what was done; raises CheckpointError when --verify finds
    other logits."""
    quiet_libraries()
    require_hub(options.hub)
    with progress_bar(unit="B", unit_scale=True, desc="base weights") as bar:
        outcome = drop_and_export(options, progress=bar.update)
    rows = _summary(outcome)
    if (verified := outcome.verified) is not None:
        difference = f"differ by at most {verified.difference:.1e} over {verified.tokens} tokens"
        rows.append(("verified", f"fresh process, fp32, against the forced base: {difference}"))
    if options.format == "hf":
        rows.append(("load", LOAD))
        rows.append(("next", f"megaskip generate --model {outcome.done.folder}"))
    print("\n".join(table(rows, title=f"exported: {outcome.done.folder}")))
    outcome.require_verified()
    print_pushed(outcome.done.folder, options.hub)


def drop_and_export(
    options: ExportStaticOptions, progress: Callable[[int], object] = lambda size: None
) -> StaticOutcome:
    """Measure the capacity of each layer, choose what is dropped, and write the folder.

    `progress` is told the bytes of each file that is done. Raises CheckpointError, ConfigError,
    DataError or UnsupportedModelError.
    """
    routers = find_routers(options.source)
    base = routers.base
    config, routed, described = read_router_config(routers.folder)
    if described is not None:
        described.require(describe_folder(base), "the router folder")
    if config.routes_experts:
        raise ConfigError(
            f"{routers.folder} skips experts by token (expert_token), which leaves no sublayer to "
            "drop for good; megaskip convert writes the routed model"
        )
    adapters = _adapter_to_merge(options, routers.folder)
    tokenizer = chosen_tokenizer(
        options.tokenizer, options.source, base, template=options.chat_template
    )
    exportable = require_exportable(base, options.output, options.format)
    has_maps = config.compensation != "none"
    if has_maps and options.format == "decilm" and not options.without_compensation:
        raise ConfigError(NO_MAPS_IN_DECILM)
    measure = TextMeasure(options, routers, exportable.source)
    depth = exportable.source.text_config.num_hidden_layers
    layers, capacity, text = _choose(options, config, routed, measure, depth)
    dropped = sublayers(config.target, layers)
    facts, maps = {"capacity per layer": _capacity_text(capacity, ()), "measured on": text}, None
    if has_maps and options.without_compensation:
        facts["compensation"] = _left_out(measure, layers)
    elif has_maps:
        hidden_size = describe_folder(base).hidden_size
        maps = read_static_maps(routers.folder, config, routed, hidden_size, layers)
    begun = time.monotonic()
    done = export_static(
        exportable,
        options.output,
        dropped,
        maps=maps,
        adapters=adapters,
        name=described.name if described is not None else "",
        tokenizer=tokenizer,
        facts=facts,
        progress=progress,
    )
    seconds = time.monotonic() - begun
    verified = None
    if options.verify:
        verified = verify_static(done.folder, base, config.target, layers, maps, adapters)
    return StaticOutcome(
        done=done,
        seconds=seconds,
        dropped=dropped,
        capacity=capacity,
        facts=facts,
        maps=maps,
        adapters=adapters,
        verified=verified,
    )


def _adapter_to_merge(options: ExportStaticOptions, routers: Path) -> AdapterSet | None:
    """Return the adapter that --merge adds to the weights; raises ConfigError where there is one
    without --merge, or none with it."""
    if has_adapter(routers) == options.merge:
        return read_adapter(routers)
    if options.merge:
        raise ConfigError(f"--merge: {routers} has no adapter; leave it out")
    raise ConfigError(
        f"{routers} has a LoRA adapter, without which it is another model; --merge adds it to the "
        "weights that stay"
    )


def _choose(
    options: ExportStaticOptions,
    config: RouterConfig,
    routed: tuple[int, ...],
    measure: TextMeasure,
    depth: int,
) -> tuple[tuple[int, ...], dict[int, float], str]:
    """Return (layers to drop, capacity by routed layer, the text it was measured on)."""
    if config.budget == "static":
        ways = {"--below": options.below, "--count": options.count, "--layers": options.layers}
        given = [flag for flag, value in ways.items() if value is not None]
        if given:
            raise ConfigError(
                f"{given[0]} chooses among layers that sometimes run, and these routers were "
                f"trained with --budget static: none of their layers {describe_layers(routed)} "
                "ever runs, and all are dropped; leave it out"
            )
        return routed, dict.fromkeys(routed, 0.0), "not measured: --budget static runs none"
    listed = _listed_layers(options.layers, depth)
    unmeasured = dict.fromkeys(routed, math.nan)
    if listed is not None or options.below is options.count is None:
        choose_dropped(unmeasured, below=options.below, count=options.count, layers=listed)
    is_measured = listed is None or bool(options.text.data)
    capacity, text = measure.capacity() if is_measured else (unmeasured, "not measured")
    layers = choose_dropped(capacity, below=options.below, count=options.count, layers=listed)
    return layers, capacity, text


def _listed_layers(text: str | None, depth: int) -> tuple[int, ...] | None:
    """Return the layers of --layers; a single number is that layer."""
    if text is None:
        return None
    # A comma makes a list of a number, which alone would be a count.
    return resolve_layers(f"{text},", depth)


def _left_out(measure: TextMeasure, layers: Collection[int]) -> str:
    """Warn that the compensations are left out, and return what that costs, measured where there is
    a text."""
    if not measure.has_text:
        cost = "left out; what that costs is not measured (give --data)"
    else:
        compensated, plain, text = measure.losses(layers)
        cost = (
            f"left out: loss {plain:.4f}, with it {compensated:.4f} ({plain - compensated:+.4f} "
            f"nats), {text}"
        )
    logger.warning("--without_compensation: what stands in the place of dropped sublayers %s", cost)
    return cost


def _summary(outcome: StaticOutcome) -> list[tuple[str, str]]:
    """Return the rows of the closing table."""
    done, facts = outcome.done, dict(outcome.facts)
    gone = {layer for layers in outcome.dropped.values() for layer in layers}
    maps = outcome.maps
    instead = (
        [] if maps is None else [("in their place", f"a compensation each, {maps.describe()}")]
    )
    facts["capacity per layer"] = _capacity_text(outcome.capacity, gone)
    adapters = outcome.adapters
    in_weights = [] if adapters is None else [("merged into the rest", adapters.describe())]
    return [
        ("dropped", describe_dropped(outcome.dropped)),
        *instead,
        *in_weights,
        *facts.items(),
        ("dropped weights", human_bytes(done.removed)),
        ("written", f"{human_bytes(done.written)} in {outcome.seconds:.2f} s"),
        ("shared with the base", "; ".join([human_bytes(done.linked), *done.notes])),
    ]


def _capacity_text(capacity: Mapping[int, float], gone: Collection[int]) -> str:
    """Return capacity by layer in one line, with a mark at those that are dropped."""
    shares = {layer: "-" if math.isnan(c) else f"{c:.3f}" for layer, c in capacity.items()}
    return "  ".join(f"{i}: {text}{' (gone)' if i in gone else ''}" for i, text in shares.items())
