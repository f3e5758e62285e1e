"""Decisions: what a router looks at, what it decides, what that costs. Torch only.

Promise: a fresh router keeps everything, bit for bit; all routing arithmetic is float32.
"""

from megaskip.routing.budget import Budget, Measured
from megaskip.routing.counts import Counts
from megaskip.routing.decision import RoutingDecision
from megaskip.routing.executor import Executor
from megaskip.routing.gate import Gate
from megaskip.routing.pooling import Pooling
from megaskip.routing.router import PREFIX, AffineRouter, Router, make_router
from megaskip.routing.router_set import RouterSet
from megaskip.routing.routers import Routers
from megaskip.routing.state import RoutingState
from megaskip.routing.steering import Steering, straight_through
from megaskip.routing.thresholds import Thresholds
from megaskip.routing.training_executor import DenseExecutor, SparseExecutor

__all__ = [
    "PREFIX",
    "AffineRouter",
    "Budget",
    "Counts",
    "DenseExecutor",
    "Executor",
    "Gate",
    "Measured",
    "Pooling",
    "Router",
    "RouterSet",
    "Routers",
    "RoutingDecision",
    "RoutingState",
    "SparseExecutor",
    "Steering",
    "Thresholds",
    "make_router",
    "straight_through",
]
