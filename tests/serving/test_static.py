"""Models without some sublayers in vLLM: what transformers gives, with less memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from served_models import (
    FAMILIES,
    LAYERS,
    generate,
    load,
    prompts,
    require_equal,
    served,
    static_folder,
    tiny_model,
)


@pytest.mark.parametrize(
    "target, maps", [("attn", "none"), ("block", "low_rank")], ids=["attn", "block with maps"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_gives_the_tokens_of_transformers(
    family: str, target: str, maps: str, tmp_path: Path
) -> None:
    folder = static_folder(tmp_path, family, target, maps)
    asked = prompts()
    with served(folder, enforce_eager=True) as engine:
        answers = generate(engine, asked)
    require_equal(load(folder), asked, answers)


def test_compiled_as_vllm_does_by_default(tmp_path: Path) -> None:
    folder = static_folder(tmp_path, "llama", "attn", "low_rank")
    command = [sys.executable, str(Path(__file__).with_name("compiled.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def test_mlps_with_biases_in_their_place(tmp_path: Path) -> None:
    folder = static_folder(tmp_path, "llama", "mlp", "bias")
    asked = prompts()
    with served(folder, enforce_eager=True) as engine:
        answers = generate(engine, asked)
    require_equal(load(folder), asked, answers)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_decilm_gives_the_tokens_of_transformers_without_the_plugin(
    family: str, tmp_path: Path
) -> None:
    folder = static_folder(tmp_path / "decilm", family, form="decilm")
    asked = prompts()
    with served(folder, enforce_eager=True, trust_remote_code=True) as engine:
        answers = generate(engine, asked)
    require_equal(load(static_folder(tmp_path / "hf", family)), asked, answers)


def test_dropped_attentions_leave_room_for_other_keys(tmp_path: Path) -> None:
    folder = static_folder(tmp_path, "llama")
    tiny_model("llama").save_pretrained(tmp_path / "dense")

    def room(path: Path) -> Any:
        with served(path, enforce_eager=True) as engine:
            return engine.llm_engine.vllm_config.cache_config.num_gpu_blocks

    depth = 6
    assert room(folder) / room(tmp_path / "dense") == pytest.approx(
        depth / (depth - len(LAYERS)), rel=0.01
    )
