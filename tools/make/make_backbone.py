"""Make what launch/backbone.sh trains on: documents, a tokenizer, random weights. Knows no router.

    python tools/make/make_backbone.py --text TEXT_DIR --instruct alpaca.json --work_dir WORK

TEXT_DIR holds .txt files. Writes text.jsonl, heldout_text.jsonl and init/ into the work folder.
Everything is seeded.
"""

import argparse
import html
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from make_demo import tokenizer_config, train_sentencepiece

logger = logging.getLogger("make_backbone")

SEED = 11
VOCAB = 4096
DOCUMENT_CHARACTERS = 1000
HELD_OUT = 25
"""One document in this many is kept out of text.jsonl."""
MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    # Larger than usual: at this width 0.02 learns late (megaskip/demo/README.md, trials).
    "initializer_range": 0.06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}


def main() -> None:
    """Write the documents, the tokenizer and the untrained model."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = _parse()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    documents = [text for path in _text_files(args.text) for text in split(clean(path.read_text()))]
    if len(documents) < 2:
        raise SystemExit(f"--text {args.text}: {len(documents)} document(s); give more text")
    kept = [text for index, text in enumerate(documents) if index % HELD_OUT]
    _write(args.work_dir / "text.jsonl", kept)
    _write(args.work_dir / "heldout_text.jsonl", documents[::HELD_OUT])
    make_model(args.work_dir / "init", _lines(kept, args.instruct))


def clean(text: str) -> str:
    """Undo HTML escapes and the spaces that tokenised corpora put around punctuation."""
    text = html.unescape(html.unescape(text))
    text = re.sub(r" +([,.;:?!)])", r"\1", text)
    return re.sub(r"\( +| +n't|(?<=\w) +(?='(?:s|re|ve|ll|d|m)\b)", _joined, text)


def split(text: str) -> Iterator[str]:
    """Yield documents of whole lines, of about DOCUMENT_CHARACTERS characters."""
    lines: list[str] = []
    for line in text.split("\n"):
        if line.strip():
            lines.append(line.strip())
        if sum(map(len, lines)) >= DOCUMENT_CHARACTERS:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def make_model(folder: Path, lines: Iterable[str]) -> None:
    """Write a tokenizer that learned from `lines` and a Llama with random weights to `folder`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    length = MODEL["max_position_embeddings"]
    train_sentencepiece(lines, VOCAB, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(tokenizer_config(length))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **MODEL,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    logger.info("%s: %d parameters", folder, sum(p.numel() for p in model.parameters()))


def _joined(match: re.Match[str]) -> str:
    return match.group().replace(" ", "")


def _text_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise SystemExit(f"--text {folder}: no .txt file there; point it at a folder of plain text")
    return files


def _lines(documents: list[str], instruct: list[Path]) -> Iterator[str]:
    for document in documents:
        yield from document.split("\n")
    for path in instruct:
        text = path.read_text()
        rows = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
        for row in rows:
            for value in row.values():
                if isinstance(value, str):
                    yield from (f" {line}" for line in value.split("\n") if line)


def _write(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    logger.info("%s: %d rows, %.2f MB", path, len(documents), path.stat().st_size / 1e6)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="a folder of .txt files")
    parser.add_argument(
        "--instruct",
        type=Path,
        nargs="*",
        default=[],
        help="instruction files (.json, .jsonl) that the tokenizer learns from, too",
    )
    parser.add_argument("--work_dir", type=Path, required=True, help="where everything goes")
    args = parser.parse_args()
    for path in args.instruct:
        if not path.is_file():
            parser.error(f"--instruct {path}: no such file")
    return args


if __name__ == "__main__":
    main()
