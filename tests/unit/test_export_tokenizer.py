"""An exported folder reads text as its base does."""

import hashlib
import json
from pathlib import Path

import pytest
from routed_models import export
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megaskip.data.tokenizer import load_tokenizer
from megaskip.export.folder import export_folder


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def byte_level_tokenizer() -> Tokenizer:
    """Return a tokenizer that splits digits as its file says, not as qwen2's class does."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\s\p{N}]+|\s+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["12345 I'm here", "don't 123 45"] * 30, trainer)
    return tokenizer


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    """Return a folder of routers and a qwen2 base whose tokenizer config names another class."""
    export("qwen2", tmp_path, mode="adapter")
    byte_level_tokenizer().save(str(tmp_path / "base/tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(named))
    return tmp_path


def test_an_exported_folder_reads_text_as_its_base_does(with_tokenizer: Path) -> None:
    """Which class reads tokenizer files depends on the model_type beside them."""
    export_folder(with_tokenizer / "routers", with_tokenizer / "base", with_tokenizer / "out")
    texts = ["I'm 12345 don't", "123 45"]
    theirs = load_tokenizer(with_tokenizer / "base")
    mine = load_tokenizer(with_tokenizer / "out")
    assert mine(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert mine.bos_token == "<s>"


def test_editing_the_tokenizer_of_an_exported_folder_leaves_the_base_alone(
    with_tokenizer: Path,
) -> None:
    file = with_tokenizer / "base/tokenizer.json"
    file.write_text(file.read_text() + " " * (1 << 20))  # as large as those of real models
    before = hashes(with_tokenizer / "base")
    export_folder(with_tokenizer / "routers", with_tokenizer / "base", with_tokenizer / "out")
    tokenizer = load_tokenizer(with_tokenizer / "out")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(with_tokenizer / "out")
    assert hashes(with_tokenizer / "base") == before


def test_all_chat_templates_come_along(with_tokenizer: Path) -> None:
    named = {"default": "{{ messages }}", "rag": "{{ messages }}x"}
    tokenizer = load_tokenizer(with_tokenizer / "base")
    tokenizer.chat_template = named
    tokenizer.save_pretrained(with_tokenizer / "base")
    export_folder(with_tokenizer / "routers", with_tokenizer / "base", with_tokenizer / "out")
    assert load_tokenizer(with_tokenizer / "out").chat_template == named
