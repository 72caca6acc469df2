"""Refitted constants: replicas of known speed are recognised by the first tokens that they send."""

import numpy as np
import pytest

from serve.cost.model import Constants
from serve.router.refit import Measured, Refit, Work, fit

PRIOR = Constants(fixed=5e-3, linear=2e-5, attention=1e-9)


def periods(truth: Constants, count: int, each: float = 0.0, noise: float = 0.0, stalls: int = 0):
    """Busy periods of a replica with these constants; `stalls` of them took a minute more."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        work, seconds = Work(), 0.0
        for _ in range(rng.integers(1, 4)):
            stop = int(rng.integers(500, 60_000))
            start = int(stop * rng.choice([0.0, 0.5, 0.9]))
            decodes = int(rng.integers(0, 6)) if each else 0
            work = work.and_prefill(start, stop, decodes)
            seconds += truth.ttft_s(stop, start) + each * truth.linear * decodes * (stop - start)
        made.append((work, seconds * (1 + noise * rng.standard_normal()) + (60.0 if i < stalls else 0.0)))
    return made


@pytest.mark.parametrize("speed", [0.2, 1.0, 7.0])
def test_a_few_first_tokens_find_the_speed_of_a_replica(speed):
    truth = Constants(PRIOR.fixed * speed, PRIOR.linear * speed, PRIOR.attention * speed)
    found = fit(PRIOR, periods(truth, 3)).costs
    assert found.ttft_s(52_000, 0) == pytest.approx(truth.ttft_s(52_000, 0), rel=0.02)


def test_many_find_the_curve_of_another_model_in_spite_of_noise_and_stalls():
    truth = Constants(fixed=2e-2, linear=6e-5, attention=1e-8)
    found = fit(PRIOR, periods(truth, 64, noise=0.05, stalls=6)).costs
    for prompt, cached in ((52_000, 0), (52_000, 45_000), (30_000, 0)):
        assert found.ttft_s(prompt, cached) == pytest.approx(truth.ttft_s(prompt, cached), rel=0.1)


def test_what_decodes_beside_a_prefill_is_priced():
    found = fit(PRIOR, periods(PRIOR, 64, each=0.2))
    assert found.beside == pytest.approx(0.2 * PRIOR.linear, rel=0.1)
    assert found.costs.linear == pytest.approx(PRIOR.linear, rel=0.1)


def test_a_period_begins_with_the_first_prefill_and_ends_when_none_is_left():
    refit = Refit(Measured(PRIOR))
    refit.sent(10.0, idle=True)
    refit.sent(10.1, idle=False)
    assert not refit.first_token(0, 10_000, 0, 11.0, idle=False)
    refit.first_token(0, 10_000, 0, 12.0, idle=True)
    ((work, seconds),) = refit.measured.latest
    assert (work.requests, work.tokens, seconds) == (2, 20_000, 2.0)


def test_a_prior_without_a_cost_is_refused():
    with pytest.raises(ValueError, match="linear cost of a token is 0"):
        fit(Constants(1.0, 0.0, 0.0), periods(PRIOR, 1))
