"""States in front of the first routed layer: kept whole, read back as they were, and never for
other data, layers or weights."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file
from tiny_run import alone, tiny_config, tiny_engine, tiny_loader

from megaskip import RouterConfig
from megaskip.arch.prefix import FrozenPrefix
from megaskip.arch.task_loss import TaskLoss
from megaskip.cli.train import main as train
from megaskip.config import RunConfig, parse_run_config
from megaskip.data.row_states import RowStates, StatesInMemory, StatesOnDisk, make_folder
from megaskip.errors import ConfigError, DataError, MegaskipError
from megaskip.parallel.cached_prefix import first_reads
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.topology import Topology
from megaskip.reporting.summary import human_bytes
from megaskip.training import prefix as prefix_module
from megaskip.training import prefix_plan
from megaskip.training.prefix import PrefixCache
from megaskip.training.prefix_plan import describe_states, key_of

LENGTHS = np.array([3, 5, 2, 4])
HIDDEN = 8


def on_disk(folder: Path, dtype: torch.dtype = torch.bfloat16) -> StatesOnDisk:
    make_folder(folder, LENGTHS, HIDDEN, dtype, {})
    return StatesOnDisk(folder, LENGTHS, HIDDEN, dtype)


def row(number: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(int(LENGTHS[number]), HIDDEN, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_as_they_were_written_by_whoever_shares_the_folder(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    mine, theirs = on_disk(tmp_path / "key", dtype), on_disk(tmp_path / "key", dtype)
    assert mine.identity == theirs.identity
    for number, writer in ((2, mine), (0, theirs)):
        writer.write(number, row(number, dtype))
        assert not mine.present()[number], "a row that is not flushed is not there"
        writer.flush()
    assert mine.present().tolist() == theirs.present().tolist() == [True, False, True, False]
    for number in (0, 2):
        assert torch.equal(mine.read(number), row(number, dtype))
        assert torch.equal(theirs.read(number), row(number, dtype))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key"]


def test_damaged_states_are_refused_and_a_lost_row_is_not_there(tmp_path: Path) -> None:
    states = on_disk(tmp_path / "key")
    states.write(1, row(1))
    with pytest.raises(DataError, match="row 1 are damaged. Delete the folder"):
        states.read(1)  # as after a kill: written, and not marked
    states.flush()
    with open(tmp_path / "key" / "states.bin", "r+b") as file:
        file.seek(3 * HIDDEN * 2 + 5)
        file.write(b"\x7f")
    with pytest.raises(DataError, match="row 1 are damaged"):
        states.read(1)
    with pytest.raises(DataError, match="states.bin has not"):
        StatesOnDisk(tmp_path / "key", LENGTHS + 1, HIDDEN, torch.bfloat16)
    (tmp_path / "key" / "meta.json").write_text("[")
    with pytest.raises(DataError, match="damaged .* Delete the folder"):
        on_disk(tmp_path / "key")


def test_a_full_disk_is_one_line() -> None:
    states = object.__new__(StatesOnDisk)
    states.folder, states.dtype = Path("/states/key"), torch.bfloat16
    states._starts, states._files = [0, 16], {"states.bin": os.open("/dev/full", os.O_WRONLY)}
    with pytest.raises(DataError, match=r"--cache_prefix /states: .*No space left.* used again"):
        states.write(0, torch.zeros(1, HIDDEN))


def test_each_row_is_computed_by_the_first_that_reads_it() -> None:
    reads = [(0, [0, 1]), (1, [2, 3]), (0, [1, 2]), (1, [4, 0]), (0, [4])]
    present = np.array([False, True, False, False, False])
    assert first_reads(reads, present.copy(), rank=0) == [[0, 1]]
    assert first_reads(reads, present.copy(), rank=1) == [[2, 3], [4, 0]]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_layers_above_make_of_the_states_what_the_model_makes_of_tokens(family: str) -> None:
    model = tiny_model(family)
    prefix = FrozenPrefix(TaskLoss(model, chunk_tokens=64), 2)
    prefix.verify(torch.float32)
    with pytest.raises(MegaskipError, match="its hidden states are torch.float32, expected"):
        prefix.verify(torch.bfloat16)
    before = sum(parameter.numel() for parameter in model.parameters())
    prefix.leave_out()
    assert sum(parameter.numel() for parameter in model.parameters()) < before


def flags(tmp_path: Path, name: str, *more: str) -> list[str]:
    return [
        *("--data", str(tmp_path / "text.txt"), "--cache_dir", str(tmp_path / "tokens")),
        *("--seq_length", "32", "--micro_batch_size", "2", "--held_out", "4", "--lr", "1e-2"),
        *("--calibration_rows", "16", "--fit_rows", "8", "--distill", "0.5", "--eval_every", "5"),
        *("--compensation", "low_rank", "--compensation_rank", "2"),
        *("--no-tensorboard", "--no-progress", "--output_dir", str(tmp_path / name), *more),
    ]


def result(folder: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [[line[k] for k in ("loss_task", "grad_norm", "capacity")] for line in lines]
    held_out = json.loads((folder / "report.json").read_text())["held_out"]
    return [numbers, held_out], load_file(folder / "routers" / "routers.safetensors")


def test_a_run_learns_the_same_from_states_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs of rows of one length; the second run is killed while it computes states."""
    (tmp_path / "text.txt").write_text(" ".join(f"the {n} kings of {n % 31}" for n in range(70)))
    length, cached = ["--epochs", "2"], ["--cache_prefix", str(tmp_path / "states")]
    train(flags(tmp_path, "plain", *length))
    numbers, routers = result(tmp_path / "plain")

    class KilledError(Exception):
        pass

    def kill_after(states: StatesOnDisk, number: int, of_row: torch.Tensor) -> None:
        if len(states._written) == 4:
            raise KilledError
        write(states, number, of_row)

    write = StatesOnDisk.write
    monkeypatch.setattr(StatesOnDisk, "write", kill_after)
    with pytest.raises(KilledError):
        train(flags(tmp_path, "cached", *length, *cached))
    monkeypatch.undo()
    (folder,) = (tmp_path / "states").glob("*/")
    written = np.fromfile(folder / "checksums.bin", dtype=np.uint32)
    assert np.count_nonzero(written) == 4
    train(flags(tmp_path, "cached", *length, *cached, "--resume", "auto"))
    assert np.fromfile(folder / "checksums.bin", dtype=np.uint32)[written > 0].tolist() == (
        written[written > 0].tolist()
    )
    assert np.fromfile(folder / "checksums.bin", dtype=np.uint32).all(), "every row is read"
    capsys.readouterr()
    train(flags(tmp_path, "plan", *length, *cached, "--dry_run"))
    planned = f"{human_bytes((folder / 'states.bin').stat().st_size)} for {len(written)} rows"
    assert planned in " ".join(capsys.readouterr().out.split())
    train(flags(tmp_path, "memory", *length, "--cache_prefix", "memory"))
    for name in ("cached", "memory"):
        others, trained = result(tmp_path / name)
        assert others == numbers, name
        assert all(torch.equal(trained[key], value) for key, value in routers.items()), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--streaming", "--max_steps", "3"], "--cache_prefix does not go with --streaming"),
        (["--train", "full"], "--cache_prefix does not go with --train full"),
        (["--lora_rank", "4"], "--cache_prefix does not go with --lora_rank"),
        (["--pipeline_stages", "2"], "--cache_prefix does not go with --pipeline_stages 2"),
    ],
)
def test_what_has_no_prefix_is_refused(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_config(["--cache_prefix", "states", *more])


def test_too_little_room_is_planned_and_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"the {n} kings of {n % 31}" for n in range(70)))
    monkeypatch.setattr(prefix_plan, "room_in", lambda kept: 2048)
    cached = ["--cache_prefix", str(tmp_path / "states" / "deep"), "--epochs", "2"]
    train(flags(tmp_path, "plan", *cached, "--dry_run"))
    plan = " ".join(capsys.readouterr().out.split())
    assert "rows in front of layer 3" in plan and "2.00 KiB are free" in plan
    elsewhere = ["--tokenizer", str(tmp_path), "--max_steps", "3", "--dry_run"]
    train(flags(tmp_path, "plan", "--cache_prefix", "memory", *elsewhere))
    assert "prefix cache not known without the data" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(MegaskipError, match=r"it needs .* KiB, and 2.00 KiB are free there"):
        train(flags(tmp_path, "run", *cached))
    from_layer_0 = ["--granularity", "mlp_token", "--layers", "0-3"]
    with pytest.raises(ConfigError, match="routes layer 0"):
        train(flags(tmp_path, "run0", *cached, *from_layer_0))


def test_other_data_layers_types_attention_and_kernels_have_other_states() -> None:
    def key(data: str = "a", **settings: Any) -> str:
        config = RunConfig()
        for section, changes in settings.items():
            changed = dataclasses.replace(getattr(config, section), **changes)
            config = dataclasses.replace(config, **{section: changed})
        source = resolve_source(config.model)
        return key_of(describe_states(config, source, torch.device("cpu"), data))

    keys = [
        key(),
        key("b"),
        key(router={"layers": "2-5"}),
        key(model={"dtype": "float32"}),
        key(model={"attn_implementation": "eager"}),
        key(parallel={"compile": True}),
        key(
            model={"dtype": "float32"},
            parallel={"cache_prefix_dtype": "bfloat16", "cache_prefix": "x"},
        ),
    ]
    assert len(set(keys)) == len(keys)
    # What comes above does not matter.
    assert key(router={"layers": "3-5", "granularity": "mlp_token"}) == key()


def cache_of(states: RowStates, config: RunConfig, topology: Topology) -> PrefixCache:
    """Return the cache of a run of two steps whose lowest routed layer is 1."""
    return PrefixCache(
        config=config,
        topology=topology,
        first=1,
        dtype=torch.float32,
        states=states,
        total_steps=2,
    )


def test_a_second_run_waits_for_the_one_that_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop() -> None:
        raise Stop

    monkeypatch.setattr(prefix_module, "_WAIT", 0.01)
    config = dataclasses.replace(tiny_config(), router=RouterConfig(layers="1-4"))
    loader = tiny_loader(config)
    with alone() as topology:
        engine = tiny_engine(config, topology)
        hidden = engine.model.config.hidden_size
        make_folder(tmp_path / "key", loader.lengths(), hidden, torch.float32, {})
        states = StatesOnDisk(tmp_path / "key", loader.lengths(), hidden, torch.float32)
        cache = cache_of(states, config, topology)
        fill = {"progress": lambda rows, desc: rows}
        with filelock.FileLock(tmp_path / "key.lock"), pytest.raises(Stop):
            cache.fill(engine, loader, 0, check=stop, **fill)
        cache.fill(engine, loader, 0, check=lambda: None, **fill)
        assert states.present().any()


def test_teacher_and_student_read_a_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(tiny_config(distill=0.5), router=RouterConfig(layers="1-4"))
    loader = tiny_loader(config)
    read: list[int] = []

    def counted(states: StatesInMemory, number: int) -> torch.Tensor:
        read.append(number)
        return of_row(states, number)

    of_row = StatesInMemory.read
    monkeypatch.setattr(StatesInMemory, "read", counted)
    with alone() as topology:
        engine = tiny_engine(config, topology)
        hidden = engine.model.config.hidden_size
        states = StatesInMemory(len(loader.lengths()), hidden, torch.float32)
        cache = cache_of(states, config, topology)
        cache.fill(engine, loader, 0, progress=lambda rows, desc: rows, check=lambda: None)
        batches = next(loader.steps(0))
        engine.train_step(batches, 1e-2)
    assert read == [number for batch in batches for number in batch.row_numbers]


def test_memory_keeps_bfloat16_of_what_float32_computed() -> None:
    states = StatesInMemory(4, HIDDEN, torch.bfloat16)
    states.write(1, row(1, torch.float32))
    assert torch.equal(states.read(1), row(1, torch.float32).bfloat16())
    assert states.present().tolist() == [False, True, False, False]
