"""Peak memory of every rank while a model is loaded and while its routers train.

    python tools/bench/memory.py --gib 1 --ranks 1 2 4

Makes a Llama with random weights of the asked size, then runs launch/train.py on it for two steps:
once whole on a single rank, then under ZeRO-3 and in pipeline stages, on each number of ranks.
Anonymous memory is the process's own; file memory are pages of the mapped shards, which the system
shares and drops at will. With a GPU the last column is the first rank's peak in its allocator, from
the start to the end. The interpreter with its libraries alone is the first row.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a clone

from megaskip.parallel.loading.source import DEMO_FOLDER
from megaskip.reporting.summary import versions

_HIDDEN, _MLP = 1536, 4096
PIPELINE = str(ROOT / "ds_configs/pipeline.json")


def main() -> None:
    """Measure and print the table."""
    options = parse()
    print("  ".join(f"{name} {number}" for name, number in versions().items()))
    with tempfile.TemporaryDirectory(dir=options.work_dir) as scratch:
        folder = Path(scratch)
        size = make_model(folder / "model", options.gib)
        print(f"model: {size / 2**30:.2f} GiB of bfloat16 in safetensors shards")
        columns = ["load, own", "load, file", "train, own", "train, file"]
        columns += ["on the GPU"] if torch.cuda.is_available() else []
        print(f"{'':22}" + "".join(f"{column:>13}" for column in columns))
        demo = DEMO_FOLDER / "backbone"
        show("libraries alone", run(folder / "a", demo, 1, ["--ds_config", options.ds_config]))
        show("whole, 1 rank", run(folder / "b", folder / "model", 1, []))
        for ranks in options.ranks:
            flags = ["--ds_config", options.ds_config, *options.flags]
            peaks = run(folder / f"z{ranks}", folder / "model", ranks, flags)
            show(f"ZeRO-3, {ranks} rank(s)", peaks)
        for stages in options.stages:
            flags = ["--ds_config", PIPELINE, "--pipeline_stages", str(stages), *options.flags]
            flags += ["--gradient_accumulation_steps", str(2 * stages)]
            show(f"{stages} stages", run(folder / f"p{stages}", folder / "model", stages, flags))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model [1]")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="ZeRO-3 ranks [2 4]")
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 4], help="stages [2 4]")
    parser.add_argument(
        "--ds_config", default=str(ROOT / "ds_configs/zero3.json"), help="DeepSpeed JSON"
    )
    parser.add_argument(
        "--work_dir", help="where the model is made [the system's temporary folder]"
    )
    parser.add_argument("flags", nargs="*", help="more flags of launch/train.py, after --")
    return parser.parse_args()


def make_model(folder: Path, gib: float) -> int:
    """Write a Llama of about `gib` GiB of bfloat16 with random weights; returns its bytes."""
    layer = 2 * (2 * _HIDDEN * _HIDDEN + 2 * _HIDDEN * _HIDDEN // 4 + 3 * _HIDDEN * _MLP)
    config = LlamaConfig(
        vocab_size=1536,
        hidden_size=_HIDDEN,
        intermediate_size=_MLP,
        num_hidden_layers=max(round(gib * 2**30 / layer), 4),
        num_attention_heads=12,
        num_key_value_heads=3,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="500MB"
    )
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO_FOLDER / "backbone" / name).read_bytes())
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def run(folder: Path, model: Path, ranks: int, flags: list[str]) -> dict[str, list[int]]:
    """Train two steps; returns each rank's peak bytes, {phase}_{anonymous, file}, and with a GPU
    those of the first rank there, {device}."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--standalone", str(ROOT / "launch/train.py"), "--model", str(model)]
    command += ["--output_dir", str(folder), "--max_steps", "2", "--max_samples", "64"]
    command += ["--micro_batch_size", "1", "--held_out", "0", "--calibration_rows", "0"]
    command += ["--no-progress", "--no-tensorboard", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    folder.mkdir(parents=True)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    peaks: dict[int, dict[str, int]] = {}
    while process.poll() is None:
        # run.json is written when the engine stands.
        phase = "train" if (folder / "run.json").exists() else "load"
        for pid in children(process.pid):
            note(peaks.setdefault(pid, {}), pid, phase)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit((folder / "log").read_text(errors="replace"))
    trained = [peak for peak in peaks.values() if "train_anonymous" in peak]
    sizes = {
        f"{phase}_{kind}": sorted(peak[f"{phase}_{kind}"] for peak in trained)
        for phase in ("load", "train")
        for kind in ("anonymous", "file")
    }
    if torch.cuda.is_available():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        sizes["device"] = [int(report["peak_memory_gib"] * 2**30)]
    return sizes


def children(pid: int) -> list[int]:
    """Return the ranks that torchrun has started."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def note(peak: dict[str, int], pid: int, phase: str) -> None:
    """Raise the peaks of a rank to what it holds now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return
    kinds = {"RssAnon:": "anonymous", "RssShmem:": "anonymous", "RssFile:": "file"}
    now: dict[str, int] = {}
    for line in lines:
        words = line.split()
        if words and words[0] in kinds:
            kind = kinds[words[0]]
            now[kind] = now.get(kind, 0) + int(words[1]) * 1024
    for kind, size in now.items():
        key = f"{phase}_{kind}"
        peak[key] = max(peak.get(key, 0), size)


def show(name: str, peaks: dict[str, list[int]]) -> None:
    """Print a row: the largest of all ranks, GiB."""
    cells = "".join(f"{max(found) / 2**30:13.2f}" for found in peaks.values())
    print(f"{name:22}{cells}", flush=True)


if __name__ == "__main__":
    main()
