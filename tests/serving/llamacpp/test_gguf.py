"""Folders of `--format decilm` as GGUF in llama.cpp: what transformers gives without the sublayers.

LLAMA_CPP_SOURCE is the folder of llama.cpp with its converter, SMOLLM2, where set, one of
SmolLM2-135M-Instruct.
"""

import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import sentencepiece
import torch
from served_models import COMMON, load
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaTokenizer

from megaskip.export.static_folder import export_static, require_exportable

ROOT = Path(__file__).resolve().parents[3]
SOURCE = Path(os.environ["LLAMA_CPP_SOURCE"])
OURS = (ROOT / "tools/make/decilm_to_gguf.py", SOURCE)
THEIRS = (SOURCE / "convert_hf_to_gguf.py",)
VOCAB = 768
ROPE = {
    "plain": {"rope_type": "default", "rope_theta": 5000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
DROPPED = {
    "attentions": {"attn": [1, 3, 4]},
    "blocks": {"attn": [2, 3], "mlp": [2, 3]},
    "last layer": {"attn": [3, 5], "mlp": [5]},
    "last attention": {"attn": [5], "mlp": []},
}
TEXTS = ("Routing per request saves operations, not weights.", "é 漢字: 3.14\n    x = 12", "a")
LENGTHS = (5, 9, 17, 33)
TOKENS = 16


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tokenizer.model and tokenizer.json of a SentencePiece tokenizer."""
    folder, model = tmp_path_factory.mktemp("tokenizer"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((ROOT / "docs/concepts.md").read_text("utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def write_base(folder: Path, tokenizer_files: Path, **options: Any) -> Path:
    """Write a tiny Llama whose sublayers move the residual as much as a trained model's do."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**COMMON, "vocab_size": VOCAB, **options})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    for path in tokenizer_files.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def without(base: Path, folder: Path, dropped: Mapping[str, Sequence[int]]) -> tuple[Path, Any]:
    """Return (folder in decilm's form, model of the hf form) of a base without some sublayers."""
    for form in ("hf", "decilm"):
        export_static(require_exportable(base, folder / form, form), folder / form, dropped)
    return folder / "decilm", load(folder / "hf")


def convert(folder: Path, output: Path, script: Sequence[Path]) -> Any:
    """Write a GGUF in float32 as a user does; whoever asks a question gets no answer."""
    flags = ["--outtype", "f32", "--outfile", output]
    return subprocess.run(
        [sys.executable, *map(str, [*script, folder, *flags])],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def converted(folder: Path, script: Sequence[Path] = OURS) -> Path:
    """Write a GGUF beside a folder."""
    output = folder.with_suffix(".gguf")
    done = convert(folder, output, script)
    assert done.returncode == 0, done.stderr
    return output


def run_greedily(path: Path, prompts: Sequence[Sequence[int]]) -> list[list[Any]]:
    """Return (token, logits) of each step of each prompt; only the last token's logits are asked
    for, as in generation."""
    engine = llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_threads=1,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,  # its default of 16 bit moves log-probabilities by 5e-4
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    answers = []
    for prompt in prompts:
        engine.reset()
        tokens, steps = list(prompt), []
        for _ in range(TOKENS):
            engine.eval(tokens)
            pointer = llama_cpp.llama_get_logits(engine.ctx)
            logits = np.ctypeslib.as_array(pointer, shape=(engine.n_vocab(),)).copy()
            tokens = [int(logits.argmax())]
            steps.append((tokens[0], torch.from_numpy(logits)))
        answers.append(steps)
    engine.close()
    return answers


@torch.no_grad()
def require_equal(
    model: Any, path: Path, prompts: Sequence[Sequence[int]], atol: float = 2e-5
) -> None:
    """Compare greedy tokens and log-probabilities of all tokens with those of transformers."""
    for prompt, steps in zip(prompts, run_greedily(path, prompts), strict=True):
        tokens = [token for token, _ in steps]
        expected = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        found = torch.stack([logits for _, logits in steps]).log_softmax(-1)
        difference = (found - expected.log_softmax(-1)).abs().max()
        print(f"largest difference of log-probabilities: {difference:.1e}")
        assert tokens == expected.argmax(-1).tolist()
        torch.testing.assert_close(found, expected.log_softmax(-1), rtol=0, atol=atol)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("dropped", DROPPED)
def test_llama_cpp_gives_the_tokens_of_transformers(
    dropped: str, rope: str, tokenizer_files: Path, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", tokenizer_files, rope_parameters=ROPE[rope])
    folder, model = without(base, tmp_path, DROPPED[dropped])
    # Theirs alone asks transformers for a config class, which it does not have for scaled rope.
    script = THEIRS if rope == "plain" else OURS
    require_equal(model, converted(folder, script), prompts())


def test_the_dense_model_differs_as_little(tokenizer_files: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tokenizer_files)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    require_equal(model, converted(base, THEIRS), prompts())


@pytest.mark.parametrize(
    "dropped, options",
    [
        ({"attn": [1], "mlp": [2, 4, 5]}, {}),
        ({"attn": [1, 3], "mlp": [3]}, {"head_dim": 64}),
        ({"attn": [5], "mlp": [2, 5]}, {"tie_word_embeddings": True}),
    ],
    ids=["MLPs", "head size", "tied"],
)
def test_our_converter_takes_what_theirs_does_not(
    dropped: Mapping[str, Sequence[int]],
    options: Mapping[str, Any],
    tokenizer_files: Path,
    tmp_path: Path,
) -> None:
    base = write_base(tmp_path / "base", tokenizer_files, **options)
    folder, model = without(base, tmp_path, dropped)
    require_equal(model, converted(folder), prompts())


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_text_becomes_the_tokens_of_transformers(
    file: str, tokenizer_files: Path, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", tokenizer_files)
    if file == "tokenizer.json":
        (base / "tokenizer.model").unlink()
    folder, _ = without(base, tmp_path, DROPPED["blocks"])
    require_equal_tokens(folder, converted(folder))


def require_equal_tokens(folder: Path, path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder.with_name("base"))
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in TEXTS:
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert engine.tokenize(text.encode(), add_bos=False) == expected
    engine.close()


def test_other_rotary_embeddings_are_refused(tokenizer_files: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    base = write_base(tmp_path / "base", tokenizer_files, rope_parameters=rope)
    folder, _ = without(base, tmp_path, DROPPED["blocks"])
    refused = convert(folder, tmp_path / "out.gguf", OURS)
    assert refused.returncode == 1
    assert "rope_type is linear, and the converter writes default and llama3" in refused.stderr
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 is no folder of the model")
def test_smollm2_with_its_byte_level_vocabulary(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.symlink_to(os.environ["SMOLLM2"])
    folder, model = without(base, tmp_path, {"attn": [5, 12, 20], "mlp": [20, 25]})
    path = converted(folder)
    require_equal_tokens(folder, path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    require_equal(model, path, [tokenizer(text).input_ids for text in TEXTS], atol=1e-3)
