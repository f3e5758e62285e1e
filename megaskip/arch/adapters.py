"""Where adapters meet a model: which linear layers they adapt, and how those ask them.

As with routers the class of an instance is exchanged, its forward never overridden, and no module
is put around another. Knows modules and names, not what trains.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megaskip.arch.decoder import find_decoder
from megaskip.arch.sites import find_sites
from megaskip.arch.stage import LayerElsewhere
from megaskip.config import AdapterConfig, RunConfig
from megaskip.config.checks import did_you_mean
from megaskip.errors import CheckpointError, ConfigError, UnsupportedModelError
from megaskip.extras import extra
from megaskip.routing import RouterSet
from megaskip.routing.adapters import PEFT_NAME, AdaptedLayer, AdapterSet


class AdaptedLinear:
    """A linear layer that adds the update of its adapter to what its class returns."""

    _skip_adapters: AdapterSet
    _skip_adapted: AdaptedLayer

    def forward(self, read: Tensor) -> Tensor:
        """Return the output [..., E] of `read` [..., D]."""
        output = super().forward(read)  # type: ignore[misc]
        return self._skip_adapters.add(self._skip_adapted, output, read)


def make_adapters(
    model: nn.Module,
    config: AdapterConfig,
    *,
    seed: int = 0,
    device: torch.device | None = None,
) -> AdapterSet | None:
    """Return fresh adapters as `config` asks for, for a whole model, which may lack its weights;
    None without any.

    Raises ConfigError when --lora_targets names a layer that the model does not have, and
    MissingExtraError without peft.
    """
    if not config.lora_rank:
        return None
    layers = find_adapted_layers(model, config)
    names = {f"{layer.layer}.{layer.path}" for layer in layers}
    settings = lora_settings(config.lora_rank, config.alpha, _shortest(model, names))
    return adapter_set(stack_of(model), layers, settings, seed=seed, device=device)


def adapter_set(
    stack: str,
    layers: Sequence[AdaptedLayer],
    settings: Any,
    *,
    seed: int = 0,
    device: torch.device | None = None,
) -> AdapterSet:
    """Return fresh adapters for `layers`, as peft's LoraConfig `settings` has them; arguments as in
    AdapterSet. Raises MissingExtraError without peft."""
    tree = _inject(stack, layers, settings)
    return AdapterSet(tree, stack, layers, settings, seed=seed, device=device)


def lora_settings(rank: int, alpha: float, targets: Iterable[str]) -> Any:
    """Return peft's LoraConfig of what is trained here."""
    with extra("lora"):
        from peft import LoraConfig
    number: Any = int(alpha) if float(alpha).is_integer() else alpha
    # JSON and error messages are to be the same every time.
    return LoraConfig(
        r=rank, lora_alpha=number, target_modules=sorted(targets), task_type="CAUSAL_LM"
    )


def find_adapted_layers(model: nn.Module, config: AdapterConfig) -> tuple[AdaptedLayer, ...]:
    """Return the linear layers of a whole model that --lora_targets names, in their order."""
    linears = _linears(model)
    names = config.names
    if names is None:
        kinds = ("attn", "mlp") if config.lora_targets == "all" else (config.lora_targets,)
        chosen = [layer for kind, layer in linears if kind in kinds]
        if not chosen:
            raise ConfigError(
                f"--lora_targets {config.lora_targets}: this model has no linear layers there "
                f"(it has {_named(linears)}); name others"
            )
        return tuple(chosen)
    for name in names:
        if not any(matches(layer, name) for _, layer in linears):
            known = {layer.path.rpartition(".")[2] for _, layer in linears}
            raise ConfigError(
                f"--lora_targets {name}: no linear layer of the decoder layers is called that (they"
                f" are {_named(linears)}){did_you_mean(name, known)}"
            )
    return tuple(layer for _, layer in linears if any(matches(layer, name) for name in names))


def missing_layer(model: nn.Module, adapters: AdapterSet) -> AdaptedLayer | None:
    """Return a linear layer of a model, or of a stage of one, that the settings of `adapters` name
    and that has none; None where all have theirs."""
    there = {(layer.layer, layer.path) for layer in adapters.layers}
    names = adapters.settings.target_modules
    lacking = (layer for _, layer in _linears(model) if (layer.layer, layer.path) not in there)
    return next((layer for layer in lacking if any(matches(layer, n) for n in names)), None)


def stack_of(model: nn.Module) -> str:
    """Return what the names of a causal LM's decoder layers begin with, such as "model.layers"."""
    layers = find_decoder(model).layers
    return next(name for name, module in model.named_modules() if module is layers)


def attach_adapters(model: nn.Module, adapters: AdapterSet) -> None:
    """Let the linear layers of a model, or of a stage of one, ask their adapters.

    Fresh adapters change nothing, bit for bit. Raises ConfigError for a model that has adapters,
    and CheckpointError where the adapters are those of a model of another shape.
    """
    parts = find_decoder(model)
    for adapted in adapters.layers:
        layer = parts.layers[adapted.layer] if adapted.layer < len(parts.layers) else nn.Module()
        if isinstance(layer, LayerElsewhere):
            continue
        try:
            linear: Any = layer.get_submodule(adapted.path)
        except AttributeError:
            linear = None
        shape = (getattr(linear, "in_features", None), getattr(linear, "out_features", None))
        if shape != (adapted.in_features, adapted.out_features):
            raise CheckpointError(
                f"the adapter of {adapters.name_of(adapted)} is for {adapted.in_features} features "
                f"in and {adapted.out_features} out, the model at hand has {shape[0]} and "
                f"{shape[1]} there; name the base that it was trained on"
            )
        _adapt(linear, adapters, adapted)


def add_adapters(
    model: nn.Module,
    routers: RouterSet,
    whole: nn.Module,
    config: RunConfig,
    *,
    device: torch.device | None = None,
) -> None:
    """Let a model, or a stage of the model `whole`, have the adapters that a run asks for, if any,
    as part of what its `routers` train. Every rank holds all of them. Errors as `make_adapters`."""
    adapters = make_adapters(whole, config.adapter, seed=config.optim.seed, device=device)
    if adapters is not None:
        attach_adapters(model, adapters)
        routers.take_adapters(adapters)


def detach_adapters(model: nn.Module) -> None:
    """Take the adapters off a model again, if it has any."""
    for module in find_decoder(model).decoder.modules():
        if isinstance(module, AdaptedLinear):
            for name in ("_skip_adapters", "_skip_adapted"):
                del module.__dict__[name]
            module.__class__ = type(module).__mro__[2]


@functools.cache
def adapted_class(base: type) -> type:
    """Return the subclass of a linear layer's class that asks an adapter; one for each."""
    return type(f"Adapted{base.__name__}", (AdaptedLinear, base), {"__module__": base.__module__})


def _adapt(linear: Any, adapters: AdapterSet, adapted: AdaptedLayer) -> None:
    if isinstance(linear, AdaptedLinear):
        raise ConfigError("this model has adapters already; call detach_adapters(model) first")
    if "forward" in vars(linear):
        raise UnsupportedModelError(
            f"{adapters.name_of(adapted)} has a forward of its own on the instance, which hides "
            "the adapter: the model was dispatched (device_map) or patched"
        )
    base: type = type(linear)
    linear.__class__ = adapted_class(base)
    linear.__dict__.update({"_skip_adapters": adapters, "_skip_adapted": adapted})


def _linears(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """Return (attn or mlp, linear layer) of all linear layers in the sublayers of a model, or of a
    stage of one."""
    parts = find_decoder(model)
    linears = []
    for index, layer in enumerate(parts.layers):
        if isinstance(layer, LayerElsewhere):
            continue
        sites = find_sites(layer, parts.model_type)
        for kind, site in (("attn", sites.attention), ("mlp", sites.mlp)):
            for name, module in layer.get_submodule(site).named_modules(prefix=site):
                if isinstance(module, nn.Linear):
                    adapted = AdaptedLayer(
                        layer=index,
                        path=name,
                        in_features=module.in_features,
                        out_features=module.out_features,
                    )
                    linears.append((kind, adapted))
    return linears


def matches(layer: AdaptedLayer, name: str) -> bool:
    """Return whether a name, as peft takes it, is that of a layer or the end of it."""
    return f".{layer.layer}.{layer.path}".endswith(f".{name}") or name.endswith(
        f"layers.{layer.layer}.{layer.path}"
    )


def _named(linears: Iterable[tuple[str, AdaptedLayer]]) -> str:
    return ", ".join(sorted({layer.path.rpartition(".")[2] for _, layer in linears})) or "none"


def _shortest(model: nn.Module, chosen: set[str]) -> set[str]:
    """Return the names by which peft finds the `chosen` layers ("3.self_attn.q_proj") in a model,
    and no other module: the last parts of them where those are enough."""
    stack = stack_of(model)
    full = {f"{stack}.{name}" for name in chosen}
    others = {name for name, _ in model.named_modules()} - full
    taken = {name.rpartition(".")[2] for name in others}
    return {name if (last := name.rpartition(".")[2]) in taken else last for name in full}


def _inject(stack: str, layers: Sequence[AdaptedLayer], settings: Any) -> nn.Module:
    """Return a tree of modules named as those of a model, whose leaves are peft's LoRA layers; of
    the layers that these adapt, nothing is left in it."""
    with extra("lora"):
        from peft import inject_adapter_in_model
    with unset_fake_temporarily():
        tree = _tree_of_linears(stack, layers)
        # On the meta device: fresh values are given to them later, the same on every rank.
        inject_adapter_in_model(settings, tree, adapter_name=PEFT_NAME, low_cpu_mem_usage=True)
    for layer in layers:
        tree.get_submodule(f"{stack}.{layer.layer}.{layer.path}").base_layer = nn.Identity()
    return tree


def _tree_of_linears(stack: str, layers: Sequence[AdaptedLayer]) -> nn.Module:
    """Return a tree of modules named as those of a model, with its adapted layers as leaves."""
    tree = nn.Module()
    for layer in layers:
        *path, last = f"{stack}.{layer.layer}.{layer.path}".split(".")
        parent = tree
        for name in path:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        parent.add_module(last, linear)
    return tree
