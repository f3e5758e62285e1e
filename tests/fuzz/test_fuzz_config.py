"""Fuzzed settings: flags of every command, YAML files, DeepSpeed JSON."""

import contextlib
import importlib
import io
import json
import os
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import changed_bytes, changed_json, changed_json_file, odd_values
from outcome import ends_well, fuzzed

from megaskip.cli.main import COMMANDS, main
from megaskip.config import RunConfig, parse_run_config
from megaskip.config.layers import resolve_layers
from megaskip.config.options import flags_of
from megaskip.parallel.ds_config import read_ds_config, require_dtype, zero3_config
from megaskip.parallel.topology import read_topology

ROOT = Path(__file__).parents[2]
DS_CONFIGS = [json.loads(file.read_text()) for file in sorted(ROOT.glob("ds_configs/*.json"))]
RUN_FLAGS = flags_of(RunConfig)
GOOD_YAML: dict[str, Any] = {
    "model": "demo",
    "data": ["demo:0.5", "demo"],
    "layers": "2-4",
    "capacity": 0.5,
    "threshold": 0.5,
    "max_steps": 3,
    "lr": 1e-3,
    "packing": True,
    "pipeline_stages": 2,
    "pipeline_partition": "3",
    "capacity_low": 0.3,
    "compensation": "low_rank",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings") / "file"


def parser_of(command: str) -> Any:
    return importlib.import_module(COMMANDS[command].module).parse


PARSERS = {command: parser_of(command) for command in COMMANDS}
FLAGS = {
    command: sorted(flags_of(typing.get_type_hints(parser)["return"]))
    for command, parser in PARSERS.items()
}


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Return a command and arguments of which most are flags of its own."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    argv = []
    for name in draw(st.lists(st.sampled_from(FLAGS[command]), max_size=6)):
        value = draw(odd_values().map(str) | st.sampled_from(("1", "0.5", "1-3", "demo", "12,25")))
        argv += draw(
            st.sampled_from(
                ([f"--{name}", value], [f"--{name}={value}"], [f"--no-{name}"], [f"--{name}"])
            )
        )
    return command, argv + draw(st.lists(st.text(max_size=5), max_size=1))


@fuzzed(250)
@given(command_lines())
def test_command_lines(case: tuple[str, list[str]]) -> None:
    command, argv = case
    with ends_well(), helps():
        options = PARSERS[command](argv)
        if isinstance(options, RunConfig):
            use(options)


@fuzzed(120)
@given(
    st.lists(st.sampled_from([*COMMANDS, "--local_rank", "--local_rank=0"]) | st.text(), max_size=2)
)
def test_first_arguments(argv: list[str]) -> None:
    if any(argument in COMMANDS for argument in argv):
        argv = [*argv, "--help"]
    with ends_well(), helps(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", raise_exit)
        main(argv)


def raise_exit(status: int) -> None:
    assert status == 2
    raise SystemExit(status)


@contextlib.contextmanager
def helps() -> typing.Iterator[None]:
    """Let a block print its help and exit."""
    status: object = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        except SystemExit as end:
            status = end.code
    assert status in (0, 2, None)


def use(config: RunConfig) -> None:
    """Ask a run's settings for all that is worked out before a model is there."""
    resolve_layers(config.router.layers, 8)
    config.router.describe_threshold()
    config.parallel.boundaries()
    assert config.optim.compensation_lr_ratio >= 0


@fuzzed(250)
@given(
    changed_json(GOOD_YAML).map(lambda value: yaml.safe_dump(value).encode())
    | st.dictionaries(st.sampled_from(sorted(RUN_FLAGS)), odd_values(), max_size=4).map(
        lambda value: yaml.safe_dump(value).encode()
    )
    | changed_json_file(GOOD_YAML)
    | changed_bytes(yaml.safe_dump(GOOD_YAML).encode())
)
def test_yaml_files(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with ends_well():
        use(parse_run_config(["--config", str(file)]))


@fuzzed(250)
@given(
    st.sampled_from(DS_CONFIGS).flatmap(changed_json_file),
    st.sampled_from(
        ([], ["--pipeline_stages", "2"], ["--dtype", "bfloat16"], ["--micro_batch_size", "2"])
    ),
)
def test_deepspeed_json(file: Path, content: bytes, argv: list[str]) -> None:
    file.write_bytes(content)
    run = parse_run_config([*argv, "--ds_config", str(file)])
    for user in (run, None):
        with ends_well():
            checked = read_ds_config(str(file), user)
            assert checked is not None
            require_dtype(checked, "float32")
            zero3_config(checked, layer_numel=1000, largest_numel=2000)


LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@fuzzed(120)
@given(
    st.dictionaries(st.sampled_from(LAUNCHER), odd_values().map(str) | st.integers(0, 3).map(str)),
    st.integers(1, 3),
)
def test_environments_of_launchers(environment: dict[str, str], stages: int) -> None:
    with ends_well():
        read_topology(environment, num_stages=stages)
