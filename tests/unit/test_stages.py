"""A model cut into stages: the same states in every family, its own weights only, fair cuts."""

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from megaskip.arch import stage_proof
from megaskip.arch.decoder import find_decoder
from megaskip.arch.elsewhere import LayerElsewhere
from megaskip.arch.stage import DecoderStage, LayerRange, layer_ranges
from megaskip.arch.stage_proof import verify_stages
from megaskip.config import (
    AdapterConfig,
    ModelConfig,
    ParallelConfig,
    RouterConfig,
    RunConfig,
    parse_run_config,
)
from megaskip.errors import ConfigError, MegaskipError, UnsupportedModelError
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.stage_cuts import (
    balance,
    cuts_for_inference,
    cuts_for_training,
    layer_costs,
)
from megaskip.parallel.loading.stage_weights import load_stage
from megaskip.parallel.loading.weight_check import with_checked_weights
from megaskip.parallel.topology import read_topology

PIPELINE = ["--ds_config", "ds_configs/pipeline.json"]


def read_for_run(flags: list[str]) -> dict[str, Any] | None:
    run = parse_run_config(flags)
    return read_ds_config(run.parallel.ds_config, run)


def build(config: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_cut(family: str) -> None:
    verify_stages(tiny_config(family), build)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_parts_answer_as_the_whole_with_a_cache(family: str) -> None:
    verify_stages(tiny_config(family), build, generates=True)


def test_parts_that_do_not_pass_on_what_they_compute_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_proof._Queue, "receive", lambda self, tensors: tensors)
    with pytest.raises(UnsupportedModelError, match="relative distance of its logits"):
        verify_stages(tiny_config("llama"), build, generates=True)


def test_a_family_whose_stages_compute_something_else_is_refused_with_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    def forward(self: LayerElsewhere, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_states  # what arrived goes through the scaled embedding again

    monkeypatch.setattr(LayerElsewhere, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="relative distance of its hidden states"):
        verify_stages(tiny_config("granite"), build)


def test_a_family_that_cannot_be_shrunk_is_refused_with_the_reason() -> None:
    def fail(config: Any) -> Any:
        raise ValueError("no such attention")

    with pytest.raises(UnsupportedModelError, match="no such attention"):
        verify_stages(tiny_config("llama"), fail)


def load(folder: Path, layers: LayerRange, source: ModelSource | None = None) -> DecoderStage:
    source = source or resolve_source(ModelConfig(model=str(folder), dtype="float32"))

    def take_apart(model: Any) -> DecoderStage:
        return DecoderStage(model, layers, chunk_tokens=64)

    return load_stage(source, layers, take_apart, torch.device("cpu"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "mixtral", "olmoe", "deepseek_v3", "granite"]
)
def test_loaded_stages_compute_what_the_model_computes(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored:  # such as the bias by which deepseek_v3 chooses experts
            buffer.normal_()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    ids, places = torch.arange(3, 27).reshape(2, 12), torch.arange(12).expand(2, 12)
    mask = torch.ones_like(ids)
    hidden: torch.Tensor = ids
    for layers in layer_ranges([3, 5], 6):
        stage = load(tmp_path, layers)
        hidden = stage(hidden, mask, places)
    truth = find_decoder(model).decoder(input_ids=ids, position_ids=places, use_cache=False)[0]
    assert torch.equal(hidden, truth)
    assert stage.head is not None
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(stage.head.of_batch(hidden, ids), loss)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_stage_reads_its_own_files_and_no_others(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    first, last = layer_ranges([3], 6)
    whole = sum(p.numel() for p in model.parameters())
    counts = [sum(p.numel() for p in load(tmp_path, r).parameters()) for r in (first, last)]
    assert sum(counts) == whole
    index = (tmp_path / "model.safetensors.index.json").read_text()
    files = json.loads(index)["weight_map"]
    foreign = {f for n, f in files.items() if "layers.5." in n or "lm_head" in n}
    own = {
        f for n, f in files.items() if "embed" in n or any(f"layers.{i}." in n for i in range(3))
    }
    assert foreign - own
    # As other ranks get it: the first one has read the headers of all files.
    topology = read_topology({})
    source = resolve_source(ModelConfig(model=str(tmp_path), dtype="float32"))
    source = with_checked_weights(source, topology)
    for file in foreign - own:
        (tmp_path / file).write_bytes(b"not weights")
    load(tmp_path, first, source)
    with pytest.raises(MegaskipError, match="cannot read the weights"):
        load(tmp_path, last, source)


def test_a_layer_that_is_not_stored_is_named(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if "layers.4.block_sparse_moe" not in n}
    save_file(kept, file, metadata={"format": "pt"})
    for layers in layer_ranges([3], 6):
        with pytest.raises(MegaskipError, match=r"is model\.layers\.4\.mlp.*3 of \d+ weights"):
            load(tmp_path, layers)


def test_cuts_are_the_best_there_are() -> None:
    rng = random.Random(0)
    for _ in range(200):
        count = rng.randint(1, 8)
        parts = rng.randint(1, count)
        costs = [rng.random() for _ in range(count)]

        def largest(cuts: Any, costs: list[float] = costs, count: int = count) -> float:
            edges = (0, *cuts, count)
            return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))

        best = min(map(largest, itertools.combinations(range(1, count), parts - 1)))
        assert largest(balance(costs, parts)) == pytest.approx(best)


def test_layers_without_a_backward_pass_cost_less() -> None:
    model = tiny_model("llama")
    costs = layer_costs(model, 3, recompute=False)
    assert costs[3] == 2 * costs[0] == costs[4]
    assert layer_costs(model, 3, recompute=True)[3] == 3 * costs[0]
    assert costs[5] > costs[4]  # the output embedding
    run = RunConfig(router=RouterConfig(layers="3-4"), parallel=ParallelConfig(pipeline_stages=2))
    assert cuts_for_training(model, run) == layer_ranges([4], 6)
    adapted = dataclasses.replace(run, adapter=AdapterConfig(lora_rank=2))
    assert cuts_for_training(model, adapted) == layer_ranges([3], 6)
    assert cuts_for_inference(model, 2) == layer_ranges([3], 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pipeline_stages", "3", "--pipeline_partition", "4"], "2 rising numbers above 0"),
        (["--pipeline_stages", "3", "--pipeline_partition", "4,2"], "2 rising numbers above 0"),
        (["--pipeline_stages", "2", "--pipeline_partition", "x"], "is not a list such as"),
        (PIPELINE, "say of how many with --pipeline_stages"),
        (["--ds_config", "ds_configs/zero3.json", "--pipeline_stages", "2"], "wants 0"),
        (["--train", "full", "--pipeline_stages", "2"], "--train full does not run in stages"),
        (["--router_input", "first", "--pipeline_stages", "2"], "is on one stage"),
    ],
)
def test_settings_that_contradict_each_other(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_for_run(flags)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (
            {"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param",
        ),
        ({"zero_optimization": {"stage": 0}, "comms_logger": {}}, "comms_logger"),
    ],
)
def test_what_stages_would_ignore_is_refused(
    content: dict[str, Any], named: str, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    flags = ["--ds_config", str(tmp_path / "ds.json"), "--pipeline_stages", "2"]
    with pytest.raises(ConfigError, match=f"{named}, which has no effect on stages"):
        read_for_run(flags)


def test_ranks_that_do_not_make_whole_replicas() -> None:
    with pytest.raises(ConfigError, match="--pipeline_stages 2 does not divide the 3 rank"):
        read_topology({"RANK": "0", "WORLD_SIZE": "3"}, num_stages=2)


def test_more_stages_than_layers_and_cuts_outside_the_model() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="the model has 6 layers only"):
        cuts_for_training(model, RunConfig(parallel=ParallelConfig(pipeline_stages=7)))
    parallel = ParallelConfig(pipeline_stages=2, pipeline_partition="6")
    with pytest.raises(ConfigError, match="layers 0 to 5"):
        cuts_for_training(model, RunConfig(parallel=parallel))
