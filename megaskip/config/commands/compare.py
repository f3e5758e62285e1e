"""Options of `megaskip compare`, and the names of the methods that it knows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaskip.config.checks import at_least, percentage
from megaskip.config.options import Checked, option
from megaskip.config.routing import SUBLAYER_GRANULARITIES
from megaskip.config.run import COMPENSATION_LR, DTYPES

BASELINES = ("static", "random", "uniform")
FITTED_BASELINES = {"random_fitted": "random", "uniform_fitted": "uniform"}
"""Baselines that have maps of closed form in the places of what they skip; of those without."""
BY_COST_TRAINED = "by_cost_trained"
BY_COST = ("by_cost", "by_cost_fitted", BY_COST_TRAINED)
DROPS = (
    *("greedy", "static_fitted", "greedy_fitted", "static_trained", "greedy_trained"),
    *("static_lora", "greedy_trained_lora"),
)
DENSE_LORA = "dense_lora"
"""Skips nothing: what adapters alone are worth."""
TRAINED = (
    "published",
    "separate",
    "layerwise",
    "ours",
    "allocated",
    "distill",
    "noise",
    "sharp",
    "smooth",
    "affine",
    "mlp",
    "compensated",
    "ours_lora",
    DENSE_LORA,
)
CONTROLS = ("dense_adapted",)
METHODS = (*BASELINES, *FITTED_BASELINES, *DROPS, *BY_COST, *TRAINED, *CONTROLS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions(Checked):
    """Ways to skip, at equal skip."""

    model: str = option(metavar="MODEL")
    """Base model, folder, hub id or demo."""
    data: tuple[str, ...] = option(metavar="PATH[:weight]")
    """Text to train on, repeatable."""
    eval_data: tuple[str, ...] = option((), metavar="PATH[:weight]")
    """Text to measure on, repeatable [carved off]."""
    documents: int = 512
    """Rows of it to measure on, from all over it; a long text is several."""
    blimp: Path | None = option(None, metavar="FOLDER")
    """Folder of minimal pairs: JSONL, sentence_good and sentence_bad."""
    pairs: int = 200
    """Pairs of each of its sets."""
    choice: tuple[Path, ...] = option((), metavar="PATH")
    """Multiple-choice tasks, repeatable: a JSONL file of query, choices and gold, or a folder of
    them; a file's name is its task's (arc_easy and boolq are asked as lm-eval does)."""
    choice_questions: int = 200
    """Questions of each of them, from all over it."""
    skip: tuple[float, ...] = option((12.5, 25.0, 37.5), separator=",", metavar="PERCENT,...")
    """Percent of all that --granularity skips (attention, MLPs or layers), also of layers that are
    not routed."""
    seeds: tuple[int, ...] = option((0, 1, 2), separator=",", metavar="INT,...")
    """Seeds of everything that is trained or drawn."""
    methods: tuple[str, ...] = option(
        (*BASELINES, "published", "ours"), separator=",", choices=METHODS, metavar="NAME,..."
    )
    """What is compared."""
    ours: str = option("ours", choices=(*TRAINED, *BY_COST, *DROPS), metavar="NAME")
    """The method that the others are set against."""
    granularity: str = option(
        "attn_sequence",
        choices=SUBLAYER_GRANULARITIES,
        elsewhere={
            "expert_token": "; experts are not compared here: tools/bench/experts.py compares "
            "trained runs that skip them"
        },
        metavar="GRANULARITY",
    )
    """As --granularity of `megaskip train`, for all methods."""
    layers: str = option("half", metavar="SPEC")
    """As --layers of `megaskip train`."""
    steps: int = 300
    """Steps of each training, 16 rows each."""
    dtype: str = option("float32", choices=DTYPES)
    """As --dtype of `megaskip train`, for the trainings; all is measured in float32."""
    seq_length: int = 256
    """Longest sample in tokens."""
    calibration_rows: int = 512
    """Rows on which thresholds are found."""
    compensation_rank: int = 64
    """Rank of the maps in dropped layers' places."""
    compensation_lr: float = COMPENSATION_LR
    """Their peak learning rate."""
    adapter_lr: float = 1e-3
    """Peak learning rate of the adapters of dense_adapted."""
    lora_rank: int = 16
    """Rank of the adapters of the methods that end in _lora."""
    lora_lr: float = 2e-4
    """Their peak learning rate."""
    order_rows: int = 128
    """Calibration rows on which a greedy order is measured."""
    cost_rows: int = 256
    """Rows beside those of --calibration_rows, on which the costs of by_cost are measured."""
    cost_groups: int = 4
    """For by_cost, as --groups of `megaskip fit-routers`."""
    continuations: int = 0
    """Prompts whose 64 greedy tokens are compared with the dense model's."""
    prefill_runs: int = 7
    """Pairs of prefills that are timed for each method; 0 times nothing."""
    parallel: int = 1
    """Trainings that run at the same time."""
    cache_dir: str | None = option(None, metavar="FOLDER")
    """As --cache_dir of `megaskip train`."""
    no_training: bool = False
    """Take only runs that exist."""
    output: Path = option(metavar="FOLDER")
    """Folder to write."""

    def _problems(self) -> Iterator[str]:
        counts = ("documents", "pairs", "choice_questions", "steps", "calibration_rows")
        for name in (*counts, "order_rows", "cost_rows", "cost_groups", "parallel", "lora_rank"):
            yield from at_least(name, getattr(self, name), 1)
        for name in ("continuations", "prefill_runs", "compensation_lr", "adapter_lr", "lora_lr"):
            yield from at_least(name, getattr(self, name), 0)
        for name in ("data", "skip", "seeds", "methods"):
            values = getattr(self, name)
            if not values:
                yield f"--{name} is empty"
            # Measured twice it would count as two seeds.
            twice = [f"{value}" for value in dict.fromkeys(values) if values.count(value) > 1]
            if twice and name != "data":
                yield f"--{name} names {', '.join(twice)} more than once; leave the others out"
        for percent in self.skip:
            yield from percentage("skip", percent)
        if "allocated" in self.methods and self.granularity.endswith("_token"):
            yield (
                f"--methods allocated does not go with --granularity {self.granularity}: layers "
                "get thresholds of their own for decisions per sequence; leave it out"
            )
        # As a default it may be missing: then nothing is set against another.
        if self.ours != "ours" and self.ours not in self.methods:
            yield f"--ours {self.ours} is not among --methods; add it there"

    @property
    def shares(self) -> list[float]:
        """Return --skip as shares, ascending."""
        return sorted(percent / 100 for percent in self.skip)
