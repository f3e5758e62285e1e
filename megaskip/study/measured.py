"""What is measured of a way to skip, document by document. Knows a routed model, not how it came to
skip."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megaskip.data import Batch
from megaskip.measures.costs import Cost, CostModel, total
from megaskip.routing import RouterSet
from megaskip.study.agreement import Agreement, Continuations
from megaskip.study.baselines import Policy
from megaskip.study.latency import prefill_ratio
from megaskip.study.questions import Answers, QuestionSet
from megaskip.study.scoring import Scores, score


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The scores of every document under one way to skip."""

    text: Scores
    answers: Mapping[str, Answers]
    """Of each task of questions, in its order; minimal pairs are one of them."""
    agreement: Agreement | None
    """Of greedy continuations with the dense model's."""
    latency: float | None
    """Of a prefill of the first held-out batch, over that of the dense model; None where it was
    not timed."""
    cost: Cost
    """Of the documents, counted."""

    def to_arrays(self) -> dict[str, Any]:
        """Return all numbers by name, as `from_arrays` reads them."""
        agreement = {} if self.agreement is None else {"agreement": self.agreement}
        groups: dict[str, Any] = {"text": self.text, "cost": self.cost, **agreement}
        groups |= {f"answers/{task}": answers for task, answers in self.answers.items()}
        arrays = {
            f"{group}/{item.name}": np.asarray(getattr(values, item.name))
            for group, values in groups.items()
            for item in dataclasses.fields(values)
        }
        return arrays | ({} if self.latency is None else {"latency": np.asarray(self.latency)})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> "Measured":
        """Return what `to_arrays` gave the numbers of."""
        groups: dict[str, dict[str, Any]] = {}
        for name, values in arrays.items():
            group, _, own = name.rpartition("/")
            groups.setdefault(group, {})[own] = values
        tasks = [group for group in groups if group.startswith("answers/")]
        latency = groups.get("", {}).get("latency")
        return cls(
            text=Scores(**groups["text"]),
            answers={task.removeprefix("answers/"): Answers(**groups[task]) for task in tasks},
            agreement=Agreement(**groups["agreement"]) if "agreement" in groups else None,
            latency=None if latency is None else float(latency),
            cost=Cost(**{name: float(value) for name, value in groups["cost"].items()}),
        )


@dataclass(kw_only=True)
class Yardstick:
    """What every way to skip is measured on: texts, questions, prompts to continue."""

    held_out: Sequence[Batch]
    prefill_runs: int
    """Pairs of prefills that are timed; 0 times nothing."""
    questions: list[QuestionSet] = field(default_factory=list)
    continuations: Continuations | None = None

    def measure(
        self, model: Any, routers: RouterSet, policy: Policy | None, everything: Policy
    ) -> Measured:
        """Return what a policy does to the documents; without one the routers decide. `everything`
        is the policy that skips nothing."""
        text = score(model, routers, self.held_out, policy)
        latency, agreement = None, None
        if runs := self.prefill_runs:
            first = self.held_out[:1]
            latency = prefill_ratio(model, routers, first, policy, everything, runs=runs)
        if self.continuations is not None:
            agreement = self.continuations.compare(routers, policy)
        answers = {
            task.name: task.judge(
                score(model, routers, task.batches, policy, documents=task.documents).nll
            )
            for task in self.questions
        }
        return Measured(
            text=text,
            answers=answers,
            agreement=agreement,
            latency=latency,
            cost=_price(model, routers, text),
        )


def _price(model: Any, routers: RouterSet, text: Scores) -> Cost:
    """Return what the held-out documents cost, with the routers that are attached now."""
    costs = CostModel(model, routers)
    units = np.broadcast_to(text.units, text.kept.shape)
    kept = text.kept * units
    return total(
        costs.price(int(read), int(read), kept[:, row].tolist(), units[:, row].tolist())
        for row, read in enumerate(text.read)
    )
