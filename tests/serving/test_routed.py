"""Routed models in vLLM: each request gets what it gets alone in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from served_models import (
    LAYERS,
    LENGTHS,
    generate,
    load,
    prompts,
    require_equal,
    routed_folder,
    sampling,
    served,
)

TARGETS = ("attn", "mlp", "block")


def decisions(model: Any, asked: list[list[int]]) -> list[tuple[int, ...]]:
    """Return what transformers decides about each prompt, layer by layer."""
    found = []
    with torch.no_grad():
        for prompt in asked:
            model(torch.tensor([prompt]))
            keep = model.skip_routers.keep().values()
            found.append(tuple(int(layer.flatten()[0]) for layer in keep))
    return found


@pytest.mark.parametrize("maps", ["none", "low_rank"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])
def test_requests_that_disagree_get_what_they_get_alone(
    family: str, target: str, maps: str, tmp_path: Path
) -> None:
    folder = routed_folder(
        tmp_path,
        family,
        granularity=f"{target}_sequence",
        compensation=maps,
        compensation_rank=4,
    )
    model, asked = load(folder), prompts()
    per_layer = zip(*decisions(model, asked), strict=True)
    assert any(0 < sum(layer) < len(asked) for layer in per_layer), "no layer is mixed"
    with served(folder) as engine:
        answers = generate(engine, asked)
    require_equal(model, asked, answers)


def test_eight_requests_of_which_four_skip(tmp_path: Path) -> None:
    folder = routed_folder(tmp_path, "llama", granularity="block_sequence", router_input="first")
    model = load(folder)
    many = prompts(LENGTHS * 8, seed=2)
    of_each = dict(zip(map(tuple, many), decisions(model, many), strict=True))
    all_run = [list(p) for p, runs in of_each.items() if all(runs)][:4]
    some_skip = [list(p) for p, runs in of_each.items() if not all(runs)][:4]
    assert len(all_run) == len(some_skip) == 4
    asked = [prompt for pair in zip(all_run, some_skip, strict=True) for prompt in pair]
    # A step has room for some of the prompts: the others wait as a whole.
    assert sum(map(len, asked)) > 64
    with served(folder, max_model_len=64, max_num_batched_tokens=64) as engine:
        answers = generate(engine, asked)
    require_equal(model, asked, answers)


def test_requests_that_come_and_go_keep_their_own_decisions(tmp_path: Path) -> None:
    """Rows of the batch are filled again and moved: twelve requests of different lengths, four at
    a time, and one of them is taken back."""
    folder = routed_folder(tmp_path, "llama", granularity="attn_sequence")
    model, asked = load(folder), prompts(LENGTHS + LENGTHS[:4], seed=3)
    done: dict[str, Any] = {}
    with served(folder, max_num_seqs=4) as served_engine:
        engine = served_engine.llm_engine
        waiting = list(enumerate(asked))
        for step in range(400):
            if waiting and step % 2 == 0:
                number, prompt = waiting.pop(0)
                engine.add_request(
                    str(number), {"prompt_token_ids": prompt}, sampling(6 + 5 * (number % 4))
                )
            if step == 11:
                engine.abort_request(["2"])
            done |= {out.request_id: out.outputs[0] for out in engine.step() if out.finished}
            if not waiting and not engine.has_unfinished_requests():
                break
    kept = [number for number in range(len(asked)) if number != 2]
    require_equal(model, [asked[n] for n in kept], [done[str(n)] for n in kept])


def test_a_request_that_was_put_off_is_judged_by_its_prompt_again(tmp_path: Path) -> None:
    """With room for two of eight texts, vLLM takes requests back and computes them anew."""
    folder = routed_folder(tmp_path, "llama", granularity="attn_sequence")
    model, asked = load(folder), prompts((20,) * 8, seed=4)
    with served(folder, num_gpu_blocks_override=9, block_size=32) as engine:
        preempted = _count_preemptions(engine)
        answers = generate(engine, asked, tokens=30)
        assert preempted, "nothing was put off, so this shows nothing"
    require_equal(model, asked, answers)


def _count_preemptions(engine: Any) -> list[str]:
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    taken_back: list[str] = []
    put_off = scheduler._preempt_request

    def note(request: Any, *args: Any, **kwargs: Any) -> Any:
        taken_back.append(request.request_id)
        return put_off(request, *args, **kwargs)

    scheduler._preempt_request = note
    return taken_back


def test_what_is_skipped_is_not_computed(tmp_path: Path) -> None:
    folder = routed_folder(tmp_path, "llama", granularity="attn_sequence")
    model, asked = load(folder), prompts()
    with served(folder) as engine:
        worker = engine.llm_engine.model_executor.driver_worker.worker
        layers = worker.model_runner.model.model.layers
        seen = dict.fromkeys(LAYERS, 0)
        for layer in LAYERS:
            projection = layers[layer].self_attn.qkv_proj

            def count(module: Any, args: Any, layer: int = layer) -> None:
                seen[layer] += len(args[0])

            projection.register_forward_pre_hook(count)
        generate(engine, asked, tokens=3)
    tokens = [len(prompt) + 2 for prompt in asked]
    runs = zip(*decisions(model, asked), strict=True)
    expected = [sum(n for n, run in zip(tokens, layer, strict=True) if run) for layer in runs]
    assert list(seen.values()) == expected
