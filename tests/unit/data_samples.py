"""Tiny tokenizers and data files for the data tests, made in code."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from megaskip.data import Row
from megaskip.data.fields import Place
from megaskip.data.source import Source, read_every_row
from megaskip.errors import DataError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Without {% generation %} markers."""

MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}a b c\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Drops the reasoning of earlier turns, as Qwen3's does."""

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]

_WORDS = [
    "system user assistant tool hello world how are you today I am fine thanks",
    "what is two plus two the answer is four a b c d e f g h one three five",
]


def read_rows(source: Source) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Yield the rows of a source; raises the error of the first one that cannot be read."""
    for place, row in read_every_row(source):
        if isinstance(row, DataError):
            raise row
        yield place, row


def fast_tokenizer(template: str | None = CHATML, *, bos: bool = True) -> Any:
    """Return a byte-level BPE tokenizer; with `bos` it puts <s> before a text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_WORDS, trainer)
    return wrapped(tokenizer, bos=bos, template=template)


def wrapped(tokenizer: Tokenizer, *, bos: bool = False, template: str | None = None) -> Any:
    """Return a tokenizer as transformers has it; with `bos` it puts <s> before a text."""
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=template,
    )


def slow_tokenizer(folder: Path, template: str | None = CHATML) -> Any:
    """Return a SentencePiece tokenizer read from a tokenizer.model, without offsets."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_WORDS * 3),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        user_defined_symbols=SPECIAL[4:],
        pad_id=3,
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return SentencePieceBackend(
        vocab_file=str(path),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=template,
    )


def write_lines(path: Path, rows: Iterable[Any]) -> str:
    """Write rows as JSON lines and return the path as --data takes it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def questions(count: int, start: int = 0) -> list[dict[str, str]]:
    """Return different question/answer rows of different lengths."""
    return [
        {"question": f"what is {i}", "answer": f"the answer is {i}" + " fine" * (i % 5)}
        for i in range(start, start + count)
    ]


def learnt_text(row: Row, tokenizer: Any) -> str:
    """Return what the model learns in a row, as text."""
    return tokenizer.decode(row.input_ids[row.supervised].tolist())
