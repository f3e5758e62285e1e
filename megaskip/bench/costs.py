"""FLOPs and bytes that a Llama's shape asks for. Pure arithmetic, checked against torch's counter.

Attention is causal: half of the full square of scores is needed, and counted. Norms, rotations and
activation functions are left out.
"""

from megaskip.bench.shapes import Shape
from megaskip.config import resolve_layers

LORA_RANK = 16
METHODS = ("routers", "lora", "full")
"""What trains: routers on a frozen model, adapters on every projection, every weight."""


def prefill_flops(
    shape: Shape, batch: int, tokens: int, *, attention: float = 1.0, mlp: float = 1.0
) -> float:
    """Return the FLOPs of a prefill with logits of the last token only.

    `attention` and `mlp` are the shares of these sublayers' work that is done, over all layers.
    """
    projections = 2 * shape.attention_parameters * tokens
    attended = attention * (projections + attention_flops(shape, tokens))
    layer = attended + mlp * 2 * shape.mlp_parameters * tokens
    return batch * (shape.layers * layer + 2 * shape.head_parameters)


def map_flops(shape: Shape, rank: int, units: float) -> float:
    """Return the FLOPs of low-rank maps for `units` skipped tokens, over all layers."""
    return 4.0 * rank * shape.hidden * units


def attention_flops(shape: Shape, tokens: int) -> float:
    """Return the FLOPs of one layer's scores and of the values that they weigh, for one row."""
    return 2 * tokens**2 * shape.hidden


def training_flops(shape: Shape, method: str, batch: int, tokens: int) -> float:
    """Return the FLOPs of a step's forward and backward pass, nothing computed twice.

    Routers are on half of the layers, those below the last: below them nothing has a backward
    pass, and no frozen weight has a gradient.
    """
    dense = 2.0 * (shape.attention_parameters + shape.mlp_parameters) * tokens
    scores = attention_flops(shape, tokens)
    head = 2.0 * shape.head_parameters * (tokens - 1)
    forward = shape.layers * (dense + scores) + head
    # Of scores and weighted values each operand has a gradient; of projections, inputs alone or
    # weights, too.
    layer_backward = dense + 2 * scores
    if method == "routers":
        lowest = resolve_layers("half", shape.layers)[0]
        backward = (shape.layers - lowest) * layer_backward + head
        # The attention of the lowest routed layer reads what no gradient is asked for.
        backward -= 2.0 * shape.attention_parameters * tokens + 2 * scores
        return batch * (forward + backward)
    if method == "lora":
        adapters = 2.0 * shape.layers * lora_parameters(shape) * tokens
        unasked = 2.0 * (shape.attention_parameters - shape.hidden**2) * tokens  # q, k, v, layer 0
        return batch * (forward + shape.layers * layer_backward + head + 3 * adapters - unasked)
    return batch * (forward + shape.layers * (layer_backward + dense) + 2 * head)


def lora_parameters(shape: Shape) -> int:
    """Return the weights of one layer's adapters on all of its projections."""
    kv = shape.kv_heads * shape.head_dim
    widths = 2 * (shape.hidden + shape.hidden) + 2 * (shape.hidden + kv)
    return LORA_RANK * (widths + 3 * (shape.hidden + shape.mlp))


def serving_bytes(shape: Shape, batch: int, tokens: int, element: int) -> int:
    """Return about the bytes that a prefill of `batch` rows needs: weights, cache, temporaries."""
    cache = batch * shape.kv_values(tokens)
    temporaries = batch * tokens * (3 * shape.mlp + 4 * shape.hidden)
    return element * (shape.parameters + cache + temporaries)


def training_bytes(shape: Shape, method: str, batch: int, tokens: int, element: int) -> int:
    """Return about the bytes that a step needs: weights, what trains thrice more, activations."""
    # For each token of a layer with a backward pass: about 6 hidden states, 4 of the MLP's width
    # (H200, 8B shape, 4096 tokens: 8 GiB for half of the layers, 37 with LoRA's copies).
    kept = 6 * shape.hidden + 4 * shape.mlp
    share = {"routers": 0.5, "lora": 1.5, "full": 1.0}[method]
    activations = batch * tokens * (share * shape.layers * kept + 4 * shape.hidden)
    trained = 3 * shape.parameters if method == "full" else 0
    return int(element * (shape.parameters + trained + activations))


def extrapolated_seconds(few: tuple[int, float], many: tuple[int, float], layers: int) -> float:
    """Return seconds of a step with `layers` layers from two pairs of (layers, seconds), by a
    straight line through them."""
    return many[1] + layer_seconds(few, many) * (layers - many[0])


def layer_seconds(few: tuple[int, float], many: tuple[int, float]) -> float:
    """Return what a layer adds to a step's seconds, from two pairs of (layers, seconds)."""
    return (many[1] - few[1]) / (many[0] - few[0])
