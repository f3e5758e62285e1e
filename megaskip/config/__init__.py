"""Every setting of a run, checked before anything heavy starts.

Promise: a RunConfig that exists is valid in itself, and each value has one owner.
"""

from megaskip.config.adapter import AdapterConfig
from megaskip.config.cli import parse_options, parse_run_config
from megaskip.config.layers import resolve_layers
from megaskip.config.log import LogConfig
from megaskip.config.options import option
from megaskip.config.parallel import ParallelConfig
from megaskip.config.router import RouterConfig
from megaskip.config.routing import (
    GRANULARITIES,
    SUBLAYER_GRANULARITIES,
    RoutingConfig,
    Threshold,
)
from megaskip.config.run import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)

__all__ = [
    "GRANULARITIES",
    "SUBLAYER_GRANULARITIES",
    "AdapterConfig",
    "CheckpointConfig",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RouterConfig",
    "RoutingConfig",
    "RunConfig",
    "Threshold",
    "option",
    "parse_options",
    "parse_run_config",
    "resolve_layers",
]
