"""Throughput and latency of vLLM with a dense, a statically dropped and a routed model.

    python tools/bench/serving.py
    python tools/bench/serving.py --model path/to/base --batch 1 4 16 64 --output serving.json
    VLLM_USE_V2_MODEL_RUNNER=1 python tools/bench/serving.py --prompt 512 --dtype bfloat16

Needs vLLM in the same environment (tests/serving/run.sh makes one for CPUs: .venv-serving). Every
variant is the same base in the same engine, one after another, in this process: requests of random
tokens that come together, so many prompt tokens each and so many to generate.

  dense        the base's folder, with graphs and compilation off as for the others
  dropped C    the share 1 - C of the routed layers taken out for good, for every request
  routed C     of all routed layers' units (one a request) the share C runs, forced, spread so that
               requests keep different layers and layers keep different requests
  agreed C     the same share, but every request skips the same layers

prefill is the time to the first token of the whole batch; decode the time of one further token of
the whole batch. "x dense" is dense over the variant: above 1 is faster. --cpu_time counts what the
CPU spends on this process instead of the clock, for a shared machine and one thread.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a clone

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megaskip import RouterConfig, attach_routers, save_routers
from megaskip.checkpoint.base import describe_base
from megaskip.cli.run import run_cli
from megaskip.config import resolve_layers
from megaskip.export.folder import export_folder
from megaskip.export.static import sublayers
from megaskip.export.static_folder import export_static, require_exportable
from megaskip.parallel.loading.source import DEMO_FOLDER
from megaskip.reporting.summary import table


def main(argv: Sequence[str]) -> None:
    """Measure every variant and print a table."""
    args = _arguments(argv)
    base = DEMO_FOLDER / "backbone" if args.model == "demo" else Path(args.model)
    depth = AutoConfig.from_pretrained(base).num_hidden_layers
    layers = resolve_layers(args.layers, depth)
    found: dict[str, dict[int, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, share in _variants(args.capacity):
            folder = _folder(name, share, base, layers, args, Path(scratch))
            found[f"{name} {share:g}" if share is not None else name] = _measure(
                folder, name, share, layers, args
            )
    _print(found, args, layers)
    if args.output:
        rows = {name: {str(b): list(t) for b, t in of.items()} for name, of in found.items()}
        content = {"arguments": vars(args), "seconds_prefill_and_decode_step": rows}
        Path(args.output).write_text(json.dumps(content, indent=1))


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="folder of the base model")
    parser.add_argument("--target", default="block", choices=("attn", "mlp", "block"))
    parser.add_argument("--layers", default="half", help="routed layers, as of megaskip train")
    parser.add_argument("--capacity", type=float, nargs="+", default=[1.0, 0.75, 0.5])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument(
        "--tokens", type=int, default=16, help="tokens to generate behind the first"
    )
    parser.add_argument("--repeats", type=int, default=3, help="medians of so many")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--cpu_time", action="store_true", help="what the CPU spends, not the clock"
    )
    parser.add_argument("--output", default="", help="JSON file with all seconds")
    return parser.parse_args(argv)


def _variants(capacities: Sequence[float]) -> list[tuple[str, float | None]]:
    skipping = [share for share in capacities if share < 1]
    return [
        ("dense", None),
        *(("dropped", share) for share in skipping),
        *(("routed", share) for share in capacities),
        *(("agreed", share) for share in skipping),
    ]


def _folder(
    name: str, share: float | None, base: Path, layers: Sequence[int], args: Any, scratch: Path
) -> Path:
    """Return the folder of a variant; routed ones share one, for their decisions are forced."""
    if share is None:
        return base
    if name == "dropped":
        folder = scratch / f"dropped_{share:g}"
        dropped = sublayers(args.target, _skipped(layers, share, 0))
        export_static(require_exportable(base, folder, "hf"), folder, dropped)
        return folder
    folder = scratch / "routed"
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = RouterConfig(granularity=f"{args.target}_sequence", layers=tuple(layers))
        routers = attach_routers(model, config)
        described = describe_base(model.config, base)
        save_routers(scratch / "routers", routers, base=described)
        del model
        export_folder(scratch / "routers", base, folder)
    return folder


def _skipped(layers: Sequence[int], share: float, request: int) -> list[int]:
    """Return the layers that a request skips: evenly spread, shifted from request to request."""
    count, kept = len(layers), 0.0
    skipped = []
    for number in range(count):
        kept += share
        if kept >= 1:
            kept -= 1
        else:
            skipped.append(layers[(number + request) % count])
    return skipped


def _measure(
    folder: Path, name: str, share: float | None, layers: Sequence[int], args: Any
) -> dict[int, tuple[float, float]]:
    """Return (seconds of the prefill, seconds of a decode step) by batch size."""
    if name in ("routed", "agreed"):
        assert share is not None
        _force(share, agreed=name == "agreed")
    seconds = {}
    with _engine(folder, args) as engine:
        for batch in args.batch:
            short = _call(engine, batch, 1, args)
            long = _call(engine, batch, 1 + args.tokens, args)
            short()
            turns = [(_seconds(short, args), _seconds(long, args)) for _ in range(args.repeats)]
            prefill = statistics.median(first for first, _ in turns)
            step = statistics.median((whole - first) / args.tokens for first, whole in turns)
            seconds[batch] = (prefill, step)
            print(f"{name} {share} batch {batch}: {prefill:.4f} s, {step:.5f} s", flush=True)
    return seconds


@contextlib.contextmanager
def _engine(folder: Path, args: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.freeze()
    most, length = max(args.batch), args.prompt + args.tokens + 2
    engine = LLM(
        str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        dtype=args.dtype,
        max_model_len=length,
        max_num_seqs=most,
        max_num_batched_tokens=max(most * args.prompt, length),
        distributed_executor_backend="uni",
    )
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def _call(engine: Any, batch: int, tokens: int, args: Any) -> Callable[[], object]:
    """Return what lets a batch of requests generate so many tokens each."""
    from vllm import SamplingParams

    vocabulary = engine.llm_engine.vllm_config.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(5, vocabulary, (batch, args.prompt), generator=generator).tolist()
    inputs = [{"prompt_token_ids": prompt} for prompt in ids]
    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    return lambda: engine.generate(inputs, asked, use_tqdm=False)


def _seconds(call: Callable[[], object], args: Any) -> float:
    clock = time.process_time if args.cpu_time else time.perf_counter
    begun = clock()
    call()
    return clock() - begun


def _force(share: float, *, agreed: bool) -> None:
    """Let requests run what the measurement asks for; routers still read and score their
    prompts."""
    from megaskip.serving.vllm.routed import RequestRouting

    decide: Any = RequestRouting.__dict__.get("_skip_decide") or RequestRouting.decide
    RequestRouting._skip_decide = decide  # type: ignore[attr-defined]
    seen: dict[int, tuple[Any, int]] = {}

    def forced(self: Any, batch: Any, layer: int, hidden_states: Any) -> None:
        fresh = [request for request in batch.requests if layer not in request.runs]
        decide(self, batch, layer, hidden_states)
        layers = self.routers.layers
        for request in fresh:
            # Kept, so that no other request gets its id.
            _, number = seen.setdefault(id(request), (request, len(seen)))
            request.runs[layer] = layer not in _skipped(layers, share, 0 if agreed else number)

    RequestRouting.decide = forced  # type: ignore[method-assign]


def _print(
    found: dict[str, dict[int, tuple[float, float]]], args: Any, layers: Sequence[int]
) -> None:
    clock = "CPU seconds" if args.cpu_time else "seconds"
    title = (
        f"{args.model}, {args.target} of {len(layers)} layers, {args.dtype}, prompts of "
        f"{args.prompt} tokens, {torch.get_num_threads()} threads: {clock} of the batch, x dense"
    )
    rows = []
    for name, of_batch in found.items():
        for batch, times in of_batch.items():
            dense = found["dense"][batch]
            cells = [
                f"{what} {mine:.4f} ({theirs / mine:.2f}x)"
                for what, mine, theirs in zip(("prefill", "decode"), times, dense, strict=True)
            ]
            rate = batch / times[1]
            rows.append((f"{name}, batch {batch}", f"{', '.join(cells)}, {rate:.1f} tokens/s"))
    print("\n".join(table(rows, title=title)))


if __name__ == "__main__":
    run_cli(main)
