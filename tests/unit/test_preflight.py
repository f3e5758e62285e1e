"""Preflight names the node that differs or has too little."""

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megaskip.config import CheckpointConfig, ModelConfig, RouterConfig, RunConfig
from megaskip.errors import ConfigError, MegaskipError, RankError
from megaskip.parallel.heartbeat import HeartbeatMonitor
from megaskip.parallel.loading.source import choose_arithmetic, resolve_source
from megaskip.parallel.preflight import Report, checkpoint_bytes, find_problems, preflight
from megaskip.parallel.topology import Topology, _free_port, process_group, read_topology

GIB = 2**30


def report(rank: int, node: str, **changes: object) -> Report:
    one = Report(
        rank=rank,
        node=node,
        device="CPU",
        visible_devices=0,
        free_memory=10 * GIB,
        shares_memory=True,
        free_disk=10 * GIB,
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        config="a",
        data="b",
        model="c",
    )
    return dataclasses.replace(one, **changes)  # type: ignore[arg-type]


def test_a_first_rank_that_never_came_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**places, "MASTER_PORT": str(_free_port())}.items():
        monkeypatch.setenv(name, value)
    begun = time.monotonic()
    group = process_group(read_topology(places), timeout=1)
    with pytest.raises(RankError, match="rank 1 of 2 waited 1 s for the others at 127"), group:
        pass
    assert time.monotonic() - begun < 3


def four(**changes: object) -> list[Report]:
    """Return two nodes of two ranks, of which the last rank has `changes`."""
    return [report(0, "one"), report(1, "one"), report(2, "two"), report(3, "two", **changes)]


def problems_of(reports: list[Report], weights: int = 0, run_folder: int = GIB) -> list[str]:
    return find_problems(reports, weights_per_rank=weights, run_folder=run_folder)


def test_ranks_that_are_alike_pass() -> None:
    assert problems_of(four(), 2 * GIB) == []


def test_what_differs_is_named_with_its_node() -> None:
    for changes, what in [
        ({"versions": {"torch": "2.13.0", "transformers": "5.17.0"}}, "transformers"),
        ({"config": "x"}, "settings"),
        ({"data": "x"}, "training data"),
        ({"model": "x"}, "model's files"),
        ({"device": "H200"}, "device"),
    ]:
        (problem,) = problems_of(four(**changes))
        assert what in problem
        assert "rank 3 on node two" in problem


def test_ranks_of_a_node_share_its_memory() -> None:
    (problem,) = problems_of(four(free_memory=GIB), GIB)
    assert problem.startswith("node two: 1.00 GiB of memory free")
    gpus = [dataclasses.replace(one, shares_memory=False) for one in four(free_memory=2 * GIB)]
    assert problems_of(gpus, GIB) == []


def test_a_full_disk_is_noticed_where_checkpoints_are_written() -> None:
    reports = [report(0, "one", free_disk=1024), report(1, "two", free_disk=-1)]
    (problem,) = problems_of(reports)
    assert problem.startswith("node one: 0.00 GiB of disk free for --output_dir")


def test_checkpoints_need_what_trains_with_its_moments(tmp_path: Path) -> None:
    source = resolve_source(ModelConfig())
    hidden, routed = source.text_config.hidden_size, 4
    maps = {"granularity": "attn_sequence", "compensation": "low_rank", "compensation_rank": 16}
    for router, of_a_layer, moments_of in [
        ({}, hidden, hidden),
        (maps, hidden + hidden * (2 * 16 + 1), hidden + hidden * (2 * 16 + 1)),
        ({**maps, "budget": "static"}, hidden + hidden * (2 * 16 + 1), hidden * (2 * 16 + 1)),
    ]:
        config = RunConfig(router=RouterConfig(layers=routed, **router))
        needed = 3 * routed * (4 * of_a_layer + 8 * moments_of)  # --keep_last 2 and a new one
        assert checkpoint_bytes(config, source, tmp_path) == needed
    once = dataclasses.replace(config, checkpoint=CheckpointConfig(save_every=0))
    assert checkpoint_bytes(once, source, tmp_path) == needed // 3
    for step in (1, 2):
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / f"step_{step}/COMPLETE").touch()
    assert checkpoint_bytes(config, source, tmp_path) == needed // 3
    full = RunConfig(model=ModelConfig(train="full"))
    weights = sum(file.stat().st_size for file in source.folder.glob("*.safetensors"))
    parameters = weights // source.hf_config.dtype.itemsize
    assert checkpoint_bytes(full, source, tmp_path) == 12 * parameters


@pytest.mark.parametrize("device", [None, "cpu", "nvme"])
def test_weights_need_memory_where_they_are_kept(
    device: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of 1 GiB and a node of 9, for a model of 2 GiB."""
    free = {"cuda": GIB, "cpu": 9 * GIB}
    monkeypatch.setattr("megaskip.parallel.preflight.free_memory", lambda where: free[where.type])
    monkeypatch.setattr("megaskip.parallel.preflight._device_name", lambda where: "a GPU")
    monkeypatch.setattr("megaskip.parallel.preflight._weight_bytes", lambda folder: 2 * GIB)
    topology = read_topology({})
    on_gpu = dataclasses.replace(topology, device=torch.device("cuda"))
    zero: dict[str, Any] = {"stage": 3} | ({"offload_param": {"device": device}} if device else {})

    def checked() -> None:
        content = {"zero_optimization": zero}
        preflight(RunConfig(), on_gpu, tmp_path, resolve_source(ModelConfig()), "data", {}, content)

    with process_group(topology, timeout=60):
        if device is None:
            with pytest.raises(RankError, match="1.00 GiB of memory free"):
                checked()
            return
        checked()
        free["cpu"] = GIB
        if device == "nvme":
            checked()
        else:
            with pytest.raises(RankError, match="1.00 GiB of memory free"):
                checked()


@pytest.mark.parametrize(
    ("machine", "instructions", "dtype", "said"),
    [
        ("x86_64", False, torch.bfloat16, True),
        ("x86_64", True, torch.bfloat16, False),
        ("x86_64", False, torch.float32, False),
        ("aarch64", False, torch.bfloat16, False),
    ],
)
def test_a_cpu_that_emulates_bfloat16_is_said_to_be_slow(
    machine: str,
    instructions: bool,
    dtype: torch.dtype,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: instructions)
    slow = "--dtype float32 needs twice the memory"
    with caplog.at_level(logging.INFO):
        choose_arithmetic(dtype, torch.device("cpu"))
        assert (slow in caplog.text) == said
        caplog.clear()
        choose_arithmetic(dtype, torch.device("cuda"))
        assert slow not in caplog.text


def test_a_heartbeat_is_two_requests_however_many_ranks_there_are() -> None:
    """One for each rank would be a quarter of a million a second among 512, more than the store of
    the first rank answers: ranks would be taken for dead."""
    requests = []

    class Counted(torch.distributed.Store):
        def __getattribute__(self, name: str) -> Any:
            requests.append(name)
            return getattr(store, name)

    store, topology = torch.distributed.HashStore(), read_topology({"WORLD_SIZE": "512"})
    watch = HeartbeatMonitor(topology, silence=30)
    watch._store = Counted()
    for rank in range(topology.world_size):
        store.set(f"beat/{rank}", "1")
        watch._names[rank], watch._seen[rank] = f"rank {rank}", (b"", 0.0)
    assert watch._beat(2) is None
    assert [seen[0] for seen in watch._seen.values()] == [b"2"] + [b"1"] * 511
    assert len(requests) == 2, requests


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would say "invalid device ordinal" when the rank takes its device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}
    assert read_topology(ranks).device == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"rank 2 of its node \(LOCAL_RANK\), and it sees 2 GPU"):
        read_topology(ranks | {"RANK": "2", "LOCAL_RANK": "2"})


@pytest.mark.parametrize(("device", "fails"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_after_an_error_no_rank_waits_for_others_to_destroy_nccl(
    device: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    destroyed: list[bool] = []
    for name, value in {"MASTER_ADDR": "here", "MASTER_PORT": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: destroyed.append(True))
    topology = Topology(rank=0, world_size=2, local_rank=0, device=torch.device(device))
    with contextlib.suppress(MegaskipError), process_group(topology, timeout=1):
        if fails:
            raise MegaskipError("of one rank")
    assert destroyed == [True] * (device == "cpu" or not fails)
