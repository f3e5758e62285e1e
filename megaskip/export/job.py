"""The jobs of `megaskip convert` and `megaskip import-routers`."""

import time
from collections.abc import Callable
from pathlib import Path

from megaskip.checkpoint.adapters import has_adapter
from megaskip.checkpoint.hub import push_to_hub, require_hub
from megaskip.config.commands.convert import ConvertOptions
from megaskip.config.commands.hub import HubTarget
from megaskip.config.commands.import_routers import ImportOptions
from megaskip.export.decisions import compare_with_4_bit
from megaskip.export.folder import Exported, export_folder
from megaskip.export.published import import_published
from megaskip.export.verify import verify_folder
from megaskip.log import quiet_libraries
from megaskip.progress import progress_bar
from megaskip.reporting.summary import human_bytes, table
from megaskip.runs.source import (
    TrainedRouters,
    chosen_tokenizer,
    find_routers,
    trained_base_dtype,
)

LOAD = "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
"""How a folder that brings its own code is loaded."""


def convert(options: ConvertOptions) -> None:
    """Write a Hugging Face folder and print what is in it; raises CheckpointError when --verify
    finds other logits."""
    quiet_libraries()
    routers = find_routers(options.source)
    require_hub(options.hub)
    begun = time.monotonic()
    with progress_bar(unit="B", unit_scale=True, desc="base weights") as bar:
        done = write_converted(options, routers, progress=bar.update)
    rows = _summary(done, time.monotonic() - begun)
    verified = None
    if options.verify:
        verified = verify_folder(done.folder, routers.base, routers.folder)
        difference = f"{verified.difference:.1e} over {verified.tokens} tokens"
        rows.append(("verified", f"fresh process, fp32: logits differ by at most {difference}"))
        if options.source.run is not None and trained_base_dtype(options.source.run) == "nf4":
            rows.append(("4 bit", str(compare_with_4_bit(routers.base, routers.folder))))
    if verified is None or verified.passed:
        rows.append(("next", f"megaskip generate --model {done.folder}"))
    print("\n".join(table(rows, title=f"exported: {done.folder}")))
    if verified is not None:
        verified.require(done.folder)
    print_pushed(done.folder, options.hub)


def print_pushed(folder: Path, target: HubTarget) -> None:
    """Send a folder to --push_to_hub, where it is given, and print its address there."""
    if (address := push_to_hub(folder, target)) is not None:
        print(f"on the hub: {address}")


def write_converted(
    options: ConvertOptions,
    routers: TrainedRouters,
    *,
    progress: Callable[[int], object] = lambda size: None,
) -> Exported:
    """Write `routers` as the folder that `options` describe; `progress` is told the bytes of each
    file that is done. Raises CheckpointError or ConfigError."""
    return export_folder(
        routers.folder,
        routers.base,
        options.output,
        mode=options.mode,
        kv=options.kv,
        merge=options.merge,
        tokenizer=chosen_tokenizer(options.tokenizer, options.source, routers.base),
        facts=routers.facts,
        progress=progress,
    )


def import_routers(options: ImportOptions) -> None:
    """Write a router folder from published weights, and print what was assumed."""
    report = import_published(
        options.source, options.output, config=options.config, granularity=options.granularity
    )
    rows = [("source", str(options.source)), *report.rows()]
    print("\n".join(table(rows, title="imported published routers")))


def _summary(done: Exported, seconds: float) -> list[tuple[str, str]]:
    """Return the rows of the closing table."""
    load = LOAD
    if done.mode == "adapter":
        load = "megaskip.load_routers(model, folder) on the loaded base"
    elif has_adapter(done.folder):
        load += "; then peft's PeftModel.from_pretrained(model, folder/adapter)"
    return [
        ("mode", "; ".join([done.mode, *done.notes])),
        ("written", f"{human_bytes(done.written)} in {seconds:.2f} s"),
        ("shared with the base", human_bytes(done.linked)),
        ("load", load),
    ]
