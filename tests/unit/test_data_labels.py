"""Where a prompt ends and an answer begins depends on no tokenizer: generated templates, texts and
tokenizers."""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_samples import SPECIAL, slow_tokenizer, wrapped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from megaskip.data import Row, collate
from megaskip.data.fields import Fields, Place
from megaskip.data.formats import detect_format, normalise
from megaskip.data.tokenize import SampleTokenizer

WORDS = [
    "fine",
    "the answer",
    "a",
    "is",
    "four",
    "USER: ",
    "ASSISTANT: ",
    "assistant",
    "it's",
    "42",
]
"""Words that tokenizers learn, with what may stand around a border."""
TEXT = (" ".join(WORDS) + " ASSISTANT: fine ASSISTANT: the answer</s>\n\nfine\n\n### a\n\n") * 8

ATOMS = [
    *WORDS,
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    ":",
    "\u4f60\u597d",
    "\U0001f600",
    "'s",
    "<",
    "_",
    "0",
]


# Llama 3's and Qwen's: line breaks are taken together with what is before them.
LINES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    *, prefix: bool = False, regex: bool = True, bos: bool = False, split: str | None = None
) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    if split is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return wrapped(tokenizer, bos=bos)


def metaspace(scheme: str, *, split: bool = False) -> Any:
    """Return a tokenizer as SentencePiece's become a tokenizer.json; `scheme` says where it adds a
    space, "normalizer" is how Llama 2's older files do that."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=split)
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    trained.train_from_iterator(TEXT.split("\n"), trainer)
    learnt = json.loads(trained.to_str())["model"]
    model = models.BPE(
        learnt["vocab"],
        [tuple(pair) for pair in learnt["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(SPECIAL)
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrapped(tokenizer, bos=True)


def unigram() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = sorted(set("".join(ATOMS)) - {" "})
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.split("\n") * 4, trainer)
    return wrapped(tokenizer, bos=True)


def word_level() -> Any:
    vocabulary = [*SPECIAL, *{word for atom in ATOMS for word in atom.split()}, "USER", "ASSISTANT"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    return wrapped(tokenizer)


def slow(**options: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = slow_tokenizer(Path(folder), None)
    return tokenizer


TOKENIZERS = {
    "bytes": byte_level,
    "bytes of lines": functools.partial(byte_level, split=LINES, bos=True),
    "bytes without words": functools.partial(byte_level, regex=False, bos=True),
    "bytes with a first space": functools.partial(byte_level, prefix=True),
    "metaspace": functools.partial(metaspace, "never"),
    "metaspace of words": functools.partial(metaspace, "always", split=True),
    "metaspace, first": functools.partial(metaspace, "first"),
    "metaspace, always": functools.partial(metaspace, "always"),
    "metaspace, normalizer": functools.partial(metaspace, "normalizer"),
    "unigram": unigram,
    "words": word_level,
    "slow": slow,
}
LOSSY = ("unigram", "words", "slow")
"""Tokenizers that do not give a text back with its white space."""


@functools.cache
def tokenizer_of(name: str) -> Any:
    return TOKENIZERS[name]()


ODDITIES = {
    "": "",
    "counts": "{{ messages | length }} ",
    "system": "{% if messages[0].role != 'system' %}You are fine.\n{% endif %}",
    "second end": "",
    "marks": "",
    "marks all": "",
}
"""Kind of template -> what it prints first."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a generated template prints a chat."""

    begin: str
    header: str
    gap: str
    """Between a header and the text of a turn."""
    end: str
    prompt: str
    """What makes a model answer; "nothing" is a template without that."""
    trims: bool
    """Whether the white space around a turn is left out."""
    oddity: str
    """What else the template does, one of ODDITIES."""

    @property
    def source(self) -> str:
        """The template."""
        content = "m.content | trim" if self.trims else "m.content"
        header = self.header.replace("ROLE", "{{ m.role }}")
        text, end = f"{{{{ {content} }}}}", self.end
        if self.oddity == "marks" and self.end.strip():
            text = f"{{% generation %}}{text}{{% endgeneration %}}"
        if self.oddity == "marks all":
            text, end = f"{{% generation %}}{text}{end}{{% endgeneration %}}", ""
        # Marks are around the assistant's turns only.
        asked = f"{{% if m.role == 'user' %}}{header}{self.gap}{{{{ {content} }}}}{self.end}"
        turns = f"{asked}{{% else %}}{header}{self.gap}{text}{end}{{% endif %}}"
        begin = self.begin + ODDITIES[self.oddity]
        if self.oddity == "second end" and self.end.strip():
            turns += "{% if loop.last and not add_generation_prompt %}<|im_start|>{% endif %}"
        prompt = f"{{% if add_generation_prompt %}}{self.prompt_text}{{% endif %}}"
        return f"{begin}{{% for m in messages %}}{turns}{{% endfor %}}{prompt}"

    @property
    def prompt_text(self) -> str:
        header = self.header.replace("ROLE", "assistant")
        if self.prompt == "nothing":
            return ""
        # Jinja leaves out a line break at the end of a template only.
        return header.rstrip() if self.prompt == "stripped" else header + self.prompt

    def answer(self, content: str) -> str:
        """Return what is to be learnt of a turn."""
        end = self.end.rstrip() or self.end
        return (content.strip() if self.trims else content) + end


FORMATS = st.builds(
    Format,
    begin=st.sampled_from(["", "<s>"]),
    header=st.sampled_from(
        ["<|im_start|>ROLE\n", "<|im_start|>ROLE", "ROLE: ", "ROLE:", "### ROLE\n\n", "[ROLE]"]
    ),
    gap=st.sampled_from(["", "", " ", "\n"]),
    end=st.sampled_from(["<|im_end|>\n", "<|im_end|>", "</s>", " </s>", "\n", "\n\n", ""]),
    prompt=st.sampled_from(["", "", "stripped", " ", "\n", "<think>\n", "<think>", "nothing"]),
    trims=st.booleans(),
    oddity=st.sampled_from(["", *ODDITIES]),
)
CONTENTS = st.lists(st.sampled_from(ATOMS), min_size=1, max_size=6).map("".join)
ANSWERS = CONTENTS.filter(str.strip)


def rows_of(messages: list[dict[str, Any]], tokenizer: Any, source: str) -> tuple[Row, ...]:
    tokenizer.chat_template = source
    fields = Fields({"messages": messages}, Place(file="a.jsonl", number=1))
    sample = normalise(fields, format_name=detect_format(fields))
    return SampleTokenizer(tokenizer, seq_length=4096).tokenise(sample, source=0).rows


def runs_of(row: Row) -> list[tuple[int, int]]:
    """Return (start, end) of each unbroken stretch of learnt tokens."""
    on = [False, *row.supervised.tolist(), False]
    starts = [i for i in range(len(on) - 1) if on[i + 1] and not on[i]]
    ends = [i for i in range(len(on) - 1) if on[i] and not on[i + 1]]
    return list(zip(starts, ends, strict=True))


def text_between(tokenizer: Any, ids: list[int], start: int, end: int) -> str:
    before, whole = tokenizer.decode(ids[:start]), tokenizer.decode(ids[:end])
    assert whole.startswith(before)
    return whole[len(before) :]


def squashed(text: str) -> str:
    return "".join(text.split())


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    form=FORMATS,
    turns=st.lists(st.tuples(CONTENTS, ANSWERS, st.booleans()), min_size=1, max_size=3),
)
def test_answers_and_their_end_tokens_are_learnt_and_prompts_are_those_of_generation(
    name: str, form: Format, turns: list[tuple[str, str, bool]]
) -> None:
    tokenizer = tokenizer_of(name)
    messages: list[dict[str, Any]] = []
    for question, answer, on in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "train": on})
    rows = rows_of(messages, tokenizer, form.source)
    learnt = [2 * i + 1 for i, (_, _, on) in enumerate(turns) if on]
    answers = iter(learnt)
    for row in rows:
        ids, runs = row.input_ids.tolist(), runs_of(row)
        batch = collate([row], pad_token_id=0, prompt_tokens=32)
        assert not (batch.prompt_mask & (batch.labels != -100)).any()
        for number, (start, end) in enumerate(runs):
            index = next(answers)
            chat = [{"role": m["role"], "content": m["content"]} for m in messages[:index]]
            if number == 0:
                prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
                assert ids[: row.prompt_length] == list(prompt["input_ids"])
            expected = form.answer(messages[index]["content"])
            if name not in LOSSY:
                text = text_between(tokenizer, ids, start, end)
                blank = text.removesuffix(expected)
                assert text.endswith(expected) and not blank.strip()
            else:
                alone = tokenizer.decode(tokenizer(expected, add_special_tokens=False).input_ids)
                assert squashed(tokenizer.decode(ids[start:end])) == squashed(alone)
    assert next(answers, None) is None
