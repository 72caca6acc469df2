"""What steps take is learned from steps: exactly where they follow the formula, kind by kind where they do not."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest

from serve.cost.model import Constants
from serve.cost.steps import EVERY, LATEST, Step, StepCosts, StepTracker, fit_steps

TRUE = Constants(fixed=1e-3, linear=2e-5, attention=2e-8, match=6e-7)
PRIOR = Constants(fixed=0.0, linear=1e-5, attention=1e-9)
SIZES = [(tokens, start) for tokens in (1, 16, 128, 512, 1024) for start in (0, 3_000, 20_000, 60_000)]


def timed(costs: Constants, tokens: int, start: int, context: int = 0) -> Step:
    step = Step(tokens, start, context)
    return replace(step, seconds=StepCosts(costs).seconds(step))


def test_the_constants_of_steps_that_follow_the_formula_are_found_again() -> None:
    found = fit_steps(PRIOR, [[timed(TRUE, *size)] for size in SIZES])
    assert astuple(found.constants) == pytest.approx(astuple(TRUE), rel=1e-6)
    elsewhere = timed(TRUE, 256, 40_000, context=9_000)
    assert found.seconds(elsewhere) == pytest.approx(elsewhere.seconds)


def test_few_steps_set_the_speed_of_the_prior() -> None:
    slow = Constants(*(3 * constant for constant in astuple(PRIOR)))
    found = fit_steps(PRIOR, [[timed(slow, 1024, 0)], [timed(slow, 16, 0)]])
    assert astuple(found.constants) == pytest.approx(astuple(slow))


def test_a_kind_that_always_takes_longer_is_expected_to_and_one_odd_step_is_not() -> None:
    kinds = [[timed(TRUE, *size)] * 5 for size in SIZES]
    odd = SIZES.index((128, 20_000))
    kinds[odd] = [replace(step, seconds=2 * step.seconds) for step in kinds[odd]]
    outlier = SIZES.index((512, 3_000))
    kinds[outlier] = [replace(kinds[outlier][0], seconds=1e3 * kinds[outlier][0].seconds), *kinds[outlier][1:]]
    found = fit_steps(PRIOR, kinds)
    for steps in kinds:
        assert found.seconds(steps[-1]) == pytest.approx(steps[-1].seconds, rel=0.15)


def test_the_tracker_starts_from_the_prior_and_follows_the_latest_steps_of_each_kind() -> None:
    tracker = StepTracker()
    assert tracker.costs(None) is None
    assert tracker.costs(PRIOR) == StepCosts(PRIOR)
    for size in SIZES * LATEST:
        tracker.ran(timed(TRUE, *size))
    faster = Constants(*(constant / 2 for constant in astuple(TRUE)))
    for size in SIZES * LATEST:
        tracker.ran(timed(faster, *size))
    assert all(len(steps) <= LATEST for steps in tracker.latest.values())
    found = tracker.costs(PRIOR)
    assert found
    assert astuple(found.constants) == pytest.approx(astuple(faster), rel=1e-6)
    tracker.ran(Step(16, 0, seconds=1.0))
    assert tracker.costs(PRIOR) is found, f"it is fitted again after {EVERY} steps only"
