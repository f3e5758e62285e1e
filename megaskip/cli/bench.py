"""Measure speed and memory on this machine: training, prefill, decode. One command, no network.

    megaskip bench gpu --minutes 8 --output bench
    megaskip bench cpu --output bench      # the same at small shapes

Everything has random weights, made on the device. On a GPU: Llamas of 1B and 8B and 8 layers of a
70B in bfloat16; router-tuning, LoRA (where peft is installed) and full fine-tuning, with rows of
2048 to 8192 tokens, padded and packed; prefill and decode of 1 to 64 rows with prompts of 2048 to
32768 tokens, dense, routed and with sublayers dropped, attentions also with maps in their places;
kernel launches and waits of each step; the share of the device's measured peaks that is used;
memory by kind. First it checks that what skips computes what masks compute and, where DeepSpeed is
installed, that ZeRO-3 has a replica's losses.

Writes into the output folder

  report.json, report.md, report.png  all figures, tables, a picture (the last needs matplotlib)
  parts/                              a record of each part, as soon as it has ended

Parts are run in order of value, in a process of their own. One that runs out of memory, crashes or
would not fit into the time is listed with the reason, and the others go on. The same command with
the same --output goes on after a crash, and runs what was left out or failed.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.bench import BenchOptions


def main(argv: Sequence[str], prog: str = "megaskip bench") -> None:
    """Measure as the flags say."""
    options = parse(argv, prog)
    from megaskip.bench.job import bench

    bench(options)


def parse(argv: Sequence[str], prog: str = "megaskip bench") -> BenchOptions:
    """Return the options; a first word without dashes is the device. Raises ConfigError with every
    problem."""
    flags = list(argv)
    if flags and not flags[0].startswith("-"):
        flags[:1] = ["--device", flags[0]]
    return parse_options(
        BenchOptions, flags, prog=prog, description=__doc__, usage="{gpu,cpu} [flags]"
    )
