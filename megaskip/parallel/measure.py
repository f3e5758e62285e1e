"""What a rank holds, read off its tensors and not computed from shapes."""

from torch import Tensor, nn

from megaskip.parallel.loading.quantised import bytes_of_packed
from megaskip.parallel.protocol import StepEngine


def bytes_by_kind(engine: StepEngine) -> dict[str, int]:
    """Return this rank's bytes: backbone weights, what trains, its gradients, its optimizer
    state."""
    trained = list(engine.parameters.values())
    trained_ids = {id(p) for p in trained}
    frozen = [p for p in engine.module.parameters() if id(p) not in trained_ids]
    states = [engine.optimizer.state.get(p, {}) for p in trained]
    return {
        "backbone": sum(_resident_bytes(p) for p in frozen)
        + sum(b.nbytes for b in engine.module.buffers()),
        "trained": sum(p.nbytes for p in trained),
        "gradients": sum(p.grad.nbytes for p in [*trained, *frozen] if p.grad is not None),
        "moments": sum(
            t.nbytes for s in states for t in s.values() if isinstance(t, Tensor) and t.dim()
        ),
    }


def _resident_bytes(parameter: nn.Parameter) -> int:
    """Return the bytes of a parameter in memory: whole, or this rank's ZeRO-3 partition of it."""
    whole = parameter.data.untyped_storage().nbytes() if parameter.data.numel() else 0
    whole += bytes_of_packed(parameter)
    partition = getattr(parameter, "ds_tensor", None)
    if not isinstance(partition, Tensor):
        return whole
    # A small parameter that DeepSpeed keeps whole on every rank counts with its partition.
    available = parameter.data.numel() == getattr(parameter, "ds_numel", -1)
    return partition.untyped_storage().nbytes() + (whole if available else 0)
