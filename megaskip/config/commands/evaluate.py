"""Options of `megaskip evaluate`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaskip.config.checks import at_least
from megaskip.config.options import Checked, option
from megaskip.config.paths import output_file_problems
from megaskip.config.run import DTYPES

_LEAST = {"num_fewshot": 0, "limit": 1, "batch_size": 1, "max_length": 2, "pipeline_stages": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions(Checked):
    """Tasks of lm-eval, routed beside dense."""

    model: str = option(metavar="MODEL")
    """Exported, run, router or plain Hugging Face folder, hub id, or demo."""
    base: str | None = option(None, metavar="MODEL")
    """Base model of a run or router folder [what it names]."""
    tokenizer: str | None = option(None, metavar="TOKENIZER")
    """Folder or hub id [of a run: what it was trained with; else the base's]."""
    tasks: tuple[str, ...] = option(separator=",", metavar="NAME,...")
    """Names of tasks, separated by commas."""
    include_path: str | None = option(None, metavar="FOLDER")
    """Folder with further task files (YAML)."""
    data_dir: str | None = option(None, metavar="FOLDER")
    """Folder with the files of the local_* tasks."""
    num_fewshot: int | None = None
    """Examples in a prompt [the task's own number]."""
    limit: int | None = None
    """Documents of each task [all]."""
    apply_chat_template: bool = False
    """Ask in the tokenizer's chat format."""
    lm_eval_compatible: bool = False
    """Make tokens of texts as lm-eval does, for its own numbers, not as in training."""
    chat_template: str | None = option(None, metavar="FILE.jinja")
    """A jinja file that replaces the tokenizer's chat template, for --apply_chat_template."""
    batch_size: int = 8
    """Rows of a batch on a rank."""
    max_length: int | None = None
    """Tokens of a text [what the model says]."""
    dtype: str = option("auto", choices=DTYPES)
    """Type of the weights in memory; auto: as stored."""
    capacity: float | None = None
    """One that `megaskip calibrate` calibrated [the stored one]."""
    unpaired: bool = False
    """Do not run the unrouted base: half the time."""
    ds_config: str | None = option(None, metavar="JSON")
    """DeepSpeed JSON: shard the weights over the ranks by ZeRO-3."""
    pipeline_stages: int = 1
    """Ranks that hold one copy of the model, each some of its layers."""
    output: Path = option(metavar="FILE.json")
    """Write the report to this .json file."""
    records: bool = False
    """Write each document's answers, too."""

    def _problems(self) -> Iterator[str]:
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None:
                yield from at_least(name, value, least)
        if self.ds_config and self.pipeline_stages > 1:
            yield "--ds_config shards by ZeRO-3, --pipeline_stages by layers; choose one"
        if self.chat_template and not self.apply_chat_template:
            yield "--chat_template is used with --apply_chat_template; add that, or leave it out"
        if not self.tasks:
            yield "--tasks names no task; give names separated by commas"
        yield from output_file_problems(self.output, ".json")
