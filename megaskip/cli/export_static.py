"""Drop for good what trained routers seldom let run, for servers that cannot route.

    megaskip export-static --run runs/demo-attn_sequence-001 --below 0.35 --output small
    megaskip export-static --routers my_routers --base path/to/base --data text.jsonl \\
        --count 8 --format decilm --output small

The capacity of each layer is measured on calibration text; --below, --count or --layers chooses
what is dropped. --format hf loads with transformers, decilm in vLLM (llama and mistral bases).
Shards that lose nothing are hard links to the base's.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.export_static import ExportStaticOptions


def main(argv: Sequence[str], prog: str = "megaskip export-static") -> None:
    """Export as the flags say."""
    options = parse(argv, prog)
    from megaskip.export.static_job import export_without_dropped

    export_without_dropped(options)


def parse(argv: Sequence[str], prog: str = "megaskip export-static") -> ExportStaticOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(ExportStaticOptions, argv, prog=prog, description=__doc__)
