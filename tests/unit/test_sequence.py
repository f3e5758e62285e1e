"""Which models and ranks can share the tokens of rows, told before weights are loaded; and how many
positions a model was made for."""

from pathlib import Path
from typing import Any

import pytest
from families import tiny_config

from megaskip.arch.positions import made_for_positions, too_long
from megaskip.config import ModelConfig, parse_run_config
from megaskip.errors import ConfigError
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.sequence import require_sequence_parallel
from megaskip.parallel.topology import alone, read_topology
from megaskip.training.dry_run import dry_run_lines

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "changes", "size", "says"),
    [
        ("llama", {}, 3, "3 does not divide the 4 attention heads of .*; take one of 2, 4$"),
        (
            "llama",
            {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 48},
            2,
            "neither divides the 3 key-value heads of .*; take one of 3, 6, 12$",
        ),
        (
            "llama",
            {"num_attention_heads": 1, "num_key_value_heads": 1},
            2,
            "does not divide the 1 attention heads of .*; leave the flag out$",
        ),
        ("llama", {"rope_parameters": DYNAMIC}, 2, "rope of type dynamic"),
        ("gpt_oss", {}, 2, "gpt_oss runs with eager; take --attn_implementation sdpa"),
        ("llama", {}, 4, None),  # key-value heads are repeated
        ("llama", {"rope_parameters": YARN}, 2, None),
        ("gpt_oss", {}, 1, None),
    ],
)
def test_models_whose_rows_cannot_be_shared_are_refused_without_their_weights(
    family: str, changes: dict[str, Any], size: int, says: str | None, tmp_path: Path
) -> None:
    tiny_config(family, **changes).save_pretrained(tmp_path)
    source = resolve_source(ModelConfig(model=str(tmp_path)))
    if says is None:
        require_sequence_parallel(source, size)
        return
    with pytest.raises(ConfigError, match=says) as error:
        require_sequence_parallel(source, size)
    assert str(error.value).count("--sequence_parallel_size") == 1


def test_neighbouring_ranks_share_rows() -> None:
    environment = {"WORLD_SIZE": "6", "RANK": "5"}
    topology = read_topology(environment, sequence_size=2)
    assert (topology.replica, topology.num_replicas, topology.sequence_rank) == (2, 3, 1)
    assert alone(topology).sequence_size == 1
    said = r"size 4 does not divide the 6 rank\(s\) of this job; .*, or take one of 2, 3, 6$"
    with pytest.raises(ConfigError, match=said):
        read_topology(environment, sequence_size=4)
    with pytest.raises(ConfigError, match=r"the 1 rank\(s\) .* of 2, or leave the flag out$"):
        read_topology({}, sequence_size=2)


def test_a_plan_names_the_sizes_that_its_ranks_can_have(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    config = parse_run_config(["--model", str(tmp_path), "--sequence_parallel_size", "4"])
    with pytest.raises(ConfigError, match=r"6 is not a multiple .*, or take one of 2, 3, 6$"):
        dry_run_lines(config, resolve_source(config.model), 6)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 128),
        (YARN, 512),
        (YARN | {"original_max_position_embeddings": 16}, 128),
        (LLAMA3, 128),
    ],
)
def test_positions_that_a_model_was_made_for_include_its_rope_scaling(
    rope: dict[str, Any], positions: int
) -> None:
    config = tiny_config("llama", rope_parameters=rope)
    assert made_for_positions(config) == positions
    assert too_long(config, positions) is None
    said = too_long(config, positions + 1)
    assert said is not None
    assert f"more than the {positions} positions" in said
    assert f"rope of type {rope['rope_type']}" in said
