"""Decisions: what a router looks at, what it decides, what that costs. Torch only.

Promise: a fresh router keeps everything, bit for bit; all routing arithmetic is float32.
"""

from megaskip.routing.budget import Budget, Measured
from megaskip.routing.counts import Counts
from megaskip.routing.decision import RoutingDecision, straight_through
from megaskip.routing.executor import DenseExecutor, Executor, SparseExecutor
from megaskip.routing.gate import Gate
from megaskip.routing.pooling import Pooling
from megaskip.routing.routers import PREFIX, Router, RouterSet, make_router

__all__ = [
    "PREFIX",
    "Budget",
    "Counts",
    "DenseExecutor",
    "Executor",
    "Gate",
    "Measured",
    "Pooling",
    "Router",
    "RouterSet",
    "RoutingDecision",
    "SparseExecutor",
    "make_router",
    "straight_through",
]
