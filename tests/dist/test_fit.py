"""Maps and routers in closed form, and the order of dropped layers: the same on any ranks as on
one."""

from typing import Any

import pytest
import torch
from families import tiny_model
from spawn import run_worker

FLAGS = ["--layers", "1-4", "--compensation", "low_rank", "--compensation_rank", "4"]
FLAGS += ["--router", "affine"]
ENGINES = {
    "replicas": [],
    "ZeRO-3": ["--ds_config", "ds_configs/zero3.json"],
    "stages": ["--ds_config", "ds_configs/pipeline.json", "--pipeline_stages", "2"],
}
CASES = {
    f"{name}, {granularity}": [*FLAGS, "--granularity", granularity, *flags]
    for granularity in ("attn_sequence", "block_token")
    for name, flags in ENGINES.items()
}


def map_of(result: dict[str, Any], layer: int, target: str) -> torch.Tensor:
    prefix = f"{layer}.{target}.compensation"
    return result["maps"][f"{prefix}.up"] @ result["maps"][f"{prefix}.down"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tie_word_embeddings=False).save_pretrained(folder, max_shard_size="40KB")
    return str(folder)


@pytest.fixture(scope="module")
def alone(model: str) -> list[dict[str, Any]]:
    """Return what one process finds: per sequence, and blocks per token."""
    plain = [flags for name, flags in CASES.items() if name.startswith("replicas")]
    return run_worker("fitted", 1, model=model, cases=plain)[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_find_what_one_process_finds(
    ranks: int, model: str, alone: list[dict[str, Any]]
) -> None:
    results = run_worker("fitted", ranks, model=model, cases=list(CASES.values()))
    for rank in range(ranks):
        for number, (name, flags) in enumerate(CASES.items()):
            target = flags[flags.index("--granularity") + 1].split("_")[0]
            mine, truth = results[rank][number], alone[target == "block"]
            assert mine["goes_on"] == [True, True], name
            assert mine["dense"] == pytest.approx(truth["dense"], abs=1e-5), name
            assert [layer for layer, _ in mine["order"]] == [layer for layer, _ in truth["order"]]
            for (_, loss), (_, expected) in zip(mine["order"], truth["order"], strict=True):
                assert loss == pytest.approx(expected, abs=1e-4), name
            for layer in (1, 2, 3, 4):
                assert mine["explained"][layer] == pytest.approx(
                    truth["explained"][layer], abs=1e-4
                )
                found, expected = map_of(mine, layer, target), map_of(truth, layer, target)
                assert torch.allclose(found, expected, atol=1e-3), (name, layer)
                mine_cost, expected_cost = mine["costs"][layer], truth["costs"][layer]
                assert torch.allclose(mine_cost.weight, expected_cost.weight, atol=1e-4), (
                    name,
                    layer,
                )
                assert mine_cost.mean == pytest.approx(expected_cost.mean, abs=1e-5), (name, layer)
                assert mine_cost.explained == pytest.approx(expected_cost.explained, abs=1e-3)
