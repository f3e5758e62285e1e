"""Make a small trained mixture of experts, for tests of --granularity expert_token at home.

    python tools/make/make_mixture.py --work_dir /tmp/mixture

writes the corpus of the demo (tools/make/make_demo.py) and work_dir/model: a Mixtral of 8 experts,
of which each token is given to 2, with the demo's tokenizer. 700 steps, about a quarter of an hour
on a core of its own. Knows no router of megaskip. Everything is seeded.
"""

import argparse
import json
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_demo
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

logger = logging.getLogger("make_mixture")

SEED = 13
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 176,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    # Keeps every expert in use while the mixture is trained, as Mixtral's own recipe does.
    "output_router_logits": True,
    "router_aux_loss_coef": 0.02,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}
TEXT_PASSES = 2
"""Weight of the text beside the conversations."""
ROWS, TOKENS = 8, 256
"""Of a step."""
STEPS = 700
LEARNING_RATE, WARM_UP = 3e-3, 50


def main() -> None:
    """Write the corpus, train the mixture on it and save it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = _parse()
    work, demo = args.work_dir, args.work_dir / "corpus"
    if not (demo / "instruct.jsonl").is_file():
        work.mkdir(parents=True, exist_ok=True)
        make_demo.make_corpus(work, demo)
    model, tokenizer = fresh_model()
    train(model, blocks(tokenizer, work, args.steps * ROWS))
    model.config.output_router_logits = False
    model.save_pretrained(work / "model", max_shard_size="8MB")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(make_demo.DEMO / "backbone" / name, work / "model" / name)


def fresh_model() -> tuple[Any, Any]:
    """Return a mixture with random weights and the tokenizer of the demo."""
    tokenizer = AutoTokenizer.from_pretrained(make_demo.DEMO / "backbone")
    torch.manual_seed(SEED)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    ids["pad_token_id"] = tokenizer.pad_token_id
    model = MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **ids, **MODEL))
    logger.info("mixture: %d parameters", sum(p.numel() for p in model.parameters()))
    return model, tokenizer


def blocks(tokenizer: Any, work: Path, count: int) -> torch.Tensor:
    """Return `count` rows of the corpus, int64 [count, TOKENS]: conversations and text, shuffled,
    one after the other."""
    texts = TEXT_PASSES * [(row["text"], False) for row in _rows(work / "text.jsonl")]
    texts += [(row["messages"], True) for row in _rows(work / "chats.jsonl")]
    random.Random(SEED).shuffle(texts)
    ids: list[int] = []
    for content, is_chat in texts:
        if len(ids) >= count * TOKENS:
            break
        if is_chat:
            ids += tokenizer.apply_chat_template(content, return_dict=False)
        else:
            ids += [*tokenizer(content)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids[: count * TOKENS]).view(count, TOKENS)


def train(model: Any, rows: torch.Tensor) -> None:
    """Train once over the rows; the rate falls to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    steps = len(rows) // ROWS
    for step in range(steps):
        rate = LEARNING_RATE * min((step + 1) / WARM_UP, 1.0) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = rows[step * ROWS : (step + 1) * ROWS]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            logger.info("step %d of %d: loss %.3f", step, steps, float(loss.detach()))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=Path("mixture_work"),
        help="where the corpus and the model go (default: mixture_work)",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training (default: {STEPS})")
    return parser.parse_args()


if __name__ == "__main__":
    main()
