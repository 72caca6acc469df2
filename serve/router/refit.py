"""What a replica's work costs, refitted from the first tokens that it sends: for engines of any speed.

A replica works as long as it has prefills, in whatever order. So what is measured is a busy period, from the first
prefill to the first token after which none is left: all its work took all its time. One wrong time, as of a suspended
machine, must not count much: the fit minimises the sum of relative errors, not of their squares.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from serve.cost.model import Constants, weighted_median

REMEMBERED = 256  # busy periods, of all replicas that share them
LEAST = 8  # busy periods, before which the constants stay as they were given
EVERY = 4  # busy periods, the constants are fitted again
LONGEST = 16  # first tokens of a busy period, after which another one begins
ROUNDS = 12  # of reweighting
EXACT = 0.1  # a smaller relative error is as good as none
# A constant that was given as 0 is looked for in parts of this many tokens' linear cost.
PAIRS_A_TOKEN = 1 << 16


@dataclass(frozen=True)
class Work:
    """Prefills, and what decoded beside them; works add up."""

    requests: int = 0
    tokens: int = 0  # computed
    pairs: float = 0.0  # of a computed token and a token before it
    beside: float = 0.0  # computed tokens, each times the sequences that decoded beside it

    def expected_s(self, prior: Constants) -> float:
        """Seconds that it takes by these constants, without what decodes."""
        return prior.fixed * self.requests + prior.linear * self.tokens + prior.attention * self.pairs

    def and_prefill(self, start: int, stop: int, decodes: float) -> Work:
        """This work, and tokens [start, stop) of a prompt while `decodes` sequences decoded on average."""
        return Work(
            self.requests + 1,
            self.tokens + stop - start,
            self.pairs + (stop**2 - start**2) / 2,
            self.beside + (stop - start) * decodes,
        )


@dataclass(frozen=True)
class Fitted:
    """Constants, and what sequences that decode beside a prefill add to it."""

    costs: Constants
    beside: float = 0.0  # seconds a computed token, for each of them
    speed: float = 1.0  # seconds over those by the prior


class Measured:
    """The latest busy periods of replicas of one kind, and the constants that explain them, once there are `least`.

    A few periods of one replica settle its constants badly: equal replicas seem to differ, and those that seem fast get
    more than they can do. So equal replicas share one of these.
    """

    def __init__(self, prior: Constants, least: int = LEAST) -> None:
        self.prior, self.least = prior, least
        self.fitted: Fitted | None = None  # until enough was measured
        self.latest: deque[tuple[Work, float]] = deque(maxlen=REMEMBERED)
        self.seen = 0
        # Those that have ended with nothing left and nothing that decoded beside them. In others, requests may have
        # waited for a place instead of computing, so they count only until there are enough of these.
        self.clean: deque[tuple[Work, float]] = deque(maxlen=REMEMBERED)

    def add(self, work: Work, seconds: float, clean: bool) -> bool:
        """One more busy period; whether the constants have changed."""
        self.latest.append((work, seconds))
        if clean:
            self.clean.append((work, seconds))
        elif len(self.clean) >= self.least:
            return False
        self.seen += 1
        samples = self.clean if len(self.clean) >= self.least else self.latest
        if len(samples) < self.least or self.seen % EVERY:
            return False
        self.fitted = fit(self.prior, without_waits(self.prior, list(samples)))
        return True


class Refit:
    """One replica's busy period so far; those that are over go to `measured`."""

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        self.work = Work()  # of the busy period so far
        self.began = 0.0  # when it began, seconds
        self.spoiled = False  # whether prefills of this period waited for a place

    def sent(self, now: float, idle: bool, full: bool = False) -> None:
        """A prefill was sent to the replica, which had none before it if `idle`, and no place for it if `full`."""
        if idle:
            self.work, self.began, self.spoiled = Work(), now, False
        self.spoiled = self.spoiled or full

    def first_token(self, start: int, stop: int, decodes: float, now: float, idle: bool) -> bool:
        """Tokens [start, stop) were computed, and nothing is left if `idle`. Whether the constants have changed."""
        self.work = self.work.and_prefill(start, stop, decodes)
        if not idle and self.work.requests < LONGEST:
            return False
        work, seconds, spoiled = self.work, now - self.began, self.spoiled
        self.work, self.began, self.spoiled = Work(), now, False
        return seconds > 0 and not spoiled and self.measured.add(work, seconds, idle and not work.beside)


def without_waits(prior: Constants, samples: list[tuple[Work, float]]) -> list[tuple[Work, float]]:
    """The samples that took at most twice as long for their work as the fastest quarter did.

    What a replica waits for besides its prefills (a place, a tier, the network) makes a period longer, never shorter.
    """
    slowness = [seconds / work.expected_s(prior) for work, seconds in samples]
    most = 2 * float(np.quantile(slowness, 0.25))
    return [sample for sample, slow in zip(samples, slowness, strict=True) if slow <= most]


def fit(prior: Constants, samples: Sequence[tuple[Work, float]]) -> Fitted:
    """The constants with the least sum of relative errors, drawn to `prior` at the samples' speed.

    A sample is work and the seconds that it took. The prior has the weight of one sample for each constant, so few
    samples find the replica's speed, and many of different lengths its curve. No constant is negative. Raises
    ValueError for a prior without a cost for a token.
    """
    if prior.linear <= 0:
        raise ValueError(f"the linear cost of a token is {prior.linear}, expected more than 0 seconds to start from")
    rows = np.array([(w.requests, w.tokens, w.pairs, w.beside) for w, _ in samples])  # [samples, 4]
    seconds = np.array([took for _, took in samples])
    expected = rows[:, :3] @ np.array([prior.fixed, prior.linear, prior.attention])
    speed = weighted_median([*zip((seconds / expected).tolist(), expected.tolist(), strict=True)])
    attention = prior.attention or prior.linear / PAIRS_A_TOKEN
    scale = np.array([prior.fixed or prior.linear, prior.linear, attention, prior.linear])
    start = speed * np.array([prior.fixed > 0, 1.0, prior.attention > 0, 0.0])
    found = least_relative_error(rows * scale / seconds[:, None], start, speed)
    fixed, linear, pairs, beside = (found * scale).tolist()
    costs = replace(prior, fixed=fixed, linear=linear, attention=pairs, match=prior.match * speed)
    return Fitted(costs, beside, speed)


def at_speed(costs: Constants, speed: float) -> Constants:
    """The constants of a machine that takes `speed` times as long for all but reading."""
    return Constants(
        costs.fixed * speed, costs.linear * speed, costs.attention * speed, costs.match * speed, costs.restore
    )


def least_relative_error(terms: np.ndarray, start: np.ndarray, speed: float) -> np.ndarray:
    """The factors ([terms] float64, none negative) with the least sum of |1 - terms @ factors|, drawn to `start`.

    `terms` is [samples, terms]. By least squares, reweighted by the errors so far (Holland and Welsch, 1977,
    https://doi.org/10.1080/03610927708827533).
    """
    used = np.ones(terms.shape[1], bool)
    found = start.copy()
    for _ in range(ROUNDS):
        weight = 1 / np.sqrt(np.maximum(np.abs(1 - terms @ found), EXACT))
        # A term that is off by the whole speed counts as an error of 1, of a sample that fits.
        drawn = np.diag(np.full(len(start), 1 / max(speed, 1e-12))) / np.sqrt(EXACT)
        left = np.concatenate([terms * weight[:, None], drawn])[:, used]
        right = np.concatenate([weight, start / max(speed, 1e-12) / np.sqrt(EXACT)])
        found = np.zeros_like(start)
        found[used] = np.linalg.lstsq(left, right, rcond=None)[0]
        if (found < 0).any():
            used &= found >= 0
            found = np.maximum(found, 0.0)
    return found
