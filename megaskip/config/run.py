"""The sections of a run. The string under each field is its --help text; checks live beside the
fields."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megaskip.config.adapter import AdapterConfig, adapter_problems
from megaskip.config.checks import at_least, finite, share
from megaskip.config.four_bit import four_bit_problems
from megaskip.config.full import full_problems
from megaskip.config.log import LogConfig
from megaskip.config.options import Checked, option
from megaskip.config.parallel import ParallelConfig, sequence_problems
from megaskip.config.router import RouterConfig

DEMO = "demo"
DTYPES = ("auto", "float32", "bfloat16")
COMPENSATION_LR = 3e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Checked):
    """The frozen base model and what of it trains."""

    model: str = option(DEMO, metavar="MODEL")
    """Base model: a Hugging Face folder or hub id; "demo" is the small backbone that ships with
    megaskip."""
    tokenizer: str | None = option(None, metavar="TOKENIZER")
    """Tokenizer folder or hub id, when it is not the model's own."""
    revision: str | None = option(None, metavar="REVISION")
    """Branch, tag or commit of a hub model."""
    train: str = option("routers", choices=("routers", "full"))
    """What trains: "routers" (the backbone stays frozen) or "full" (every weight; makes small
    backbones)."""
    dtype: str = option("auto", choices=DTYPES)
    """Type of the backbone's weights: auto (as stored; float32 with --train full), float32 or
    bfloat16. Routers are always float32."""
    base_dtype: str = option("dtype", choices=("dtype", "nf4"))
    """How the frozen weights are held: in the type of --dtype, or the linear layers in 4 bit (nf4,
    through bitsandbytes), each quantised as it is read; it computes in --dtype. Routers are those
    of the 16-bit model's folder and are exported on top of it. A folder that bitsandbytes packed in
    4 bit is read as it is, without this flag."""
    attn_implementation: str = option("auto", metavar="NAME")
    """Attention of the backbone as transformers names it: sdpa, eager, flash_attention_2, ...; auto
    takes what transformers prefers for the family."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the model folder."""
    init_routers: str | None = None
    """Start from the routers of this folder, for example those of megaskip fit; it then says what
    is routed, and how. Flags left at their defaults follow the folder, others that say otherwise
    are errors [fresh routers]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(Checked):
    """What the routers learn from."""

    data: tuple[str, ...] = option((DEMO,), metavar="PATH[:weight]")
    """Training data, PATH[:weight], repeatable: .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow
    files, compressed or not, a folder of them or of Dataset.save_to_disk, a pattern, or a hub name;
    alpaca, sharegpt, messages, prompt/completion, question/answer or plain text. Of a folder the
    training split is read. "demo" ships with megaskip."""
    eval_data: tuple[str, ...] = option((), metavar="PATH[:weight]")
    """Held-out data, like --data, but of a folder the held-out splits are read; without it
    --held_out samples are carved off the training data."""
    held_out: int = 512
    """Samples carved off for the held-out loss (at most a fifth of the data)."""
    seq_length: int = 512
    """Longest sample in tokens; longer ones are cut, plain text is split."""
    packing: bool = False
    """Put several samples into one row, without any attention between them."""
    streaming: bool = False
    """Read and tokenise while training, for data that do not fit on disk."""
    chat_template: str | None = option(None, metavar="FILE.jinja")
    """A jinja file that replaces the tokenizer's chat template."""
    cache_dir: str | None = option(None, metavar="FOLDER")
    """Where tokenised data are kept [~/.cache/megaskip/data]."""
    tokenize_workers: int = 1
    """Processes that tokenise."""
    max_samples: int | None = None
    """Use at most this many samples of the mix."""
    prompt_tokens: int = option(32, is_flag=False, follows="prompt_tokens")
    """Follows RouterConfig.prompt_tokens."""
    seed: int = option(0, is_flag=False, follows="seed")
    """Follows OptimConfig.seed."""

    def _problems(self) -> Iterator[str]:
        if not self.data:
            yield "--data names nothing to train on"
        yield from at_least("seq_length", self.seq_length, 8)
        yield from at_least("held_out", self.held_out, 0)
        yield from at_least("tokenize_workers", self.tokenize_workers, 1)
        if self.max_samples is not None:
            yield from at_least("max_samples", self.max_samples, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig(Checked):
    """How long and how fast to learn. Batch size, precision, rate and clipping are owned here, not
    in the JSON."""

    max_steps: int | None = None
    """Optimizer steps; without it --epochs decides."""
    epochs: float = 1.0
    """Passes over the training data, when --max_steps is not given."""
    micro_batch_size: int = 4
    """Rows per rank and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    compensation_lr: float = COMPENSATION_LR
    """Peak learning rate of the compensations, which follows the same schedule."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate climbs linearly; then it falls along a cosine."""
    min_lr_ratio: float = 0.0
    """Rate at the end, as a share of the peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 switches clipping off."""
    calibration_rows: int = 4096
    """Rows of training data on which the threshold is put where the asked capacity is kept, after
    the last step (budget=global; forward passes only); 0 leaves it where training ended."""
    fit_rows: int = 256
    """Rows of training data on which compensations are fitted in closed form before the first step
    (one forward pass); 0 begins with compensations of zero."""
    distill: float = 0.0
    """Share of each label that is the unrouted model's own prediction (a second, dense forward
    pass); 0 learns from the text alone, as published."""
    noise: float = 0.0
    """Logistic noise on the scores while training, in standard deviations of theirs: units near the
    threshold are tried both ways; 0 as published."""
    temperature: float = 1.0
    """Of the straight-through gradient, that of sigmoid(logit / temperature): below 1 only units
    near the threshold learn, far above it all learn alike; 1 as published."""
    seed: int = 0
    """Seed of data order, sampling and initialisation."""

    @property
    def compensation_lr_ratio(self) -> float:
        """Return the rate of the compensations as a multiple of `lr`."""
        return self.compensation_lr / self.lr if self.lr else 1.0

    def _problems(self) -> Iterator[str]:
        if self.max_steps is not None:
            yield from at_least("max_steps", self.max_steps, 1)
        yield from finite("epochs", self.epochs)
        yield from finite("temperature", self.temperature)
        if self.epochs <= 0:
            yield f"--epochs {self.epochs:g} must be above 0"
        yield from at_least("micro_batch_size", self.micro_batch_size, 1)
        yield from at_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        yield from at_least("lr", self.lr, 0.0)
        yield from at_least("compensation_lr", self.compensation_lr, 0.0)
        yield from share("warmup_ratio", self.warmup_ratio)
        yield from share("min_lr_ratio", self.min_lr_ratio)
        yield from at_least("weight_decay", self.weight_decay, 0.0)
        yield from at_least("max_grad_norm", self.max_grad_norm, 0.0)
        yield from at_least("calibration_rows", self.calibration_rows, 0)
        yield from at_least("fit_rows", self.fit_rows, 0)
        yield from share("distill", self.distill)
        yield from at_least("noise", self.noise, 0.0)
        if self.temperature <= 0:
            yield f"--temperature {self.temperature:g} must be above 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig(Checked):
    """What is written and where a run picks up."""

    output_dir: str | None = option(None, metavar="FOLDER")
    """The run's folder [a new one, runs/MODEL-GRANULARITY-NNN]."""
    save_every: int = 100
    """Steps between checkpoints; 0 writes only the last one."""
    keep_last: int = 2
    """Checkpoints kept; older ones are removed."""
    resume: str | None = option(None, metavar="CHECKPOINT")
    """"auto" continues from the newest complete checkpoint of --output_dir (or of the newest run of
    this kind), if there is any; or the path of a checkpoint."""

    def _problems(self) -> Iterator[str]:
        yield from at_least("save_every", self.save_every, 0)
        yield from at_least("keep_last", self.keep_last, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(Checked):
    """One run, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    dry_run: bool = False
    """Print what the job would do and need, without loading weights or starting ranks."""

    @property
    def leaves_out_skipped(self) -> bool:
        """Return whether what is skipped is not computed while training."""
        return self.parallel.train_execution == "sparse" or self.router.budget == "static"

    def _problems(self) -> Iterator[str]:
        yield from adapter_problems(
            self.adapter,
            budget=self.router.budget,
            train=self.model.train,
            lr=self.optim.lr,
            max_steps=self.optim.max_steps,
            cache_prefix=self.parallel.cache_prefix,
        )
        yield from self._learning_problems()
        yield from self._attention_problems()
        if self.model.base_dtype == "nf4":
            yield from self.four_bit_problems("--base_dtype nf4")
        yield from self._full_problems()
        yield from self._parallel_problems()
        yield from sequence_problems(
            self.parallel,
            train=self.model.train,
            packing=self.data.packing,
            by_layer_and_token=self.router.budget == "layer" and self.router.unit == "token",
        )

    def four_bit_problems(self, base: str) -> Iterator[str]:
        """Yield what of this run a base in 4 bit, which the lines call `base`, does not do."""
        return four_bit_problems(
            base,
            train=self.model.train,
            ds_config=self.parallel.ds_config,
            pipeline_stages=self.parallel.pipeline_stages,
        )

    def _learning_problems(self) -> Iterator[str]:
        nothing_learns = self.router.budget == "static" and self.router.compensation == "none"
        if nothing_learns and not self.adapter.lora_rank and self.model.init_routers is None:
            yield (
                "--budget static with --compensation none has nothing to learn: its layers never "
                "run; add --compensation low_rank, or --lora_rank"
            )
        if self.router.freeze_routers and self.model.init_routers is None:
            yield (
                "--freeze_routers needs --init_routers FOLDER, such as that of megaskip "
                "fit-routers: fresh routers do not tell one unit from another"
            )
        learns_maps = self.router.compensation != "none" and self.optim.compensation_lr > 0
        if learns_maps and self.optim.lr == 0:
            yield (
                "--lr 0 keeps the compensations still, too: --compensation_lr "
                f"{self.optim.compensation_lr:g} is scaled with it; give --compensation_lr 0 if "
                "that is meant, or --freeze_routers in the place of --lr 0"
            )
        if self.log.early_stop and not (self.data.held_out or self.data.eval_data):
            yield (
                f"--early_stop {self.log.early_stop} needs held-out rows: add --eval_data, or "
                "--held_out above 0"
            )

    def _attention_problems(self) -> Iterator[str]:
        attention = self.model.attn_implementation
        by_lengths = "flash" in attention and self.data.packing
        if self.leaves_out_skipped and (by_lengths or attention == "flex_attention"):
            packing = "--packing and " if by_lengths else ""
            yield (
                f"{packing}--attn_implementation {attention} does not go with --train_execution "
                "sparse or --budget static: it is told of all rows of a batch, of which they leave "
                "some out; take sdpa"
            )

    def _full_problems(self) -> Iterator[str]:
        if self.model.train != "full":
            return
        of_routers = {
            "init_routers": self.model.init_routers is not None,
            "distill": self.optim.distill > 0,
            "noise": self.optim.noise > 0,
            "temperature": self.optim.temperature != 1,
        }
        yield from full_problems(self.parallel, [name for name in of_routers if of_routers[name]])

    def _parallel_problems(self) -> Iterator[str]:
        if self.parallel.cache_prefix is not None and self.data.streaming:
            yield (
                "--cache_prefix does not go with --streaming: rows of a stream cannot be found "
                "again; leave --streaming out"
            )
        if self.parallel.world_size is not None and not self.dry_run:
            yield (
                f"--world_size {self.parallel.world_size} is for --dry_run; the launcher decides "
                "how many ranks run"
            )
        stages = self.parallel.pipeline_stages
        if stages > 1 and self.router.router_input == "first":
            yield (
                f"--router_input first does not go with --pipeline_stages {stages}: what the first "
                "routed layer reads is on one stage; take --router_input own, or ZeRO-3 "
                "(--ds_config ds_configs/zero3.json)"
            )
