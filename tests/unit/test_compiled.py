"""--compile: layers without a router are compiled in place, and what a step computes stays."""

from typing import Any

import pytest
import torch
from families import tiny_model
from tiny_run import alone, rows, tiny_config

from megaskip import attach_routers
from megaskip.arch.compiled import compile_layers
from megaskip.arch.task_loss import TaskLoss
from megaskip.data import collate
from megaskip.parallel.engine import Engine


def one_step(backend: str | None) -> tuple[Any, dict[str, Any], str]:
    config, model = tiny_config(), tiny_model()
    with alone() as topology:
        routers = attach_routers(model, config.router, register=False)
        for number, router in enumerate(routers.parameters()):
            torch.nn.init.normal_(router, generator=torch.Generator().manual_seed(number))
        said = "" if backend is None else compile_layers(model, routers, backend=backend)
        engine = Engine(TaskLoss(model, chunk_tokens=64), routers, config, topology)
        engine.module.needs_mask = False
        batches = [collate(rows(3, seed), pad_token_id=0, prompt_tokens=32) for seed in (1, 2)]
        result = engine.train_step(batches, 0.0)
        gradients = {name: p.grad for name, p in engine.parameters.items()}
    is_compiled = [layer._compiled_call_impl is not None for layer in model.model.layers]
    assert not any(is_compiled[1:5]), "routed layers branch on decisions"
    assert is_compiled[0] == is_compiled[5] == said.endswith("are compiled")
    return result, gradients, said


def test_a_step_with_compiled_layers_is_the_eager_one() -> None:
    eager, gradients, _ = one_step(None)
    compiled, others, said = one_step("eager")
    assert said == "2 layers without a router are compiled"
    assert compiled.loss_task == pytest.approx(eager.loss_task, rel=1e-6)
    assert compiled.capacity_per_layer == eager.capacity_per_layer
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7)


def test_where_the_compiler_breaks_layers_run_as_they_are() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler here\nand more lines")

    eager, _, _ = one_step(None)
    torch.compiler.reset()
    result, _, said = one_step(broken)  # type: ignore[arg-type]
    assert "--compile is left out" in said and "no C++ compiler here" in said
    assert result == eager
