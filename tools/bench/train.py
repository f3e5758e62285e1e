"""Step time and peak memory of router-tuning, LoRA and full fine-tuning, on one backbone, in one
run.

    python tools/bench/train.py
    python tools/bench/train.py --model path/to/Meta-Llama-3-8B --dtype bfloat16 --tokens 2048

Random weights of the given shape are enough: speed does not depend on them. The three take turns on
the same batch, so that their ratios hold on a noisy machine; FLOPs are counted, not computed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a clone

from megaskip import RouterConfig, attach_routers
from megaskip.arch.task_loss import TaskLoss
from megaskip.cli.run import run_cli
from megaskip.parallel.live_bytes import LiveBytes
from megaskip.reporting.summary import versions


def main(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    options = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = shape(options.model)
    ids = torch.randint(0, config.vocab_size, (options.rows, options.tokens), device=device)
    methods = {
        name: make(config, options, device, ids)
        for name, make in {"router-tuning": routers, "LoRA": lora, "full": full}.items()
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(options.warmup + options.repeats):
        for name, step in methods.items():
            seconds = timed(step, device)
            if turn >= options.warmup:
                times[name].append(seconds)
    report(
        times, {n: flops(s) for n, s in methods.items()}, {n: peak(s) for n, s in methods.items()}
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder with a config.json [a Llama of 110M parameters]")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=2, help="rows of the batch")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--granularity", default="attn_sequence", help="what the routers skip")
    parser.add_argument(
        "--lora_rank", type=int, default=16, help="rank of LoRA on every projection"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed turns")
    parser.add_argument("--warmup", type=int, default=2, help="turns that are not timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    return parser.parse_args(argv)


def shape(folder: str | None) -> Any:
    """Return the HF config to measure."""
    if folder:
        return AutoConfig.from_pretrained(folder)
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=12,
        num_key_value_heads=4,
    )


def build(config: Any, options: argparse.Namespace, device: torch.device) -> Any:
    """Return a fresh backbone with random weights."""
    dtype = getattr(torch, options.dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)


def routers(
    config: Any, options: argparse.Namespace, device: torch.device, ids: Any
) -> Callable[[], None]:
    """Return the router-tuning step: the deepest half but the last layer, everything frozen."""
    model = build(config, options, device).eval()
    loss = TaskLoss(model, chunk_tokens=1024)
    attached = attach_routers(model, RouterConfig(granularity=options.granularity), register=False)
    optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-4)
    mask = torch.ones_like(ids, dtype=torch.bool)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)

    def step() -> None:
        attached.set_batch(mask, mask)
        (loss(ids, mask.long(), positions, ids) / ids.numel() + attached.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lora(
    config: Any, options: argparse.Namespace, device: torch.device, ids: Any
) -> Callable[[], None]:
    """Return the LoRA step: every projection of every layer."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(build(config, options, device), adapters).train()
    return plain_step(model.get_base_model(), model.parameters(), ids)


def full(
    config: Any, options: argparse.Namespace, device: torch.device, ids: Any
) -> Callable[[], None]:
    """Return the step that trains every weight."""
    model = build(config, options, device).train()
    return plain_step(model, model.parameters(), ids)


def plain_step(model: Any, parameters: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Return a step of AdamW on what requires grad, with the same loss as router-tuning."""
    loss = TaskLoss(model, chunk_tokens=1024)
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-5)
    mask = torch.ones_like(ids)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)

    def step() -> None:
        (loss(ids, mask, positions, ids) / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def flops(step: Callable[[], None]) -> float:
    """Return the FLOPs of one step, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def peak(step: Callable[[], None]) -> int:
    """Return the peak bytes that a step needs beyond weights and optimizer state."""
    with LiveBytes() as live:
        step()
    return live.peak


def report(times: dict[str, list[float]], counted: dict[str, float], peaks: dict[str, int]) -> None:
    """Print the table, relative to LoRA; ratios of times are medians over turns of the ratio in a
    turn."""
    print("  ".join(f"{name} {number}" for name, number in versions().items()))
    print(
        f"{'':14} {'ms/step':>9} {'/ LoRA':>7} {'GFLOP':>9} {'/ LoRA':>7} {'step MiB':>9} "
        f"{'/ LoRA':>7}"
    )
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times["LoRA"], strict=True))
        print(
            f"{name:14} {1e3 * statistics.median(seconds):9.1f} {ratio:7.3f} "
            f"{counted[name] / 1e9:9.1f} "
            f"{counted[name] / counted['LoRA']:7.3f} {peaks[name] / 2**20:9.1f} "
            f"{peaks[name] / peaks['LoRA']:7.3f}"
        )
    turns = zip(times["router-tuning"], times["LoRA"], strict=True)
    floor = counted["router-tuning"] / counted["LoRA"]
    found = statistics.median(a / b for a, b in turns) / floor
    print(f"router-tuning takes {found:.2f} of the time that its FLOPs allow, relative to LoRA")


if __name__ == "__main__":
    run_cli(main)
