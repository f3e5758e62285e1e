"""What the ranks of the distributed tests do. Run by spawn.py: workers.py NAME FOLDER."""

import contextlib
import dataclasses
import json
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensor_calls import AttentionMasks

from megaskip.calibration import fit, router_fit
from megaskip.calibration.allocation import allocate, skip_costs
from megaskip.calibration.drop_order import greedy_drop_order
from megaskip.calibration.fit import fit_compensation
from megaskip.calibration.fit_progress import FitProgress
from megaskip.calibration.router_fit import fit_routers
from megaskip.calibration.threshold import calibrate_threshold
from megaskip.checkpoint.stored_weights import read_stored_weights
from megaskip.cli.train import main as train
from megaskip.config import parse_run_config
from megaskip.data import Batch
from megaskip.errors import MegaskipError
from megaskip.parallel import pipeline, shared_moments
from megaskip.parallel.agree import attempt_on_first_rank, on_every_rank
from megaskip.parallel.build import build_engine, shard_backbone
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.engine import Engine
from megaskip.parallel.heartbeat import HeartbeatMonitor
from megaskip.parallel.live_bytes import LiveBytes
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.loading.weight_check import with_checked_weights
from megaskip.parallel.measure import bytes_by_kind
from megaskip.parallel.topology import Topology, process_group, read_topology
from megaskip.parallel.zero3 import prepare_deepspeed
from megaskip.training import job

ROWS, TOKENS = 2, 24


def gradients(model: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return losses, capacities and router gradients of one step for each case."""
    return [_one_step(model, case) for case in cases]


def _one_step(model: str, case: dict[str, Any]) -> dict[str, Any]:
    with built(case.get("model", model), case["flags"]) as (engine, topology):
        routers = engine.routers
        _randomise(routers)
        everywhere = case["parts"]
        batches = [_mine(part, topology, case.get("packed", False)) for part in everywhere]
        share = len(batches) // topology.num_replicas
        mine = batches[topology.replica * share : (topology.replica + 1) * share]
        cut_off = _keep_cut_off() if case.get("cut_off_keep") else contextlib.nullcontext()
        with cut_off, AttentionMasks() as attention:
            result = engine.train_step(mine, 0.0)
        return {
            "loss_task": result.loss_task,
            "loss_penalty": result.loss_penalty,
            "capacity_per_layer": result.capacity_per_layer,
            "gradients": {n: p.grad.clone() for n, p in engine.parameters.items()},
            "kept": {k: d.keep.detach().clone() for k, d in routers.decisions().items()},
            "masked": 0 if case.get("packed") else attention.masked,
            "bytes": bytes_by_kind(engine),
            "bytes_sent": getattr(engine, "bytes_sent", [0, 0]),
        }


@contextlib.contextmanager
def _keep_cut_off() -> Iterator[None]:
    """Let stages hand on decisions without their gradient."""
    carried_keep = pipeline.carried_keep
    pipeline.carried_keep = lambda routers: carried_keep(routers).detach().requires_grad_()
    try:
        yield
    finally:
        pipeline.carried_keep = carried_keep


def adapters(model: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return gradients of a step of all that trains, and what it is after two, by case; with
    compensations as large as those whose moments are shared out."""
    shared_moments.LARGE_COMPENSATIONS = 1
    return [_adapt(model, case) for case in cases]


def _adapt(model: str, case: dict[str, Any]) -> dict[str, Any]:
    with built(model, case["flags"]) as (engine, topology):
        _randomise(engine.routers)
        share = len(case["parts"]) // topology.num_replicas
        mine = case["parts"][topology.replica * share : (topology.replica + 1) * share]
        batches = [_mine(part, topology) for part in mine]
        result = engine.train_step(batches, 1e-2)
        gradients = {n: p.grad.clone() for n, p in engine.parameters.items()}
        engine.train_step(batches, 1e-2)
        return {
            "loss_task": result.loss_task,
            "gradients": gradients,
            "weights": {n: p.detach().clone() for n, p in engine.parameters.items()},
            "gathered": _gathered_numel(engine),
            "moments": bytes_by_kind(engine)["moments"],
        }


def held_out(model: str, cases: list[list[str]]) -> list[dict[str, Any]]:
    """Return what evaluation and calibration find on seven batches, for each case."""
    return [_evaluate(model, flags) for flags in cases]


def _evaluate(model: str, flags: list[str]) -> dict[str, Any]:
    with built(model, flags) as (engine, topology):
        _randomise(engine.routers)
        mine = _share(topology)
        dense = engine.evaluate(mine, routed=False)
        routed = engine.evaluate(mine, routed=True)
        scores = sorted(engine.scores())
        return {
            "dense": dense.loss,
            "loss": routed.loss,
            "capacity": routed.capacity,
            "capacity_error": routed.capacity_error,
            "capacity_per_layer": list(routed.capacity_per_layer),
            "calibrated": calibrate_threshold(engine, mine),
            "offset": engine.routers.steering.budget.offset,
            "scores": scores,
        }


def allocated(model: str, cases: list[list[str]]) -> list[dict[str, Any]]:
    """Return what skipping costs, and the thresholds by layer that follow, for each case."""
    return [_allocate(model, flags) for flags in cases]


def _allocate(model: str, flags: list[str]) -> dict[str, Any]:
    with built(model, flags) as (engine, topology):
        _randomise(engine.routers)
        mine = _share(topology)
        logits, costs = skip_costs(engine, mine)
        kept = allocate(engine, mine, 0.4, rounds=2)
        threshold = engine.routers.config.threshold
        return {"logits": logits, "costs": costs, "kept": kept, "threshold": threshold}


def fitted(model: str, cases: list[list[str]]) -> list[dict[str, Any]]:
    """Return the maps in closed form and the order in which layers are dropped, for each case."""
    return [_fit(model, flags) for flags in cases]


def _fit(model: str, flags: list[str]) -> dict[str, Any]:
    with built(model, flags) as (engine, topology):
        mine = _share(topology, 16)  # a quarter of them falls evenly on up to 4 ranks
        explained = fit_compensation(engine, mine)
        dense, order = greedy_drop_order(engine, mine, 2)
        return {
            "explained": explained,
            "maps": {n: p.clone() for n, p in engine.routers.named_parameters()},
            "dense": dense,
            "order": [(step.layer, step.loss) for step in order],
            "costs": fit_routers(engine, mine, groups=2, distill=0.5),
            "goes_on": _fit_that_is_killed(engine, topology, mine, Path(f"{model}.progress")),
        }


def _fit_that_is_killed(
    engine: Engine, topology: Topology, mine: list[Batch | None], path: Path
) -> list[bool]:
    """Return for kills in both phases of the maps, and among the costs, whether the fit that goes
    on has the bits of one that was not killed."""
    fit.SAVED_EVERY = router_fit.SAVED_EVERY = 1

    def maps_after(*kills: int) -> dict[str, torch.Tensor]:
        for kill in (*kills, len(mine) + 3):
            left = iter(range(kill))

            def check(left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    raise InterruptedError

            for parameter in engine.routers.parameters():  # as those of a new start
                parameter.data.zero_()
            with contextlib.suppress(InterruptedError):
                progress = FitProgress(path, {"batches": len(mine)}, topology)
                fit_compensation(engine, mine, check=check, progress=progress)
                fit_routers(engine, mine[:2], groups=1, check=check, progress=progress)
        progress.remove()
        return {n: p.clone() for n, p in engine.routers.named_parameters()}

    whole = maps_after()
    again = [maps_after(*kills) for kills in ((1,), (len(mine) - 1, 2))]
    return [all(torch.equal(found[name], whole[name]) for name in whole) for found in again]


def trainings(cases: list[list[str]], watched: str) -> list[list[int]]:
    """Run trainings one after the other, in the open process group; return after each when the
    files in folders below `watched` were last written to."""
    job.process_group = lambda topology, timeout: contextlib.nullcontext()
    times = []
    for flags in cases:
        train(flags)
        files = sorted(Path(watched).glob("*/*.bin"))
        times.append([file.stat().st_mtime_ns for file in files])
    return times


def shared_rows(
    model: str, cases: list[dict[str, Any]], runs: list[list[str]]
) -> list[dict[str, Any]]:
    """Return what `gradients` does for each case, after the trainings `runs`."""
    trainings(runs, model)
    return gradients(model, cases)


def _share(topology: Topology, count: int = 7) -> list[Batch | None]:
    """Return this replica's of `count` batches, and None where there are fewer for it than for
    others."""
    batches = [_mine(part, topology) for part in range(count)]
    mine: list[Batch | None] = list(batches[topology.replica :: topology.num_replicas])
    return mine + [None] * (-(-len(batches) // topology.num_replicas) - len(mine))


def forced_divergence(model: str, cases: list[list[str]]) -> list[dict[str, Any]]:
    """Return gradients of a step in which rank 0 runs every routed sublayer and the others none."""
    return [_diverge(model, flags) for flags in cases]


def _diverge(model: str, flags: list[str]) -> dict[str, Any]:
    with built(model, flags) as (engine, topology):
        _randomise(engine.routers)
        keep = 1.0 if topology.is_first else 0.0
        with engine.routers.override(dict.fromkeys(engine.routers.layers, keep)):
            engine.train_step([_batch(topology.rank, packed=False)], 0.0)
            engine.train_step([_batch(topology.rank + 9, packed=False)], 0.0)
        return {
            "gradients": {n: p.grad.clone() for n, p in engine.parameters.items()},
            "gathered": _gathered_numel(engine),
        }


def _gathered_numel(engine: Engine) -> int:
    """Return the elements of other ranks' partitions that are still held."""
    return sum(
        p.data.numel()
        for p in engine.module.parameters()
        if hasattr(p, "ds_tensor") and not p.ds_persist
    )


def gathered_in_a_step(model: str, cases: list[list[str]]) -> list[dict[str, int]]:
    """Return the most bytes of weights that a rank held gathered while it went forward, while it
    went back, and after a step; beside them those of the largest layer and of the head."""
    return [_gathered_in_a_step(model, flags) for flags in cases]


def _gathered_in_a_step(model: str, flags: list[str]) -> dict[str, int]:
    with built(model, flags) as (engine, topology):
        _randomise(engine.routers)
        layers = engine.model.model.layers
        most, phase = {"forward": 0, "backward": 0}, ["forward"]
        sharded = [p for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
        gathered: dict[int, weakref.ref[Any]] = {}

        def look(*_: Any) -> None:
            """Count the storages that were seen gathered and are still held, by whomever."""
            storages = [p.data.untyped_storage() for p in sharded if p.data.numel()]
            gathered.update({storage._cdata: weakref.ref(storage) for storage in storages})
            alive = [storage for ref in gathered.values() if (storage := ref()) is not None]
            most[phase[0]] = max(most[phase[0]], sum(storage.nbytes() for storage in alive))

        def turn(*_: Any) -> None:
            phase[0] = "backward"

        assert not any(p.ds_persist for p in sharded)
        # A sublayer is called again when a checkpoint is recomputed; gradients that come into a
        # layer and into its attention are seen besides.
        for layer in layers:
            for module in (layer, layer.self_attn, layer.mlp):
                module.register_forward_pre_hook(look)
                module.register_forward_hook(look)
            layer.register_full_backward_pre_hook(look)
            layer.self_attn.register_full_backward_pre_hook(look)
        engine.module.head.register_forward_hook(turn)
        for seed in range(4):  # DeepSpeed learns the order in the first steps
            phase[0] = "forward"
            engine.train_step([_batch(topology.rank + seed, packed=False)], 0.0)
        sizes = [sum(4 * p.ds_numel for p in layer.parameters()) for layer in layers]
        head = 4 * engine.module.head.linear.weight.ds_numel
        return most | {"after": _gathered_numel(engine), "layer": max(sizes), "head": head}


def evaluations(cases: list[list[str]]) -> list[Any]:
    """Return the tasks of launch/evaluate.py's reports with the flags of each case; None on other
    ranks than the first."""
    from megaskip.cli.evaluate import parse
    from megaskip.evaluation.job import evaluate_on_ranks

    usual = ["--output", "unused.json", "--dtype", "float32", "--model"]
    reports = []
    for case in cases:
        options = parse([*usual, *case])
        topology = read_topology(os.environ, num_stages=options.pipeline_stages)
        reports.append(evaluate_on_ranks(options, topology))
    return [report and report.to_json(records=True)["tasks"] for report in reports]


def buffers(model: str, cases: list[list[str]]) -> list[dict[str, torch.Tensor]]:
    """Return the buffers of the model, which no rank shares with others, for each case."""
    found = []
    for flags in cases:
        with built(model, flags) as (engine, _):
            found.append({n: b.clone() for n, b in engine.module.model.named_buffers()})
    return found


def engine_bytes(model: str, flags: list[str]) -> dict[str, int]:
    """Return what a rank holds by kind, measured."""
    with built(model, flags) as (engine, _):
        return bytes_by_kind(engine)


def memory_of_a_step(model: str, cases: list[list[str]]) -> list[dict[str, int]]:
    """Return the bytes that are alive at the worst moment of a full micro-batch, for each case, and
    of them what trains with its gradients and moments."""
    return [_bytes_of_a_step(model, flags) for flags in cases]


def _bytes_of_a_step(model: str, flags: list[str]) -> dict[str, int]:
    config = parse_run_config(["--model", model, *flags])
    shape = (config.optim.micro_batch_size, config.data.seq_length)
    real = torch.ones(shape, dtype=torch.bool)
    ids = torch.randint(3, 97, shape)
    places = torch.arange(shape[1]).expand(shape)
    whole = Batch(input_ids=ids, labels=ids, token_mask=real, prompt_mask=real, position_ids=places)
    with built(model, flags) as (engine, topology):
        batch = whole.share_of_tokens(topology.sequence_rank, topology.sequence_size)
        batches = [batch] * config.optim.gradient_accumulation_steps
        for _ in range(2):  # the first step still learns DeepSpeed's prefetch order
            engine.train_step(batches, 0.0)
        held = bytes_by_kind(engine)
        tensors = [*engine.module.parameters(), *engine.module.buffers()]
        partitions = [p.ds_tensor for p in tensors if hasattr(p, "ds_tensor")]
        with LiveBytes() as live:
            live.ignore([*tensors, *partitions, *engine.parameters.values()])
            engine.train_step(batches, 0.0)
        total = sum(held.values())
        return {"total": total + live.peak, "trained": total - held["backbone"]}


def memory_of_steps(model: str, flags: list[str], counts: list[int]) -> list[int]:
    """Return the bytes that a step of so many micro-batches adds at its worst moment."""
    peaks = []
    with built(model, flags) as (engine, _):
        for count in counts:
            batches = [_batch(part, packed=False) for part in range(count)]
            engine.train_step(batches, 0.0)
            with LiveBytes() as live:
                live.ignore([*engine.module.parameters(), *engine.module.buffers()])
                live.ignore(engine.parameters.values())
                engine.train_step(batches, 0.0)
            peaks.append(live.peak)
    return peaks


def outcomes(models: list[str], cases: list[list[str]]) -> list[list[float | str]]:
    """Return the loss of a step on each model for each case's flags, or what it was refused with;
    last, what this rank says of a folder that one rank alone finds broken, each in turn."""
    told = [[_or_refusal(partial(_loss, model, case)) for case in cases] for model in models]
    topology = read_topology(os.environ)
    nowhere = Path(models[0]).with_name("nowhere")
    attempt = attempt_on_first_rank(topology, lambda: read_stored_weights(nowhere))

    def read_on_last() -> None:
        if topology.rank == topology.world_size - 1:
            read_stored_weights(nowhere)

    ways = (attempt.shared, lambda: on_every_rank(topology, read_on_last))
    return [*told, [_or_refusal(way) for way in ways]]


def _loss(model: str, flags: list[str]) -> float:
    return float(_one_step(model, {"flags": flags, "parts": [0, 1]})["loss_task"])


def _or_refusal(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except MegaskipError as error:
        return str(error)


def whole_weights(model: str, cases: list[list[str]]) -> list[dict[str, torch.Tensor]]:
    """Return every weight as this rank sees it when it is gathered."""
    return [_gather_all(model, flags) for flags in cases]


def scattered_weights(model: str, flags: list[str]) -> tuple[dict[str, torch.Tensor], str]:
    """Return (every weight as `whole_weights` does, what this rank is told where the first one
    alone cannot read what it scatters)."""
    weights = _gather_all(model, flags)
    config = parse_run_config(["--model", model, *flags])
    topology = read_topology(os.environ)
    source = with_checked_weights(resolve_source(config.model), topology)
    if topology.is_first:
        source = dataclasses.replace(source, folder=Path("nowhere"))
    ds_content = read_ds_config(config.parallel.ds_config, config)
    assert ds_content is not None
    try:
        shard_backbone(source, ds_content, 64)
    except (MegaskipError, RuntimeError) as error:
        return weights, f"{type(error).__name__}: {error}"
    return weights, "nothing"


def _gather_all(model: str, flags: list[str]) -> dict[str, torch.Tensor]:
    import deepspeed

    with built(model, flags) as (engine, _):
        found = {}
        for name, parameter in engine.module.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        return found


@contextlib.contextmanager
def built(model: str, flags: list[str]) -> Iterator[tuple[Engine, Topology]]:
    """Yield the engine of a run on a tiny model folder, and this rank's place in it."""
    config = parse_run_config(["--model", model, "--max_grad_norm", "0", *flags])
    parallel = config.parallel
    topology = read_topology(
        os.environ,
        num_stages=parallel.pipeline_stages,
        sequence_size=parallel.sequence_parallel_size,
    )
    ds_content = read_ds_config(config.parallel.ds_config, config)
    linear = torch.nn.functional.linear
    yield build_engine(config, topology, resolve_source(config.model), ds_content), topology
    torch.nn.functional.linear = linear  # DeepSpeed leaves its own, which no other engine runs with


def _randomise(routers: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if routers.adapters is not None:
            generator.manual_seed(6)
            for parameter in routers.adapters.tensors().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)


def patient(silence: int, work: float) -> bool:
    """Let the first rank work for `work` seconds after all others are done, while all watch."""
    topology = read_topology(os.environ)
    with HeartbeatMonitor(topology, silence=silence):
        time.sleep(work if topology.is_first else 0)
    return True


def _mine(seed: int, topology: Topology, packed: bool = False) -> Batch:
    """Return this rank's share of the tokens of a batch."""
    return _batch(seed, packed).share_of_tokens(topology.sequence_rank, topology.sequence_size)


def _batch(seed: int, packed: bool) -> Batch:
    """Return a batch of padded (or packed) rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (ROWS, TOKENS), generator=generator)
    lengths = torch.randint(12, TOKENS + 1, (ROWS, 1), generator=generator)
    places = torch.arange(TOKENS).expand(ROWS, TOKENS)
    token_mask = places < lengths
    prompt_mask = places < 3
    segment_ids, positions = None, places
    if packed:
        second = places >= 10
        segment_ids = torch.where(token_mask, second.long(), -1)
        prompt_mask = prompt_mask | (second & (places < 12))
        # Padding is a segment of its own.
        positions = torch.where(second, places - 10, places)
        positions = torch.where(token_mask, positions, places - lengths)
    labels = torch.where(token_mask & ~prompt_mask, ids, -100)
    return Batch(
        input_ids=ids,
        labels=labels,
        token_mask=token_mask,
        prompt_mask=prompt_mask & token_mask,
        position_ids=positions.contiguous(),
        segment_ids=segment_ids,
    )


def main() -> None:
    """Run one worker in its process group."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    arguments = json.loads((folder / "arguments.json").read_text())
    torch.set_num_threads(1)
    prepare_deepspeed()
    topology = read_topology(os.environ)
    with process_group(topology, timeout=120):
        torch.save(globals()[name](**arguments), folder / f"{topology.rank}.pt")


if __name__ == "__main__":
    main()
