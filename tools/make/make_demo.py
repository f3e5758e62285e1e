"""Make the embedded demo: tokenizer, small trained backbone, instruction set. Knows no router.

    python tools/make/make_demo.py --work_dir /tmp/demo

writes megaskip/demo/ from tools/make/demo_text.txt.xz (public domain) and tools/make/demo_tasks.py
(generated). Everything is seeded.
"""

import argparse
import io
import json
import logging
import lzma
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import demo_tasks

logger = logging.getLogger("make_demo")

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "tools" / "make" / "demo_text.txt.xz"
DEMO = ROOT / "megaskip" / "demo"

# --- The recipe. Measured in megaskip/demo/README.md. ---
SEED = 7
INSTRUCT_SEED = 1007
VOCAB = 1536
TOKENIZER_TASK_ROWS = 6000
TASK_ROWS = 280_000
"""Conversations of the pretraining mix: 25 tokens each, nearly 4 of them in the answer."""
TEXT_PASSES = 3
"""Weight of the text in the mix: 0.36 M tokens a pass, so about an eighth of all tokens."""
TEXT_HELD_OUT = 20
"""One document in this many is kept out of the mix."""
CONTINUATION_ROWS = 8000
INSTRUCT_ROWS = 4200
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    # In 500-step trials 0.02 had not begun to copy, 0.06 and 0.08 had (README of the demo).
    "initializer_range": 0.06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}
RANKS = 2
TRAINING = {
    "--max_steps": "4000",
    "--micro_batch_size": "4",
    "--gradient_accumulation_steps": "1",
    "--seq_length": "256",
    "--lr": "2e-3",
    "--warmup_ratio": "0.03",
    "--weight_decay": "0.1",
    "--dtype": "float32",
    "--seed": str(SEED),
}
"""Flags of launch/train.py: 2 ranks x 4 rows x 256 tokens a step, 8 M tokens in all."""

ROLES = ("system", "user", "assistant")
# The space before a text is inside the markers: it is part of the first word's token.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|> {{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main() -> None:
    """Run the asked stages in order."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = _parse()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            logger.info("stage %s", name)
            stage(args.work_dir, args.demo_dir)


def make_corpus(work: Path, demo: Path) -> None:
    """Write what to pretrain on (work/text.jsonl, work/chats.jsonl) and demo/instruct.jsonl."""
    rng = random.Random(SEED)
    kept, held_out = split_text()
    _write_rows(work / "text.jsonl", [{"text": text} for text in kept])
    names = sorted(demo_tasks.TASKS)
    rows = [
        demo_tasks.make_row(rng, names[index % len(names)], held_out=False)
        for index in range(TASK_ROWS)
    ]
    continuations = list(_continuations(kept))
    rows += rng.sample(continuations, min(CONTINUATION_ROWS, len(continuations)))
    rng.shuffle(rows)
    _write_rows(work / "chats.jsonl", rows)

    rng = random.Random(INSTRUCT_SEED)
    instruct = demo_tasks.distinct_rows(rng, INSTRUCT_ROWS)
    fresh = list(_continuations(held_out))
    instruct += rng.sample(fresh, min(INSTRUCT_ROWS // len(names), len(fresh)))
    rng.shuffle(instruct)
    demo.mkdir(parents=True, exist_ok=True)
    _write_rows(demo / "instruct.jsonl", instruct)
    _write_rows(work / "heldout_text.jsonl", [{"text": text} for text in held_out])


def make_tokenizer(work: Path, demo: Path) -> None:
    """Train the SentencePiece model and write the tokenizer folder to demo/backbone/."""
    folder = demo / "backbone"
    folder.mkdir(parents=True, exist_ok=True)
    train_sentencepiece(_tokenizer_lines(), VOCAB, folder / "tokenizer.model")
    config = tokenizer_config(MODEL["max_position_embeddings"])
    (folder / "tokenizer_config.json").write_text(config)
    _check_tokenizer(folder)


def train_sentencepiece(lines: Iterable[str], pieces: int, path: Path) -> None:
    """Write a BPE model of `pieces` pieces with byte fallback that learned from `lines`."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        # Identity, no dummy prefix: decode(encode(text)) is the text, spaces and all.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        character_coverage=1.0,
        num_threads=1,
        pad_id=3,
        pad_piece="<pad>",
        # A newline stays a byte: as a user-defined symbol transformers 5 would call it special
        # and drop it in decode.
        control_symbols=[f"<|{role}|>" for role in ROLES],
        max_sentence_length=8192,
        minloglevel=1,
    )
    path.write_bytes(model.getvalue())


def tokenizer_config(max_length: int) -> str:
    """Return tokenizer_config.json for a model that train_sentencepiece wrote."""
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    return json.dumps(config, indent=2) + "\n"


def train_backbone(work: Path, demo: Path) -> None:
    """Train a fresh Llama with the project's own trainer: about 20 minutes on two cores."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    init = work / "init"
    tokenizer = AutoTokenizer.from_pretrained(demo / "backbone")
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **MODEL,
    )
    model = LlamaForCausalLM(config)
    logger.info("backbone: %d parameters", sum(p.numel() for p in model.parameters()))
    model.save_pretrained(init)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(demo / "backbone" / name, init / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)]
    command += [str(ROOT / "launch" / "train.py"), "--train", "full", "--packing"]
    command += ["--model", str(init), "--data", str(work / "chats.jsonl")]
    command += ["--data", f"{work / 'text.jsonl'}:{TEXT_PASSES}"]
    command += [part for flag in TRAINING.items() for part in flag]
    command += ["--output_dir", str(work / "run")]
    shutil.rmtree(work / "run", ignore_errors=True)
    logger.info("%s", " ".join(command))
    subprocess.run(command, check=True, cwd=ROOT)


def export(work: Path, demo: Path) -> None:
    """Write the trained weights as bf16 to demo/backbone/ and say how large the demo is."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(work / "run" / "model", dtype=torch.bfloat16)
    model.save_pretrained(demo / "backbone")
    size = sum(path.stat().st_size for path in demo.rglob("*") if path.is_file())
    logger.info("%s: %.2f MB", demo, size / 1e6)


STAGES: dict[str, Callable[[Path, Path], None]] = {
    "corpus": make_corpus,
    "tokenizer": make_tokenizer,
    "train": train_backbone,
    "export": export,
}
"""Stage name -> its function of (work_dir, demo_dir), in the order that `all` runs them."""


def split_text() -> tuple[list[str], list[str]]:
    """Return the documents of the text: those to train on, and those held out."""
    documents = lzma.decompress(TEXT.read_bytes()).decode("ascii").strip().split("\n\n")
    kept = [text for index, text in enumerate(documents) if index % TEXT_HELD_OUT]
    return kept, documents[::TEXT_HELD_OUT]


def _continuations(documents: list[str]) -> Iterator[dict[str, Any]]:
    for document in documents:
        # A line that ends in a colon names a speaker.
        prose = " ".join(line for line in document.split("\n") if not line.endswith(":"))
        for sentence in re.split(r"(?<=[.?!]) ", prose):
            pair = demo_tasks.continuation(sentence)
            if pair is not None:
                yield demo_tasks.as_row(*pair, "continue")


def _tokenizer_lines() -> Iterator[str]:
    kept, _ = split_text()
    for document in kept:
        yield from document.split("\n")
    rng = random.Random(SEED)
    names = sorted(demo_tasks.TASKS)
    for index in range(TOKENIZER_TASK_ROWS):
        row = demo_tasks.make_row(rng, names[index % len(names)], held_out=False)
        for message in row["messages"]:
            yield f" {message['content']}"


def _check_tokenizer(folder: Path) -> None:
    """Stop here, not after the training, when the folder does not load or round-trip."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (" two  spaces ", "a\nb", "caf\u00e9", "What is 12 plus 3?"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids) != text:
            raise SystemExit(f"{folder}: {text!r} comes back as {tokenizer.decode(ids)!r}")
    logger.info("tokenizer: %d pieces", len(tokenizer))


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    logger.info("%s: %d rows, %.2f MB", path, len(rows), path.stat().st_size / 1e6)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stage",
        choices=(*STAGES, "all"),
        default="all",
        help="corpus: the mix and the instruction set; tokenizer: the SentencePiece model and its "
        "folder; train: the backbone, from random weights; export: bf16 weights into the demo "
        "(default: all, in this order)",
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=Path("demo_work"),
        help="where the mix, the initial weights and the training run go (default: demo_work)",
    )
    parser.add_argument(
        "--demo_dir",
        type=Path,
        default=DEMO,
        help="where the result goes (default: megaskip/demo)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
