"""ZeRO-3, stages and replicas on ranks: one outcome for a model folder, and no rank that waits."""

import re
from pathlib import Path

import pytest
from broken_models import LOADED, REFUSED, with_pictures, write
from spawn import run_worker

ENGINES = [
    ["--ds_config", "ds_configs/zero3.json"],
    ["--ds_config", "ds_configs/pipeline.json", "--pipeline_stages", "2"],
    [],
]
STEP = ["--layers", "1-1", "--dtype", "float32"]
BROKEN = (
    *("int8", "block_fp8", "gptq", "fp8_alone", "prefix_module", "missing_weight", "missing_head"),
    *("tied_flag_real_head", "stale_single", "vocab_mismatch", "cut_off", "index_escapes"),
)
ODD = ("plain", "tied", "tied_by_head", "equal_head", "bare_names", "hub_cache")


def test_every_engine_on_ranks_has_the_same_outcome_for_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "snapshots"
    folders = [write(root / name, REFUSED[name][0]) for name in BROKEN]
    folders += [write(root / name, LOADED[name]) for name in ODD]
    folders.append(with_pictures(root / "with_pictures"))
    ranks = run_worker(
        "outcomes",
        2,
        models=[str(folder) for folder in folders],
        cases=[[*engine, *STEP] for engine in ENGINES],
    )
    first, other = ranks
    assert first == other
    *outcomes, told = first
    assert all("cannot read" in text and "nowhere" in text for text in told)
    for name, outcome in zip(BROKEN, outcomes, strict=False):
        assert len(set(outcome)) == 1, (name, outcome)
        assert re.search(REFUSED[name][1], str(outcome[0])), (name, outcome)
    for name, losses in zip((*ODD, "with_pictures"), outcomes[len(BROKEN) :], strict=True):
        assert losses == pytest.approx([losses[0]] * len(ENGINES), rel=1e-5), (name, losses)
