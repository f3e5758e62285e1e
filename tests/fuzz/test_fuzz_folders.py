"""Fuzzed folders: routers, runs and their checkpoints, models with an index, published ones."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import fast_tokenizer, questions, write_lines
from families import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from mutations import (
    ODD_ENTRIES,
    ODD_TEXTS,
    changed_bytes,
    changed_json_file,
    changed_safetensors,
    put_odd_entry,
)
from outcome import Watched, ends_well, fuzzed
from safetensors.torch import save_file
from tiny_run import alone, router_trainer, tiny_config

from megaskip import RouterConfig, attach_routers, load_routers, save_routers
from megaskip.checkpoint import describe_base
from megaskip.checkpoint.base import describe_folder
from megaskip.checkpoint.resume import checkpoints, prune, read_state
from megaskip.checkpoint.run_tokenizer import other_tokenizer
from megaskip.checkpoint.stored_weights import read_stored_weights, weight_map_of
from megaskip.config import DataConfig, ModelConfig, RunConfig
from megaskip.config.commands.source import RouterSource, TextSource
from megaskip.config.run import CheckpointConfig
from megaskip.data import TokenizedData, build_dataset
from megaskip.export.folder import export_folder
from megaskip.export.published import import_published
from megaskip.parallel.inference import Placement, load_for_inference
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.loading.weight_check import check_weights
from megaskip.runs.source import find_routers, read_as, run_facts
from megaskip.training.initial_routers import with_initial_routers
from megaskip.training.run_folder import choose_run_folder, reopen, write_run_file

LAYERS = (1, 2, 4)


@dataclass(frozen=True)
class Folder:
    """A good folder, and a copy of it in which a file at a time is changed."""

    good: Path
    work: Path
    watched: Watched
    """Files beside the folder, which nothing in it may lead to."""

    def fresh(self) -> Path:
        """Return the copy, as good as the original."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.good, self.work)
        return self.work

    def with_changed(self, data: st.DataObject, *names: str) -> Path:
        """Return the copy, with one or two of its files changed: of `names`, if there are any."""
        folder = self.fresh()
        files = [p.relative_to(self.good) for p in self.good.rglob("*") if p.is_file()]
        among = [Path(name) for name in names] or sorted(files)
        for name in data.draw(
            st.lists(st.sampled_from(among), min_size=1, max_size=2, unique=True)
        ):
            change(folder / name, data)
        self.watched.was_opened()
        return folder


def change(file: Path, data: st.DataObject) -> None:
    """Change a good file in a way that its kind suggests, or put something else in its place."""
    if data.draw(st.integers(0, 5)) == 0:
        put_odd_entry(file, data.draw(st.sampled_from(ODD_ENTRIES)))
        return
    content = file.read_bytes()
    if file.suffix == ".json":
        strategy = changed_json_file(json.loads(content))
    elif file.suffix == ".safetensors":
        strategy = changed_safetensors(content)
    else:
        strategy = changed_bytes(content)
    file.write_bytes(data.draw(strategy))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Watched]]:
    """Yield a folder to work in, and the secrets beside it."""
    folder = tmp_path_factory.mktemp("folders")
    outside = folder / "outside"
    outside.mkdir()
    save_file({"secret": torch.ones(1)}, outside / "secret.safetensors")
    (outside / "secret").write_text("{}")
    watched = Watched(outside / "secret.safetensors", outside / "secret")
    yield folder, watched
    watched.close()


def made(scratch: tuple[Path, Watched], name: str, make: Callable[[Path], object]) -> Folder:
    folder, watched = scratch
    make(folder / f"good-{name}")
    return Folder(good=folder / f"good-{name}", work=folder / name, watched=watched)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


# -- router folders


@pytest.fixture(scope="module")
def router_folder(scratch: tuple[Path, Watched]) -> Folder:
    def make(path: Path) -> None:
        base = tiny_model()
        config = RouterConfig(granularity="mlp_token", layers="1-2,4", router="affine")
        routers = attach_routers(base, config)
        save_routers(path, routers, base=describe_base(base.config))

    return made(scratch, "routers", make)


@pytest.fixture(scope="module")
def base_folder(scratch: tuple[Path, Watched]) -> Folder:
    return made(scratch, "base", save_sharded)


def save_sharded(path: Path) -> None:
    """Save a tiny model as several shards with an index."""
    tiny_model().save_pretrained(path, max_shard_size="40KB")
    assert (path / "model.safetensors.index.json").is_file()


@fuzzed(200)
@given(st.data())
def test_router_folders(router_folder: Folder, base_folder: Folder, data: st.DataObject) -> None:
    folder = router_folder.with_changed(data)
    with ends_well():
        load_routers(tiny_model(), folder, register=False)
    with ends_well():
        with_initial_routers(RunConfig(model=ModelConfig(init_routers=str(folder))))
    with ends_well():
        find_routers(RouterSource(routers=folder, base=str(base_folder.good)))
    with ends_well():
        find_routers(RouterSource(routers=folder))
    output = folder.with_name("exported")
    with ends_well():
        export_folder(folder, base_folder.good, output, mode="adapter")
    shutil.rmtree(output, ignore_errors=True)


# -- run folders


@pytest.fixture(scope="module")
def run_folder(scratch: tuple[Path, Watched]) -> Folder:
    def make(path: Path) -> None:
        config = tiny_config(calibration_rows=0)
        with alone() as topology:
            router_trainer(path, topology, config).run()
        write_run_file(path, config, 1)

    return made(scratch, "run", make)


@fuzzed(200)
@given(st.data())
def test_run_folders(run_folder: Folder, router_folder: Folder, data: st.DataObject) -> None:
    folder = run_folder.with_changed(data)
    for resume in (None, "auto", str(folder / "step_000006")):
        with ends_well():
            settings = CheckpointConfig(output_dir=str(folder), resume=resume)
            choose_run_folder(RunConfig(checkpoint=settings))
    with ends_well():
        for checkpoint in checkpoints(folder):
            read_state(checkpoint)
    with ends_well():
        run_facts(folder)
    with ends_well():
        find_routers(RouterSource(run=folder))
    with ends_well():
        read_as(RouterSource(run=folder), TextSource(), Path("base"))
    with ends_well():
        other_tokenizer(None, folder, Path("nowhere"))
    with ends_well():
        reopen(folder)
        prune(folder, 1)


@fuzzed(100)
@given(st.data())
def test_resumed_checkpoints(run_folder: Folder, trainer: Any, data: st.DataObject) -> None:
    files = [f"step_000006/{name}" for name in CHECKPOINT_FILES]
    folder = run_folder.with_changed(data, *files)
    with ends_well():
        trainer.resume(folder / "step_000006")


CHECKPOINT_FILES = (
    "trainer.json",
    "optim.safetensors",
    "routers.safetensors",
    "router_config.json",
)


@pytest.fixture(scope="module")
def trainer(scratch: tuple[Path, Watched]) -> Iterator[Any]:
    with alone() as topology:
        yield router_trainer(scratch[0] / "resumed", topology, tiny_config(calibration_rows=0))


# -- models and their indexes


@fuzzed(200)
@given(st.data())
def test_model_folders(router_folder: Folder, base_folder: Folder, data: st.DataObject) -> None:
    folder = base_folder.with_changed(data)
    with ends_well():
        describe_folder(folder)
    with ends_well():
        for file in weight_map_of(folder).values():
            assert (folder / file).parent == folder
    output = folder.with_name("exported")
    with ends_well():
        export_folder(router_folder.good, folder, output, mode="copy")
    shutil.rmtree(output, ignore_errors=True)
    with ends_well():
        check_weights(resolve_source(ModelConfig(model=str(folder))))
    assert not base_folder.watched.was_opened(), "a file outside of the folder was read"


@fuzzed(200)
@given(st.sampled_from(ODD_TEXTS) | st.text(max_size=6), st.booleans())
def test_names_of_shards(
    router_folder: Folder, base_folder: Folder, shard: str, every: bool
) -> None:
    folder = base_folder.fresh()
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name in content["weight_map"] if every else [next(iter(content["weight_map"]))]:
        content["weight_map"][name] = shard
    index.write_text(json.dumps(content))
    base_folder.watched.was_opened()
    with ends_well():
        read_stored_weights(folder)
    output = folder.with_name("exported")
    with ends_well():
        export_folder(router_folder.good, folder, output, mode="copy")
    shutil.rmtree(output, ignore_errors=True)
    with ends_well():
        import_published(folder, output)
    shutil.rmtree(output, ignore_errors=True)
    assert not base_folder.watched.was_opened(), f"the shard {shard!r} was read"


@pytest.fixture(scope="module")
def exported(router_folder: Folder, base_folder: Folder, scratch: tuple[Path, Watched]) -> Folder:
    def make(path: Path) -> None:
        export_folder(router_folder.good, base_folder.good, path, mode="copy")

    return made(scratch, "exported-good", make)


@fuzzed(40)
@given(st.booleans(), st.data())
def test_folders_that_are_loaded(
    exported: Folder, base_folder: Folder, is_routed: bool, data: st.DataObject
) -> None:
    chosen = exported if is_routed else base_folder
    folder = chosen.with_changed(data)
    with ends_well():
        load_for_inference(str(folder), Placement.on(torch.device("cpu")))
    assert not chosen.watched.was_opened(), "a file outside of the folder was read"


# -- published routers


@pytest.fixture(scope="module")
def published(scratch: tuple[Path, Watched]) -> Folder:
    def make(path: Path) -> None:
        path.mkdir()
        tensors = {f"model.layers.{layer}.router.weight": torch.randn(1, 32) for layer in LAYERS}
        save_file(tensors, path / "model.safetensors")
        torch.save(tensors, path / "pytorch_model.bin")
        torch.save(tensors, path / "old.pt", _use_new_zipfile_serialization=False)
        config = {
            "model_type": "llama_mod",
            "num_hidden_layers": 6,
            "hidden_size": 32,
            "is_mod": [layer in LAYERS for layer in range(6)],
            "granularity": "attn_sequence",
            "threshold": 0.5,
            "mod_capacity": [0.25] * 6,
            "gradient_scale": 0.01,
        }
        (path / "config.json").write_text(json.dumps(config))

    return made(scratch, "published", make)


@fuzzed(200)
@given(st.data(), st.sampled_from((".", "model.safetensors", "pytorch_model.bin", "old.pt")))
def test_published_routers(published: Folder, data: st.DataObject, name: str) -> None:
    folder = published.with_changed(data)
    output = folder.with_name("imported")
    shutil.rmtree(output, ignore_errors=True)
    with ends_well():
        import_published(folder / name, output)


# -- tokenised data


@fuzzed(100)
@given(st.data())
def test_tokenised_data(scratch: tuple[Path, Watched], stored: Folder, data: st.DataObject) -> None:
    folder = stored.with_changed(data)
    with ends_well():
        tokenised = tokenise(scratch[0], folder)
        assert tokenised.train[0] is not None


def tokenise(scratch: Path, cache: Path) -> TokenizedData:
    """Return the data of a file, tokenised into the folder `cache` or read from there."""
    rows = write_lines(scratch / "rows.jsonl", questions(12))
    return build_dataset(DataConfig(data=(rows,), cache_dir=str(cache)), fast_tokenizer())


@pytest.fixture(scope="module")
def stored(scratch: tuple[Path, Watched]) -> Folder:
    return made(scratch, "stored", lambda path: tokenise(scratch[0], path))
