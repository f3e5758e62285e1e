"""Settings of a wrong type or size, found by tests/fuzz: each is one message that names it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megaskip import RouterConfig
from megaskip.checkpoint.routers import read_router_config
from megaskip.checkpoint.run_tokenizer import other_tokenizer
from megaskip.config import resolve_layers
from megaskip.config.cli import parse_run_config
from megaskip.config.commands.source import RouterSource, TextSource
from megaskip.config.run import OptimConfig
from megaskip.data.fields import parse_json
from megaskip.errors import CheckpointError, ConfigError, MegaskipError, RankError
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.loading.source import DEMO_FOLDER, find_model_folder, resolve_source
from megaskip.parallel.topology import process_group, read_topology
from megaskip.reporting.metrics import MetricsWriter
from megaskip.runs.source import find_routers, read_as, run_facts

STORED = {
    "format": 1,
    "granularity": "attn_sequence",
    "layers": [1, 2],
    "capacity": 0.5,
    "threshold": 0.5,
    "pool": "prompt",
    "prompt_tokens": 32,
    "budget": "global",
    "penalty_weight": 0.1,
    "base_model": None,
}
BASE = {
    "name": "demo",
    "revision": None,
    "model_type": "llama",
    "num_layers": 12,
    "hidden_size": 64,
    "weights": None,
}
RUN = {
    "config": {
        "model": {"model": "demo", "tokenizer": None, "trust_remote_code": False},
        "data": {"data": ["demo"], "chat_template": None},
    },
    "steps": 1,
    "versions": {"megaskip": "0.2.0"},
}


@pytest.mark.parametrize("spec", ["0-999999999999", "9" * 5000, "\u00b2", "\u0663", "1_0"])
def test_layers_beyond_all_sizes_end_at_once(spec: str) -> None:
    with pytest.raises(ConfigError, match="--layers"):
        resolve_layers(spec, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calibration_rows: .inf", "calibration_rows is inf, expected int"),
        ("threshold: [demo]", "--threshold is .*demo.*, expected a number or a list of numbers"),
        ("data: &a [*a]", "data is .*, expected str"),
        ("layers: [a]", "--layers is .*a.*, expected"),
        ("model: [" * 5000, "not valid YAML"),
    ],
)
def test_values_of_a_yaml_file_have_the_types_of_the_flags(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve_layers(parse_run_config(["--config", str(tmp_path / "run.yaml")]).router.layers, 8)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (RouterConfig, {"capacity": "a"}, "--capacity is 'a', expected a number"),
        (RouterConfig, {"calibrated": 5}, "--calibrated is 5, expected a list"),
        (OptimConfig, {"max_steps": 10**400}, "--max_steps is 1000.*expected a whole number"),
        (OptimConfig, {"seed": 2**63}, "--seed is 9223.*, expected a whole number of 64 bits"),
        (OptimConfig, {"max_steps": 1.5}, "--max_steps is 1.5, expected a whole number"),
        (OptimConfig, {"lr": None}, "--lr is None, expected a number"),
    ],
)
def test_settings_made_in_python_have_the_annotated_types(
    kind: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        kind(**values)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000])
def test_json_without_end_is_not_valid_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_ds_config(str(tmp_path / "ds.json"))
    with pytest.raises(json.JSONDecodeError, match="too"):
        parse_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 5}, "layers is 5, expected a list of whole numbers"),
        ({"layers": ["a"]}, "layers is"),
        ({"capacity": [0.5]}, "--capacity is"),
        ({"granularity": {}}, "--granularity is {}, expected text"),
        ({"base_model": "llama"}, "base_model is 'llama', expected an object"),
        ({"base_model": {**BASE, "num_layers": "x"}}, "base_model.num_layers is 'x'"),
        ({"base_model": {**BASE, "name": ["a"]}}, "base_model.name is"),
    ],
)
def test_a_router_folder_with_a_wrong_value_names_it(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "router_config.json").write_text(json.dumps({**STORED, **changes}))
    with pytest.raises(CheckpointError, match=message):
        read_router_config(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        find_routers(RouterSource(routers=tmp_path))


@pytest.mark.parametrize(
    ("section", "content"),
    [("data", {"data": 5}), ("data", None), ("model", {"model": None}), ("versions", [])],
)
def test_a_run_folder_with_a_wrong_value_names_it(
    section: str, content: Any, tmp_path: Path
) -> None:
    changed = {**RUN, "config": {**RUN["config"], section: content}}  # type: ignore[dict-item]
    changed = {**RUN, section: content} if section in RUN else changed
    for name in ("report.json", "run.json"):
        (tmp_path / name).write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=f"report.json.*{section}"):
        run_facts(tmp_path)
    if section in RUN["config"]:  # type: ignore[operator]
        with pytest.raises(ConfigError, match=section):
            other_tokenizer(None, tmp_path, tmp_path)


def test_a_run_of_other_settings_is_not_read_as_if_it_were_ours(tmp_path: Path) -> None:
    model = {"model": "demo", "modell": "x"}
    (tmp_path / "report.json").write_text(json.dumps({"config": {"data": {}, "model": model}}))
    with pytest.raises(ConfigError, match="has no setting 'modell'; did you mean 'model'"):
        read_as(RouterSource(run=tmp_path), TextSource(), tmp_path)


@pytest.mark.parametrize("environment", [{"RANK": "a"}, {"WORLD_SIZE": "-1"}, {"RANK": "3"}])
def test_an_environment_that_no_launcher_makes_is_named(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(environment))):
        read_topology(environment)


def test_ranks_that_cannot_find_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "node-1")  # of a profile: this process was not launched
    with process_group(read_topology({}), timeout=60):
        assert os.environ["RANK"] == "0"
    many = {"RANK": "1", "WORLD_SIZE": "2"}
    for name in names:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="2 ranks .* lacks MASTER_ADDR, MASTER_PORT, RANK"):
        process_group(read_topology(many), timeout=60).__enter__()
    for name, value in {**many, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "a"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="MASTER_PORT is 'a', expected a whole number"):
        process_group(read_topology(many), timeout=60).__enter__()
    monkeypatch.setenv("MASTER_PORT", "70000")
    with pytest.raises(RankError, match="MASTER_PORT is 70000"):
        process_group(read_topology(many), timeout=60).__enter__()


def test_a_config_json_that_transformers_refuses_is_one_message(tmp_path: Path) -> None:
    content = json.loads((DEMO_FOLDER / "backbone/config.json").read_text())
    for name, value in (("num_hidden_layers", [6]), ("rope_parameters", 3), ("model_type", {})):
        (tmp_path / "config.json").write_text(json.dumps({**content, name: value}))
        config = parse_run_config(["--model", str(tmp_path)]).model
        with pytest.raises(MegaskipError, match=r"config\.json"):
            resolve_source(config, find_model_folder(config))


def test_damaged_lines_of_the_metrics_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ['{"step": 1}', '{"step": Infinity}', '{"step": 2}', '{"step": 3}', '{"ste']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with MetricsWriter(tmp_path, (), first_step=2, trackers={}) as metrics:
        assert [entry["step"] for entry in metrics.history] == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/metrics.jsonl, line 2 is damaged: it is removed"
    ]
