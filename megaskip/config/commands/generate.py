"""Options of `megaskip generate`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaskip.config.checks import at_least, share
from megaskip.config.options import Checked, option
from megaskip.config.paths import output_file_problems
from megaskip.config.run import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions(Checked):
    """Text from a model, and what ran for it."""

    model: str = option(metavar="MODEL")
    """Exported folder, run folder, router folder or a model without routers."""
    base: str | None = option(None, metavar="MODEL")
    """Base model of a run or router folder [what it names]."""
    tokenizer: str | None = option(None, metavar="TOKENIZER")
    """Tokenizer, folder or hub id [of a run: what it was trained with; else the model's]."""
    chat_template: str | None = option(None, metavar="FILE.jinja")
    """A jinja file that replaces the tokenizer's chat template."""
    prompts: Path | None = option(None, metavar="FILE")
    """A prompt a line, or .jsonl with prompt or messages [typed in]."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Of sampling; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus of sampling: the most likely tokens that together have this probability."""
    num_beams: int = 1
    """Beams; more than 1 do not stream."""
    seed: int = 0
    """Seed of sampling."""
    capacity: float | None = None
    """One that `megaskip calibrate` calibrated [the stored one]."""
    raw: bool = False
    """Do not apply the chat template."""
    static: bool = False
    """Decode on a static cache: on a GPU a step is recorded once an answer and played back for each
    further token. For decisions per sequence; with others nothing is recorded."""
    dtype: str = option("auto", choices=DTYPES)
    """Type of the weights in memory; auto: as stored."""
    output: Path | None = option(None, metavar="FILE.jsonl")
    """Write prompts, answers and shares to this .jsonl file."""
    picture: str | None = option(None, metavar="PICTURE")
    """Write what ran by token and layer to PICTURE.png and PICTURE.html."""

    def _problems(self) -> Iterator[str]:
        yield from at_least("max_new_tokens", self.max_new_tokens, 1)
        yield from at_least("num_beams", self.num_beams, 1)
        if not 0 <= self.temperature < math.inf:
            yield f"--temperature {self.temperature:g} must be 0 or a positive number"
        yield from share("top_p", self.top_p, above_zero=True)
        if 0 < self.top_p < 1 and self.temperature == 0:
            yield f"--top_p {self.top_p:g} is for sampling; give a --temperature above 0"
        if self.picture and self.num_beams > 1:
            yield "--picture shows one text, not beams; leave it out, or use --num_beams 1"
        if self.static and self.num_beams > 1:
            yield "--static is for one token of a text at a time, not beams; use --num_beams 1"
        if self.output is None:
            return
        if self.prompts is not None and self.output.resolve() == self.prompts.resolve():
            yield f"--output {self.output} is the file of --prompts; name another"
        else:
            yield from output_file_problems(self.output, ".jsonl")
