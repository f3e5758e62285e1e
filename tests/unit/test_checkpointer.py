"""A checkpoint gives back all that trains, and refuses a run that it is not of."""

import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import alone, full_trainer, router_trainer, tiny_config

from megaskip.config import RunConfig
from megaskip.errors import CheckpointError
from megaskip.parallel.topology import Topology
from megaskip.training.loop import Trainer


def trained(folder: Path, topology: Topology) -> Trainer:
    """Return a trainer that has taken three steps."""
    trainer = router_trainer(folder, topology, tiny_config())
    for _, batches in zip(range(3), trainer.loader.steps(0), strict=False):
        trainer.tokens += trainer.engine.train_step(batches, 1e-2, 0.5).tokens
        trainer.step += 1
    return trainer


def test_a_fresh_engine_gets_weights_optimizer_and_steering_back(tmp_path: Path) -> None:
    with alone() as topology:
        before = trained(tmp_path, topology)
        path = before.save()
        after = router_trainer(tmp_path, topology, tiny_config())
        after.resume(path)
        assert (after.step, after.tokens) == (3, before.tokens)
        for name, parameter in before.engine.parameters.items():
            other = after.engine.parameters[name]
            assert torch.equal(parameter, other)
            states = before.engine.optimizer.state[parameter], after.engine.optimizer.state[other]
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(states[0][kind], states[1][kind]), (name, kind)
        state = before.checkpointer.state(step=3, tokens=before.tokens)
        assert after.checkpointer.state(step=3, tokens=after.tokens) == state
        assert state.steering["spread"] > 0


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    with alone() as topology:
        checkpointer = router_trainer(tmp_path, topology, tiny_config()).checkpointer
        for step in (1, 2, 3):
            checkpointer.save(step, tokens=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000002", "step_000003"]


def other(**router: Any) -> RunConfig:
    """Return the settings of a run of other routers."""
    config = tiny_config()
    return dataclasses.replace(config, router=dataclasses.replace(config.router, **router))


@pytest.mark.parametrize(
    "config, message",
    [
        (tiny_config(seed=3), "--seed differs from the run that wrote it"),
        (other(layers="2-4"), "--layers differs from the run that wrote it"),
        (other(threshold=0.6), "its thresholds are 0.5.*, with these flags they are 0.6"),
        (other(threshold=(0.5, 0.5, 0.5, 0.7)), "with these flags they are 0.5000 to 0.7000"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    config: RunConfig, message: str, tmp_path: Path
) -> None:
    with alone() as topology:
        path = router_trainer(tmp_path / "one", topology, tiny_config()).save()
        refusing = router_trainer(tmp_path / "other", topology, config)
        with pytest.raises(CheckpointError, match=message):
            refusing.resume(path)
        assert refusing.step == 0


def test_other_data_are_refused(tmp_path: Path) -> None:
    with alone() as topology:
        trainer = router_trainer(tmp_path, topology, tiny_config())
        path = trainer.save()
        other = dataclasses.replace(trainer.checkpointer, data_fingerprint="others")
        with pytest.raises(CheckpointError, match="the data are others"):
            other.resume(path)


def test_steering_that_lacks_a_number_is_named(tmp_path: Path) -> None:
    with alone() as topology:
        path = trained(tmp_path, topology).save()
        state = json.loads((path / "trainer.json").read_text())
        del state["steering"]["spread"]
        (path / "trainer.json").write_text(json.dumps(state))
        after = router_trainer(tmp_path, topology, tiny_config())
        with pytest.raises(CheckpointError, match="trainer.json is damaged: .* lacks 'spread'"):
            after.resume(path)


def test_a_trained_model_replaces_an_older_one_whole_or_not_at_all(tmp_path: Path) -> None:
    older = tmp_path / "model/older"
    older.parent.mkdir()
    older.touch()
    with alone() as topology:
        weights = full_trainer(tmp_path, topology, tiny_config()).checkpointer.weights
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # as a disk that is full
        try:
            with pytest.raises(CheckpointError, match="cannot write .*model: "):
                weights.save_result(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert list(tmp_path.rglob("*")) == [older.parent, older]
        weights.save_result(tmp_path)
    assert not older.exists() and (older.parent / "model.safetensors").is_file()
