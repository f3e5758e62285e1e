"""What skipping costs, measured by several ranks, is what one process measures."""

from pathlib import Path

import pytest
import torch
from families import tiny_model
from spawn import run_worker

ZERO3 = ["--ds_config", "ds_configs/zero3.json"]


def test_ranks_and_zero3_find_the_thresholds_of_one_process(tmp_path: Path) -> None:
    """Seven batches on two ranks: the second has one less, and takes part in every forward."""
    tiny_model("llama").save_pretrained(tmp_path)
    cases = [[], ZERO3]
    (truth,) = run_worker("allocated", 1, model=str(tmp_path), cases=[[]])[0]
    units = truth["logits"][0].argsort()
    for rank in run_worker("allocated", 2, model=str(tmp_path), cases=cases):
        for found in rank:
            order = found["logits"][0].argsort()
            for name in ("logits", "costs"):
                torch.testing.assert_close(
                    found[name][:, order], truth[name][:, units], rtol=1e-4, atol=1e-4
                )
            assert found["kept"] == truth["kept"]
            assert found["threshold"] == pytest.approx(truth["threshold"], rel=1e-3)
