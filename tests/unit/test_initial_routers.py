"""Trainings with compensations: they begin in closed form, or with the routers of a folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaskip import RouterConfig, save_routers
from megaskip.checkpoint.routers import read_router_config
from megaskip.cli.calibrate import main as calibrate
from megaskip.cli.train import main as train
from megaskip.config.cli import parse_run_config
from megaskip.errors import ConfigError
from megaskip.routing import RouterSet
from megaskip.training.initial_routers import with_initial_routers

FLAGS = ["--dtype", "float32", "--max_steps", "2", "--micro_batch_size", "4", "--seq_length", "64"]
FLAGS += ["--max_samples", "96", "--held_out", "16", "--calibration_rows", "32", "--no-progress"]
MAPS = ["--compensation", "low_rank", "--compensation_rank", "4", "--fit_rows", "32"]


def run(folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    """Train the demo for two steps; return the weights of its routers."""
    cache = ["--cache_dir", str(folder.parent / "cache")]
    train([*FLAGS, *cache, "--output_dir", str(folder), *flags])
    return load_file(folder / "routers/routers.safetensors")


def test_training_begins_with_maps_in_closed_form(tmp_path: Path) -> None:
    still = ["--lr", "0", "--compensation_lr", "0"]
    fitted = run(tmp_path / "fitted", *MAPS, *still)
    assert float(fitted["skip_routers.4.attn.compensation.up"].abs().max()) > 0
    fresh = run(tmp_path / "fresh", *MAPS, *still, "--fit_rows", "0")
    assert float(fresh["skip_routers.4.attn.compensation.up"].abs().max()) == 0


def test_routers_for_any_capacity_are_calibrated_with_their_maps(tmp_path: Path) -> None:
    sweeps = ["--capacity_low", "0.4", "--lr", "1e-2", "--layers", "3-6", "--calibration_rows", "0"]
    trained = run(tmp_path / "run", *MAPS, *sweeps)
    asked = ["--capacity", "0.8,0.5", "--rows", "32", "--dtype", "float32"]
    calibrate(["--run", str(tmp_path / "run"), *asked, "--output", str(tmp_path / "calibrated")])
    config, layers, _ = read_router_config(tmp_path / "calibrated")
    assert (layers, config.compensation, config.compensation_rank) == ((3, 4, 5, 6), "low_rank", 4)
    (less, low), (more, high) = config.calibrated
    assert (less, more) == (0.5, 0.8) and low > high
    after = load_file(tmp_path / "calibrated/routers.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in trained.items())
    assert float(after["skip_routers.4.attn.compensation.up"].abs().max()) > 0


def test_a_run_starts_from_the_routers_of_a_folder(tmp_path: Path) -> None:
    static = ["--budget", "static", "--layers", "4,6"]
    first = run(tmp_path / "first", *MAPS, *static)
    report = json.loads((tmp_path / "first/report.json").read_text())
    assert report["held_out"]["capacity"] == 0.0
    still = ["--lr", "0", "--compensation_lr", "0"]
    start = ["--init_routers", str(tmp_path / "first/routers")]
    second = run(tmp_path / "second", *start, *still)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    config, layers, _ = read_router_config(tmp_path / "second/routers")
    assert (layers, config.budget, config.compensation_rank) == ((4, 6), "static", 4)
    third = run(tmp_path / "third", *start, "--distill", "0.5")
    changed = {name for name in first if not torch.equal(first[name], third[name])}
    assert changed == {name for name in first if "compensation" in name}


def test_frozen_routers_decide_as_before_while_maps_learn(tmp_path: Path) -> None:
    first = run(tmp_path / "first", *MAPS, "--layers", "4,6", "--lr", "1e-2")
    start = ["--init_routers", str(tmp_path / "first/routers"), "--freeze_routers"]
    second = run(tmp_path / "second", *start, "--distill", "0.5", "--weight_decay", "0.1")
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {name for name in first if "compensation" in name}
    report = json.loads((tmp_path / "second/report.json").read_text())
    assert report["held_out"]["capacity"] == pytest.approx(0.5, abs=0.15)
    # A run from here trains its routers again, unless it is asked not to.
    config, _, _ = read_router_config(tmp_path / "second/routers")
    assert config.freeze_routers
    again = parse_run_config(["--init_routers", str(tmp_path / "second/routers")])
    assert not with_initial_routers(again).router.freeze_routers


def test_frozen_routers_begin_at_the_threshold_of_the_asked_capacity(tmp_path: Path) -> None:
    folder = tmp_path / "routers"
    config = RouterConfig(compensation="bias", calibrated=((0.5, 0.3), (0.8, 0.2)), threshold=0.3)
    save_routers(folder, RouterSet(config, (4, 6), 8))
    start = ["--init_routers", str(folder), "--freeze_routers"]
    asked = parse_run_config([*start, "--capacity", "0.8"])
    assert with_initial_routers(asked).router.threshold == 0.2
    other = parse_run_config([*start, "--capacity", "0.7"])
    with pytest.raises(ConfigError, match=r"capacity 0\.7 is not calibrated .*: 0\.5, 0\.8"):
        with_initial_routers(other)
    # Routers that learn find theirs.
    learning = parse_run_config([*start[:2], "--capacity", "0.7"])
    assert with_initial_routers(learning).router.threshold == 0.3


def test_frozen_routers_are_held_to_a_capacity_by_a_threshold_however_they_learnt(
    tmp_path: Path,
) -> None:
    save_routers(tmp_path, RouterSet(RouterConfig(compensation="bias", budget="layer"), (4, 6), 8))
    start = ["--init_routers", str(tmp_path)]
    for flags, budget in (([], "layer"), (["--freeze_routers"], "global")):
        config = with_initial_routers(parse_run_config([*start, *flags]))
        assert config.router.budget == budget


def test_frozen_routers_need_routers_and_something_that_learns(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--freeze_routers needs --init_routers FOLDER"):
        parse_run_config([*MAPS, "--freeze_routers"])
    start = ["--init_routers", str(tmp_path / "first/routers"), "--freeze_routers"]
    for more in (["--budget", "static"], ["--budget", "layer"], ["--capacity_low", "0.3"]):
        with pytest.raises(ConfigError, match=f"--freeze_routers does not go with {more[0]}"):
            parse_run_config([*start, *more])
    run(tmp_path / "first", "--layers", "4,6")
    with pytest.raises(ConfigError, match="--freeze_routers leaves nothing to learn"):
        with_initial_routers(parse_run_config(start))
    with_initial_routers(parse_run_config([*start, "--lora_rank", "2"]))


def test_flags_that_say_otherwise_than_the_folder_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "first", *MAPS, "--layers", "4,6")
    start = ["--init_routers", str(tmp_path / "first/routers")]
    for same in ("4,6", "6,4", "4-4,6"):
        config = parse_run_config([*start, "--layers", same])
        assert with_initial_routers(config).router.layers == (4, 6)
    with pytest.raises(ConfigError, match=r"--layers 4-6 is not what .* holds: \(4, 6\)"):
        with_initial_routers(parse_run_config([*start, "--layers", "4-6"]))
    with pytest.raises(ConfigError, match=r"--compensation_rank 8 is not what .* holds: 4"):
        run(tmp_path / "second", *start, "--compensation_rank", "8")
    assert not (tmp_path / "second").exists()


def test_no_rate_for_routers_is_none_for_compensations() -> None:
    with pytest.raises(ConfigError, match=r"--lr 0 keeps .*: --compensation_lr 0\.003 is scaled"):
        parse_run_config([*MAPS, "--lr", "0"])
    parse_run_config(["--lr", "0"])
    parse_run_config([*MAPS, "--lr", "0", "--compensation_lr", "0"])


def test_static_layers_without_a_map_have_nothing_to_learn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to learn"):
        run(tmp_path / "run", "--budget", "static")
