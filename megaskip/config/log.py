"""The section of a run that says what is logged, measured and reported while it goes on."""

from collections.abc import Iterator
from dataclasses import dataclass

from megaskip.config.checks import at_least
from megaskip.config.options import Checked, option

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig(Checked):
    """What is logged and shown while a run goes on."""

    log_every: int = 10
    """Steps between histograms of scores; in between nobody waits for a GPU, and a step's numbers
    are written when they arrive."""
    eval_every: int = 0
    """Steps between held-out evaluations; 0 evaluates once, at the end."""
    early_stop: int = 0
    """End the run after this many held-out evaluations in a row whose loss was not the lowest so
    far, and keep what was trained at the lowest; 0 takes all steps. Evaluations count from where
    no more runs than --capacity asks for."""
    report_to: tuple[str, ...] = option(
        ("tensorboard",), choices=(*TRACKERS, "none"), separator=","
    )
    """Where numbers go beside metrics.jsonl, a list: tensorboard (--output_dir/tensorboard), wandb,
    mlflow, trackio, or none. All stay on this machine unless WANDB_MODE or MLFLOW_TRACKING_URI
    says otherwise."""
    tensorboard: bool = True
    """--no-tensorboard takes tensorboard out of --report_to."""
    progress: bool = True
    """Show how far the run is: a bar on a terminal, a line of the log twice a minute elsewhere."""

    def _problems(self) -> Iterator[str]:
        yield from at_least("log_every", self.log_every, 1)
        yield from at_least("eval_every", self.eval_every, 0)
        yield from at_least("early_stop", self.early_stop, 0)
        if self.early_stop > 0 and self.eval_every == 0:
            yield f"--early_stop {self.early_stop} counts held-out evaluations: add --eval_every"
        if not self.report_to or ("none" in self.report_to and len(self.report_to) > 1):
            yield (
                f"--report_to {','.join(self.report_to)!r}: give none alone, or some of "
                f"{', '.join(TRACKERS)}"
            )
        if len(set(self.report_to)) < len(self.report_to):
            yield f"--report_to {','.join(self.report_to)} names a tracker twice"

    @property
    def trackers(self) -> tuple[str, ...]:
        """Return the trackers that a run reports to."""
        left_out = {"none"} if self.tensorboard else {"none", "tensorboard"}
        return tuple(name for name in self.report_to if name not in left_out)
