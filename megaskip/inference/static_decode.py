"""Decode steps on a static cache: recorded once for a generation, then played back for each token.

A sequence's decisions are fixed by its prompt. So every decode step of a generation runs the same
operations on tensors at the same addresses: what no row keeps is not among them, and rows that
differ are chosen by indices that the prefill made. One CUDA graph therefore holds a whole step, and
a generation has one. Graphs by layer would be many launches a token, chosen among by decisions that
do not change; a graph that is kept for the next generation would keep its keys and values, too, and
be of use for the same decisions only. Recording runs nothing: it takes the host's part of a step.
Shapes: B rows, H key-value heads, L slots of the cache, D head size.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from transformers import StaticCache
from transformers.generation import GenerationMode
from transformers.utils import logging

from megaskip.arch.decision_cache import cached_decisions
from megaskip.arch.decoder import find_decoder
from megaskip.inference.executor import InferenceExecutor
from megaskip.inference.kept import STATIC, KeptRows, is_offloaded, replace_layer
from megaskip.routing.routers import Routers

REHEARSALS = 2
"""Steps that run before one is recorded: the first makes what later ones find made, the second
shows whether any waits for the device."""


class CudaGraph:
    """A step recorded on a CUDA device: its kernels, without the host's work between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _side_stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def rehearse(self, step: Callable[[], Any]) -> tuple[Any, int]:
        """Run a step where it will be recorded; returns its output, and how often it waited for the
        device, which a recorded one cannot."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = self._run(step)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        others = [w for w in caught if "synchronizing CUDA operation" not in str(w.message)]
        for w in others:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return output, len(caught) - len(others)

    def record(self, step: Callable[[], Any]) -> Any:
        """Record a step without running it; returns its output, which `replay` fills."""
        # Another thread may use the device meanwhile: what it does is not part of this step.
        mode = "thread_local"
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode=mode):
            return step()

    def replay(self) -> None:
        """Run the recorded step: one launch."""
        self._graph.replay()

    def _run(self, step: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = step()
        current.wait_stream(self._stream)
        return output


def _side_stream(device: torch.device) -> Any:
    """Return the stream of recordings beside this thread's current one, always the same: cuBLAS
    never gives up the workspace (32 MiB on a Hopper) of a stream that it ran on."""
    current = torch.cuda.current_stream(device).cuda_stream
    return _stream_beside(device, current, threading.get_ident())


@functools.lru_cache(maxsize=32)  # as many as torch has
def _stream_beside(device: torch.device, current: int, thread: int) -> Any:
    return torch.cuda.Stream(device)


RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaGraph}
"""What records steps, by the kind of device. Elsewhere the same step is run again each time."""


class RollingWindow:
    """Mixin: a static sliding window that, once full, moves on without reading from the host, as
    transformers' own does for its index."""

    cumulative_length_int: int
    max_cache_len: int
    keys: Any
    values: Any

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store [B, H, T, D] and return keys and values [B, H, L, D]."""
        if key_states.shape[2] > 1 or self.cumulative_length_int < self.max_cache_len:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        self.cumulative_length_int += 1
        self.keys.copy_(torch.cat([self.keys[:, :, 1:], key_states], dim=2))
        self.values.copy_(torch.cat([self.values[:, :, 1:], value_states], dim=2))
        return self.keys, self.values


class DecodeSteps:
    """What `generate` calls for each token after the first, in the place of the model.

    The inputs of a step are copied into tensors that stay, and its outputs out of them. A step that
    differs in more than values (other shapes, another cache, a sliding window that is full now) is
    recorded anew.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._routers = routers_of(model)
        self._layout: Any = None

    def __call__(self, *, past_key_values: Any, **inputs: Any) -> Any:
        """Return the model's output for one more token of each row, input_ids int64 [B, 1]."""
        leaves, spec = tree_flatten(inputs)
        layout = (spec, *map(_shape, leaves), *map(_shape_of_layer, past_key_values.layers))
        if layout != self._layout:
            self._begin(past_key_values, leaves, layout)
        for buffer, leaf in zip(self._buffers, leaves, strict=True):
            if isinstance(leaf, Tensor) and buffer is not leaf:
                buffer.copy_(leaf, non_blocking=True)
        return tree_map_only(Tensor, torch.clone, self._next())

    def _begin(self, cache: Any, leaves: list[Any], layout: Any) -> None:
        """Make the tensors in which the inputs of the coming steps lie."""
        self._layout, self._cache, self._spec = layout, cache, layout[0]
        # Keys of the layout by their number: as long as they are held, none other has it.
        self._held = [layer.keys for layer in cache.layers]
        self._buffers = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        for index, layer in enumerate(cache.layers):
            if layer.is_sliding and not isinstance(layer, RollingWindow):
                replace_layer(cache, index, RollingWindow)
        device = next(x.device for x in leaves if isinstance(x, Tensor))
        make_recorder = RECORDERS.get(device.type)
        self._recorder = make_recorder(device) if make_recorder else None
        self._rehearsed = 0
        self._output: Any = None

    def _next(self) -> Any:
        """Return the output of the step, which the next one overwrites."""
        recorder = self._recorder
        if recorder is None:
            return self._step()
        if self._output is not None:
            recorder.replay()
            self._take_note()
            return self._output
        if self._rehearsed < REHEARSALS:
            self._rehearsed += 1
            output, waits = recorder.rehearse(self._step)
            if waits and self._rehearsed == REHEARSALS:
                _say_not_recorded(f"a step waits for the device {waits} times")
                self._recorder = None
            return output
        self._output = recorder.record(self._step)
        recorder.replay()
        return self._output

    def _step(self) -> Any:
        inputs = tree_unflatten(self._buffers, self._spec)
        return self._model(past_key_values=self._cache, **inputs)

    def _take_note(self) -> None:
        """Note on the host what a step would have noted there."""
        for layer in self._cache.layers:
            for name in ("cumulative_length_int", "_skip_seen"):
                if hasattr(layer, name):
                    setattr(layer, name, getattr(layer, name) + 1)
        state = self._routers.state
        with state.lock:
            cached = cached_decisions(self._cache)
            state.begin(None, cached)
            for layer, decision in cached.items():
                state.record(layer, decision)


class StaticGeneration:
    """What a routed model adds to its class: `generate` with a static cache takes DecodeSteps."""

    def _validate_generation_mode(self, mode: Any, config: Any, kwargs: Any) -> None:
        if config.cache_implementation == "static" and mode not in _ONE_BY_ONE:
            _say_not_recorded(f"{mode.value} does not choose a token of each row at a time")
        super()._validate_generation_mode(mode, config, kwargs)  # type: ignore[misc]

    def _valid_auto_compile_criteria(self, model_kwargs: Any, generation_config: Any) -> bool:
        """Return whether decode goes by DecodeSteps; says so once where a static cache was asked
        for and it does not."""
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, StaticCache) or generation_config.disable_compile:
            return False
        reasons = [why for why, holds in _obstacles(self, cache).items() if holds]
        if reasons:
            _say_not_recorded(reasons[0])
        return not reasons

    def get_compiled_call(self, compile_config: Any) -> DecodeSteps:
        """Return what runs the decode steps of one generation; a routed model is not compiled."""
        return DecodeSteps(self)


def let_generate_record(model: Any) -> None:
    """Give a model with routers attached the `generate` that an exported one has; detach_routers
    takes it away again."""
    base = type(model)
    model.__dict__["_skip_base"] = base
    model.__class__ = _generating_class(base)  # type: ignore[arg-type]


def routers_of(model: Any) -> Routers:
    """Return the routers that a model's layers ask."""
    routers: Routers = find_decoder(model).decoder.__dict__["_skip_routers"]
    return routers


_ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def _say_not_recorded(why: str) -> None:
    logging.get_logger(__name__).warning_once(
        'megaskip: cache_implementation="static" decodes without a recorded step, which is slower '
        f"on a GPU: {why}"
    )


def _obstacles(model: Any, cache: Any) -> Mapping[str, bool]:
    """Return what keeps a generation's decode steps from being alike, by what it is."""
    routers, attention = routers_of(model), model.config.get_text_config()._attn_implementation
    quantizer = getattr(model, "hf_quantizer", None)
    return {
        "its routers decide per token": routers.config.unit != "sequence",
        "its routers are those of a training": not isinstance(routers.executor, InferenceExecutor),
        f"{attention} has masks of its own": attention not in ("sdpa", "eager"),
        "its weights are on several devices": len({p.device for p in model.parameters()}) > 1,
        "its quantised weights": quantizer is not None and not quantizer.is_compileable,
        f"{type(model).__name__} decides by values": not model._can_compile_fullgraph,
        "its cache is offloaded or not of keys and values alone": is_offloaded(cache)
        or not all(map(_is_static, cache.layers)),
    }


def _is_static(layer: Any) -> bool:
    return isinstance(layer, (KeptRows, RollingWindow)) or type(layer) in STATIC


def _shape(leaf: Any) -> Any:
    """Return what must not change of an input between steps: all but a tensor's values."""
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _shape_of_layer(layer: Any) -> Any:
    """Return what must not change of a cache layer between steps: where its keys are, and whether
    it is a window that is full."""
    full = getattr(layer, "cumulative_length_int", -1) >= layer.max_cache_len
    return id(layer.keys), full


@functools.cache
def _generating_class(base: type) -> type:
    """Return a class of the same name: configs are stored with it."""
    return type(base.__name__, (StaticGeneration, base), {"__module__": base.__module__})
