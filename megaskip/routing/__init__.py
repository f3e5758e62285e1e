"""Decisions: what a router looks at, what it decides, what that costs. Torch only.

Promise: a fresh router keeps everything, bit for bit; all routing arithmetic is float32.
"""

from megaskip.routing.budget import Budget, Measured
from megaskip.routing.decision import RoutingDecision, straight_through
from megaskip.routing.flow import DenseFlow, Flow, SparseFlow
from megaskip.routing.gate import Gate
from megaskip.routing.pooling import Pooling
from megaskip.routing.routers import PREFIX, Router, RouterSet, make_router
from megaskip.routing.search import ThresholdSearch
from megaskip.routing.worth import Worth

__all__ = [
    "PREFIX",
    "Budget",
    "DenseFlow",
    "Flow",
    "Gate",
    "Measured",
    "Pooling",
    "Router",
    "RouterSet",
    "RoutingDecision",
    "SparseFlow",
    "ThresholdSearch",
    "Worth",
    "make_router",
    "straight_through",
]
