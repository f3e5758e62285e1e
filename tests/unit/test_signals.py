"""Options of training do what they say, and cost nothing where they are off."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from routed_models import VOCABULARY, as_exported, randomise

from megaskip import RouterConfig, attach_routers, load_routers, save_routers
from megaskip.arch.task_loss import TaskLoss
from megaskip.config import OptimConfig, RunConfig
from megaskip.data import Batch
from megaskip.parallel.engine import Engine
from megaskip.parallel.topology import process_group, read_topology


def batch() -> Batch:
    ids = torch.randint(3, VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(3))
    real = torch.ones_like(ids, dtype=torch.bool)
    return Batch(
        input_ids=ids,
        labels=ids,
        token_mask=real,
        prompt_mask=real,
        position_ids=torch.arange(8).expand_as(ids),
    )


def losses(model: Any, **how: Any) -> torch.Tensor:
    one = batch()
    module = TaskLoss(model, chunk_tokens=16)
    loss: torch.Tensor = module(
        one.input_ids, one.attention_mask, one.position_ids, one.labels, **how
    )
    return loss


def test_distillation_mixes_the_labels_with_the_teachers_predictions() -> None:
    model, teacher = tiny_model(), tiny_model()
    with torch.no_grad():
        teacher.model.layers[0].self_attn.o_proj.weight.mul_(3)
        states = losses(teacher, states_only=True)
        found = losses(model, teacher=states, share=0.25)
        said = teacher(batch().input_ids).logits[:, :-1].softmax(-1)
        logs = model(batch().input_ids).logits[:, :-1].log_softmax(-1)
        hard = losses(model)
    expected = 0.75 * hard - 0.25 * (said * logs).sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_model_that_is_its_own_teacher_has_no_gradient_from_it() -> None:
    model = tiny_model()
    routers = attach_routers(model, RouterConfig(layers="1-4"), register=False)
    with torch.no_grad():
        states = losses(model, states_only=True)
    losses(model, teacher=states, share=1.0).backward()
    gradients = [p.grad for p in routers.parameters() if p.grad is not None]
    assert gradients
    assert max(float(g.abs().max()) for g in gradients) < 1e-4


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_noise_disturbs_training_alone(noise: float) -> None:
    topology = read_topology({})
    with process_group(topology, timeout=60):
        model = tiny_model()
        routers = attach_routers(model, RouterConfig(layers="1-4"), register=False)
        randomise(routers)
        config = RunConfig(optim=OptimConfig(noise=noise))
        engine = Engine(TaskLoss(model, chunk_tokens=64), routers, config, topology)
        routers.steering.budget.spread = 1.0
        seen = []
        for seed in range(4):
            torch.manual_seed(seed)
            engine.train_step([batch()], lr=0.0)
            seen.append(torch.stack([d.keep.detach() for d in routers.decisions().values()]))
            routers.steering.budget.place(0.0)
        assert any(not torch.equal(seen[0], other) for other in seen[1:]) == bool(noise)
        torch.manual_seed(1)
        first = engine.evaluate([batch()], routed=True)
        assert engine.evaluate([batch()], routed=True) == first


def test_temperature_scales_the_gradient_of_fresh_routers() -> None:
    norms = []
    for temperature in (1.0, 4.0):
        topology = read_topology({})
        with process_group(topology, timeout=60):
            model = tiny_model()
            routers = attach_routers(model, RouterConfig(layers="1-4"), register=False)
            config = RunConfig(optim=OptimConfig(temperature=temperature))
            engine = Engine(TaskLoss(model, chunk_tokens=64), routers, config, topology)
            norms.append(engine.train_step([batch()], lr=0.0).grad_norm)
    assert norms[0] == pytest.approx(4 * norms[1]) and norms[0] > 0


@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_other_routers_start_dense_and_survive_saving_and_export(kind: str, tmp_path: Path) -> None:
    ids, dense = batch().input_ids, tiny_model()
    model = tiny_model()
    routers = attach_routers(model, RouterConfig(layers="1-4", router=kind))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense(ids).logits)
        randomise(routers)
        expected = model(ids).logits
        assert 0 < routers.capacity() < 1
        folder = save_routers(tmp_path / "routers", routers)
        loaded = tiny_model()
        load_routers(loaded, folder)
        assert torch.equal(loaded(ids).logits, expected)
        torch.testing.assert_close(as_exported(model, routers)(ids).logits, expected)
