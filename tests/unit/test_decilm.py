"""DeciLM folders, which servers run: the base with the dropped sublayers forced off."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decilm_reference import load_decilm
from dropped_models import LAYERS, dropped_from, static, stored_names
from families import tiny_model
from routed_models import whole_ids

from megaskip.checkpoint.atomic import read_json
from megaskip.errors import UnsupportedModelError
from megaskip.export.decilm import ffn_mult, intermediate_size_of
from megaskip.export.static import sublayers

WIDE = {"intermediate_size": 256}  # what DeciLM can say
pytestmark = pytest.mark.usefixtures("own_modules_cache")


@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_decilm_folder_is_the_forced_base_for_a_server(
    family: str, target: str, tmp_path: Path
) -> None:
    folder, base = static(tmp_path, family, target, form="decilm", **WIDE)
    ids = whole_ids(2, 12)
    with torch.no_grad():
        found, expected = load_decilm(folder)(ids), base(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_decilm_config_says_what_each_layer_has(tmp_path: Path) -> None:
    folder, base = static(tmp_path, "mistral", "attn", form="decilm", **WIDE)
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert config["num_key_value_heads"] == base.config.num_key_value_heads
    assert config["rope_parameters"] == base.config.rope_parameters
    ffn = {"ffn_mult": 12.0, "no_op": False, "replace_with_linear": False}
    for index, block in enumerate(config["block_configs"]):
        no_op = index in LAYERS
        group = None if no_op else 2
        attention = {"n_heads_in_group": group, "no_op": no_op, "replace_with_linear": False}
        assert block == {"attention": attention, "ffn": ffn}
    norms = {f"model.layers.{layer}.input_layernorm.weight" for layer in LAYERS}
    assert not norms & stored_names(folder)
    assert "model.layers.1.post_attention_layernorm.weight" in stored_names(folder)


def test_decilm_ends_with_the_last_layer_that_computes_something(tmp_path: Path) -> None:
    model = tiny_model("llama", **WIDE)
    model.save_pretrained(tmp_path / "base")
    dropped_from(tmp_path, sublayers("block", [4, 5]), "decilm")
    config = read_json(tmp_path / "out/config.json")
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 4
    model.model.layers = model.model.layers[:4]
    ids = whole_ids(2, 12)
    with torch.no_grad():
        found, expected = load_decilm(tmp_path / "out")(ids), model.eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("qwen3", {}, "model_type is qwen3, expected llama or mistral"),
        ("llama", {}, "intermediate_size is 48, and ffn_mult stands for multiples of 256"),
        ("llama", {**WIDE, "attention_bias": True}, r"has biases \(model.layers.0.self_attn"),
        ("llama", {**WIDE, "hidden_act": "gelu"}, "hidden_act is gelu, expected silu"),
        ("mistral", {**WIDE, "sliding_window": 8}, "attention slides"),
    ],
)
def test_decilm_refuses_what_it_cannot_express(
    family: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        static(tmp_path, family, form="decilm", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=["plain", "llama3"],
)
def test_decilm_says_the_rotary_embedding_to_old_readers_and_new(
    scaling: dict[str, Any], tmp_path: Path
) -> None:
    rope = {"rope_theta": 5000.0, **scaling}
    folder, base = static(tmp_path, form="decilm", rope_parameters=rope, **WIDE)
    stored = read_json(folder / "config.json")
    assert stored["rope_theta"] == 5000.0
    assert stored.get("rope_scaling", {"rope_type": "default"})["rope_type"] == rope["rope_type"]
    loaded = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert loaded.rope_parameters == base.config.rope_parameters == rope


def test_multiplier_stands_for_the_sizes_of_published_models() -> None:
    sizes = {(4096, 14336), (4096, 11008), (8192, 28672), (5120, 13824), (2048, 5632), (576, 1536)}
    for hidden, size in sizes:
        mult = ffn_mult(size, hidden)
        assert mult is not None
        assert intermediate_size_of(mult, hidden) == size
    assert ffn_mult(28672, 8192) == 5.25  # as in Llama-3.1-Nemotron-51B
    assert ffn_mult(4864, 896) == 8.142857
    assert ffn_mult(352, 128) is None
