"""How long a prefill takes when what is skipped is not computed."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from megaskip.data import Batch
from megaskip.inference.executor import InferenceExecutor
from megaskip.routing import RouterSet
from megaskip.study.baselines import Policy
from megaskip.study.scoring import score


def prefill_ratio(
    model: Any,
    routers: RouterSet,
    batches: Sequence[Batch],
    policy: Policy | None,
    everything: Policy,
    *,
    runs: int,
) -> float:
    """Return the time of a prefill of `batches` under `policy`, over that under `everything`, which
    skips nothing; without a policy the routers decide.

    The median over `runs` pairs of prefills that follow each other, so that a slower machine slows
    both.
    """

    def seconds(tried: Policy | None) -> float:
        begun = time.perf_counter()
        score(model, routers, batches, tried)
        return time.perf_counter() - begun

    executor, ratios = routers.executor, []
    routers.executor = InferenceExecutor(unit=routers.config.unit)
    try:
        seconds(everything)  # warms up
        for _ in range(runs):
            ratios.append(seconds(policy) / seconds(everything))
    finally:
        routers.executor = executor
    return statistics.median(ratios)
