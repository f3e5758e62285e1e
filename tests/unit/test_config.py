"""Flags and files: every problem at once, with a suggestion; one owner for each value."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megaskip.config import (
    GRANULARITIES,
    RouterConfig,
    RunConfig,
    parse_run_config,
    resolve_layers,
)
from megaskip.config.options import flags_of
from megaskip.errors import ConfigError
from megaskip.parallel.ds_config import read_ds_config, require_dtype, zero3_config

DS_CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("zero3*.json"))


@pytest.mark.parametrize(
    ("spec", "depth", "expected"),
    [
        ("half", 32, range(15, 31)),
        (16, 32, range(15, 31)),
        ("16", 28, range(11, 27)),
        ("8-14,16", 32, [*range(8, 15), 16]),
        ([3], 6, [3]),
        ("3,", 6, [3]),
        ((5, 2), 6, [2, 5]),
    ],
)
def test_layers_are_a_count_of_the_deepest_but_the_last_or_a_list(spec, depth, expected) -> None:  # type: ignore[no-untyped-def]
    assert resolve_layers(spec, depth) == tuple(expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("40", "between 1 and 31"),
        ("8-40", "layer 32 is out of range, the model has layers 0 to 31"),
        ("9-8", "is empty"),
        ("a-3", "neither a number nor a range"),
        ("0", "between 1 and 31"),
    ],
)
def test_layers_that_do_not_exist_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--candidates '?{spec}'?: .*{message}"):
        resolve_layers(spec if spec in ("0", "40") else f"{spec},", 32, flag="candidates")
    with pytest.raises(ConfigError, match="--layers: the model has one layer"):
        resolve_layers("half", 1)


def test_all_problems_are_reported_at_once_with_suggestions() -> None:
    argv = ["--granularity", "atn_tokn", "--capacity", "1.5", "--laers", "3", "--lr", "-1"]
    with pytest.raises(ConfigError) as caught:
        parse_run_config(argv)
    text = str(caught.value)
    for part in (
        "did you mean 'attn_token'",
        "--capacity 1.5 is outside [0, 1]",
        "unknown flag --laers; did you mean '--layers'",
        "--lr -1 must be at least 0",
    ):
        assert part in text


@pytest.mark.parametrize("value", ["nan", "-0.1", "1.01"])
def test_capacity_outside_zero_to_one_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="capacity"):
        parse_run_config(["--capacity", value])


@pytest.mark.parametrize("flag", ["data", "output_dir", "layers", "chat_template"])
def test_an_empty_value_is_not_taken_for_a_flag_that_is_not_given(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} is empty; give a value, or leave"):
        parse_run_config([f"--{flag}", ""])


def test_flags_win_over_the_yaml_file_and_unknown_keys_are_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "capacity: 0.3\nlr: 1e-4\ndata: [a.json:2, b.json]\nlayers: 8-14\npacking: true\n"
    )
    config = parse_run_config(["--config", str(file), "--capacity", "0.7"])
    assert (config.router.capacity, config.optim.lr) == (0.7, 1e-4)
    assert config.data.data == ("a.json:2", "b.json")
    assert config.router.layers == "8-14"
    assert config.data.packing
    assert not parse_run_config(["--config", str(file), "--no-packing"]).data.packing
    file.write_text("revision: 1.10\nlayers: [4, 5]\ntokenizer:\nmax_steps: 1.0e+3\n")
    config = parse_run_config(["--config", str(file)])
    assert (config.model.revision, config.model.tokenizer) == ("1.10", None)
    assert (config.router.layers, config.optim.max_steps) == ((4, 5), 1000)
    file.write_text("lr: 1\nlr: 2\nmax_steps: 10.7\ndata: [null]\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: 'lr' is there twice") as error:
        parse_run_config(["--config", str(file)])
    assert "max_steps is 10.7, expected int" in str(error.value)
    assert "data is [None], expected str" in str(error.value)
    file.write_text("capactiy: 0.3\nlr: fast\nseed: 1.5.2\n")
    with pytest.raises(
        ConfigError, match="unknown key 'capactiy'; did you mean 'capacity'"
    ) as error:
        parse_run_config(["--config", str(file)])
    assert "lr is 'fast', expected float" in str(error.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", ""])
def test_yaml_that_is_no_set_of_flags_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="--config"):
        parse_run_config(["--config", str(file)])
    with pytest.raises(ConfigError, match="No such file"):
        parse_run_config(["--config", str(tmp_path / "none.yaml")])


def test_every_flag_is_explained() -> None:
    flags = flags_of(RunConfig).values()
    assert len(flags) > 40
    assert all(flag.doc for flag in flags)


def test_attention_that_is_told_of_all_rows_goes_with_dense_training_alone() -> None:
    flash, flex = (
        ["--attn_implementation", f"{n}"] for n in ("flash_attention_2", "flex_attention")
    )
    sparse = ["--train_execution", "sparse"]
    assert parse_run_config([*flash, *sparse]).leaves_out_skipped
    assert parse_run_config(["--packing", *flash]).data.packing
    for flags, named in ((["--packing", *flash], "--packing and "), (flex, "")):
        with pytest.raises(ConfigError, match=f"{named}--attn_implementation .* does not go with"):
            parse_run_config([*flags, *sparse])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--compile --ds_config zero3.json", "--compile does not go with --ds_config"),
        ("--compile --pipeline_stages 2", "--compile does not go with --pipeline_stages 2"),
        ("--compile --train full", "--compile does not go with --train full"),
        *(
            (f"--train full {flags}", f"{flags.split()[0]} does not go with --train full")
            for flags in (
                *("--init_routers fitted", "--distill 0.5", "--noise 0.1", "--temperature 2"),
                "--train_execution sparse",
            )
        ),
        *(
            (
                f"--sequence_parallel_size 2 {other}",
                f"--sequence_parallel_size 2 does not go with {other.split()[0]}",
            )
            for other in (
                *("--pipeline_stages 2", "--cache_prefix memory", "--compile", "--train full"),
                *("--packing", "--budget layer --granularity mlp_token"),
            )
        ),
        ("--train full --pipeline_stages 2", "--train full does not run in stages"),
        ("--train full --cache_prefix memory", "--cache_prefix does not go with --train full"),
        ("--cache_prefix memory --lora_rank 4", "--cache_prefix does not go with --lora_rank 4"),
    ],
)
def test_what_does_not_go_together_is_said_and_said_once(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run_config(flags.split())
    (problem,) = caught.value.problems
    assert problem.startswith(message)
    assert re.search("[;:] .*(leave|take|put|give)", problem), "it says what to change"


def test_seed_and_prompt_length_have_one_owner() -> None:
    config = parse_run_config(["--seed", "5", "--prompt_tokens", "9"])
    assert (config.optim.seed, config.data.seed) == (5, 5)
    assert (config.router.prompt_tokens, config.data.prompt_tokens) == (9, 9)


def test_router_config_names_target_and_unit() -> None:
    for granularity in GRANULARITIES:
        config = RouterConfig(granularity=granularity)
        assert f"{config.target}_{config.unit}" == granularity
    with pytest.raises(ConfigError, match="threshold"):
        RouterConfig(threshold=1.0)
    assert RouterConfig(threshold=(-40.0, 0.5)).describe_threshold() == "0.0000 to 0.5000 by layer"


def read_for_run(flags: list[str]) -> dict[str, Any] | None:
    run = parse_run_config(flags)
    return read_ds_config(run.parallel.ds_config, run)


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_deepspeed_files_are_accepted_and_resolved(path: Path) -> None:
    content = read_for_run(["--ds_config", str(path)])
    assert content is not None
    resolved = zero3_config(content, layer_numel=1000, largest_numel=5000)
    assert resolved["zero_optimization"]["stage"] == 3
    assert "auto" not in json.dumps(resolved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 7}, "to 7, but --micro_batch_size is 4"),
        ({"gradient_clipping": 0.5}, "to 0.5, but --max_grad_norm is 1.0"),
        ({"optimizer": {"type": "Adam"}}, "has a section 'optimizer'"),
        ({"train_batch_size": 64}, "train_batch_size"),
        ({"zero_optimization": {"stage": 2}}, "has ZeRO stage 2, expected 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {}}}, "offload_optimizer"),
        ({"fp16": {"enabled": True}}, "enables fp16"),
        ({"bf16": {"enabled": True}}, "enables bf16, but --dtype is float32"),
        ({"bf16": True}, "bf16 must be an object, found True"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": None}},
            "zero_optimization.offload_param must be an object, found None",
        ),
        ({"comms_loger": {}}, "no effect here; remove it; did you mean 'comms_logger'?"),
        ({"activation_checkpointing": {}}, "sets activation_checkpointing, which has no effect"),
    ],
)
def test_deepspeed_json_that_contradicts_the_flags_names_both_values(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, **change}))
    with pytest.raises(ConfigError) as error:
        read_for_run(["--ds_config", str(file), "--dtype", "float32"])
    assert message in str(error.value)


def test_equal_values_in_the_deepspeed_json_are_no_conflict(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    content = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2}
    file.write_text(json.dumps(content))
    read_for_run(["--ds_config", str(file), "--micro_batch_size", "2"])


def test_a_job_that_does_not_train_takes_no_batch_size_from_the_deepspeed_json(
    tmp_path: Path,
) -> None:
    file = tmp_path / "ds.json"
    content = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 7}
    file.write_text(json.dumps(content))
    assert read_ds_config(str(file)) == content
    for change, message in (
        ({"zero_optimization": {"stage": 2}}, "has ZeRO stage 2, expected 3"),
        ({"optimizer": {}}, "has a section 'optimizer'"),
        ({"fp16": {"enabled": True}}, "enables fp16"),
        ({"pipeline": {"stages": 2}}, "is for a pipeline"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(ConfigError, match=message):
            read_ds_config(str(file))


def test_broken_or_missing_deepspeed_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text("{")
    array = tmp_path / "array.json"
    array.write_text("[]")
    for path, message in (
        (file, "not valid JSON"),
        (array, "must be an object"),
        (tmp_path / "no.json", "No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_for_run(["--ds_config", str(path)])


@pytest.mark.parametrize(("asked", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_deepspeed_json_that_contradicts_the_stored_type_is_refused(
    asked: bool, dtype: str
) -> None:
    with pytest.raises(ConfigError, match=f"to {asked}, but the backbone is loaded as {dtype}"):
        require_dtype({"bf16": {"enabled": asked}}, dtype)
    for same in ({}, {"bf16": {"enabled": "auto"}}, {"bf16": {"enabled": not asked}}):
        require_dtype(same, dtype)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_are_finite(value: str) -> None:
    for flag in ("--lr", "--epochs", "--temperature", "--noise", "--penalty_weight"):
        with pytest.raises(ConfigError, match=f"{flag} {value} must be a finite number"):
            parse_run_config([flag, value])


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        ({"overlap_com": True}, "no setting 'overlap_com'; did you mean 'overlap_comm'"),
        ({"stage3_max_live_parameters": "many"}, "is not DeepSpeed's"),
        ({"offload_param": {"device": "gpu"}}, "is not DeepSpeed's"),
        ({"offload_param": {"device": "nvme"}}, "needs an nvme_path"),
    ],
)
def test_what_deepspeed_would_refuse_is_refused_at_once(
    zero: dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
    with pytest.raises(ConfigError, match=says):
        read_for_run(["--ds_config", str(file)])


def test_settings_of_the_deepspeed_engine_which_never_runs_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    content = {"zero_optimization": {"stage": 3}, "communication_data_type": "fp16"}
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="communication_data_type"):
        read_for_run(["--ds_config", str(file)])
