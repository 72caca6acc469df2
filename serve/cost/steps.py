"""What a step of the engine takes, by the steps that it has run: the basis of a predicted time to the first token.

A step of `tokens` (those of its compiled shape: padding takes as long) after `start` others, beside sequences that
decode with `context` tokens in all, takes

    fixed + linear tokens + attention tokens (start + tokens / 2) + match (start + context)

seconds: the matrices, each query over the keys before it, and reading these keys. It is the cost model of a prompt
(serve.cost.model) for one step, refitted to the server's own steps as it runs. `CostModel` itself stands in for what
was not measured yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from functools import cached_property
from statistics import median

from serve.cost.fit import fit_cost_model
from serve.cost.model import Constants

# Steps of about one size at about one place, within a factor of two each, are of one kind. So many of each kind are
# remembered, the latest, so that those that come often do not crowd out the others.
LATEST = 8
# New steps, after which the constants are fitted again.
EVERY = 8
# Kinds of steps, before which the constants are the prior's, at the speed of what was measured.
LEAST_KINDS = 6
# A kind counts so many steps that took what the constants say, so that one odd step says little.
PRIOR_STEPS = 2

Kind = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """The size of a step, and what it took if it was timed."""

    tokens: int  # of its compiled shape
    start: int  # tokens before its chunk
    context: int = 0  # tokens before those that decode beside it, in all
    seconds: float = 0.0

    def terms(self) -> tuple[float, ...]:
        """The factor of each of the cost model's constants."""
        return (1.0, self.tokens, self.tokens * (self.start + self.tokens / 2), self.start + self.context, 0.0)

    @property
    def kind(self) -> Kind:
        """The steps like this one."""
        return self.tokens.bit_length(), (self.start + self.context).bit_length()


@dataclass(frozen=True)
class StepCosts:
    """The constants of steps, and how far each kind that was measured differs from them."""

    constants: Constants
    # Measured over fitted seconds: what the formula does not know, such as the sizes of a processor's caches.
    ratios: Mapping[Kind, float] = field(default_factory=dict)

    @cached_property
    def factors(self) -> tuple[float, ...]:
        """The constants in the order of a step's terms."""
        return astuple(self.constants)

    def seconds(self, step: Step) -> float:
        """Seconds that a step takes."""
        return self.fitted(step) * self.ratios.get(step.kind, 1.0)

    def fitted(self, step: Step) -> float:
        """Seconds that a step takes by the constants alone."""
        return sum(factor * term for factor, term in zip(self.factors, step.terms(), strict=True))


def fit_steps(prior: Constants, kinds: Sequence[Sequence[Step]]) -> StepCosts:
    """The constants that explain steps, given by their kinds, and what is left of each kind.

    Of each kind the median step counts. None of the kinds may be empty.
    """
    before = StepCosts(prior)
    typical = [sorted(steps, key=lambda step: step.seconds / before.fitted(step))[len(steps) // 2] for steps in kinds]
    costs = StepCosts(fit_constants(prior, typical))
    ratios = {
        steps[0].kind: median([1.0] * PRIOR_STEPS + [step.seconds / costs.fitted(step) for step in steps])
        for steps in kinds
    }
    return StepCosts(costs.constants, ratios)


def fit_constants(prior: Constants, steps: Sequence[Step]) -> Constants:
    """The constants of steps of different kinds.

    Where these are few, or do not separate size from place, they are the prior's at the speed of what was measured.
    """
    if len(steps) >= LEAST_KINDS:
        with suppress(ValueError):
            return fit_cost_model(steps)
    before = StepCosts(prior)
    speed = median(step.seconds / before.fitted(step) for step in steps)
    return Constants(*(speed * constant for constant in before.factors))


class StepTracker:
    """The latest steps of each kind of one engine, and the constants that explain them. One thread writes to it."""

    def __init__(self) -> None:
        self.latest: dict[Kind, deque[Step]] = {}
        self.new = 0  # steps since the latest fit
        self.fitted: StepCosts | None = None

    def ran(self, step: Step) -> None:
        """A step was timed."""
        if step.seconds > 0:
            self.latest.setdefault(step.kind, deque(maxlen=LATEST)).append(step)
            self.new += 1

    def costs(self, prior: Constants | None) -> StepCosts | None:
        """The constants by now; None until a prefill was measured."""
        if prior is None or prior.linear <= 0:
            return self.fitted
        if self.new >= EVERY or (self.new and self.fitted is None):
            self.fitted, self.new = fit_steps(prior, [list(steps) for steps in self.latest.values()]), 0
        return self.fitted or StepCosts(prior)
