"""What a replica's work costs, refitted from the first tokens that it sends: for engines of any speed.

A replica works on one prefill at a time, so a request's own work took the time since it was sent, or since the first
token before it if that came later (Lindley, 1952, https://doi.org/10.1017/S0305004100027638). One wrong time, of a
suspended machine or of a prefill that another overtook, must not count much: the fit minimises the sum of relative
errors, not of their squares.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from serve.cost.model import Constants, weighted_median

REMEMBERED = 64  # first tokens
EVERY = 4  # first tokens, the constants are fitted again
ROUNDS = 12  # of reweighting
# A constant that was given as 0 is looked for in parts of this many tokens' linear cost.
PAIRS_A_TOKEN = 1 << 16


@dataclass(frozen=True)
class Observed:
    """What a replica took to compute tokens [start, stop) of a prompt, while `decodes` sequences decoded beside it."""

    start: int
    stop: int
    decodes: int
    seconds: float

    @property
    def pairs(self) -> float:
        """Pairs of a computed token and a token before it."""
        return (self.stop**2 - self.start**2) / 2


@dataclass(frozen=True)
class Fitted:
    """A replica's constants, and by how much what decodes beside a prefill lengthens it."""

    costs: Constants
    shared: float = 0.0  # the share that any do
    each: float = 0.0  # the share that each of them does


class Refit:
    """One replica's latest first tokens, and the constants that explain them."""

    def __init__(self, prior: Constants) -> None:
        self.prior = prior
        self.latest: deque[Observed] = deque(maxlen=REMEMBERED)
        self.seen = 0
        self.fitted = Fitted(prior)

    def observed(self, each: Observed) -> bool:
        """Learn from a first token; whether the constants have changed. Times of 0 or less are left out."""
        if each.seconds <= 0 or each.stop <= each.start:
            return False
        self.latest.append(each)
        self.seen += 1
        if self.seen > EVERY and self.seen % EVERY:
            return False
        self.fitted = fit(self.prior, self.latest)
        return True


def fit(prior: Constants, samples: Sequence[Observed] | deque[Observed]) -> Fitted:
    """The constants with the least sum of relative errors, drawn to `prior` at the samples' speed.

    The prior has the weight of one sample for each constant, so few samples find the replica's speed, and many of
    different lengths its curve. No constant is negative. Raises ValueError for a prior without a cost for a token.
    """
    if prior.linear <= 0:
        raise ValueError(f"the linear cost of a token is {prior.linear}, expected more than 0 seconds to start from")
    base = np.array([prior.compute_s(each.start, each.stop) for each in samples])
    seconds = np.array([each.seconds for each in samples])
    speed = weighted_median(
        [*zip((seconds / (prior.fixed + base)).tolist(), (prior.fixed + base).tolist(), strict=True)]
    )
    attention = prior.attention or prior.linear / PAIRS_A_TOKEN
    decodes = np.array([each.decodes for each in samples])
    terms = np.stack(
        [
            np.full(len(base), prior.fixed or prior.linear),
            prior.linear * np.array([each.stop - each.start for each in samples]),
            attention * np.array([each.pairs for each in samples]),
            base * (decodes > 0),
            base * decodes,
        ],
        axis=1,
    )  # [samples, 5] seconds
    start = np.array([speed if prior.fixed else 0.0, speed, speed if prior.attention else 0.0, 0.0, 0.0])
    found = least_relative_error(terms / seconds[:, None], start, speed)
    costs = replace(
        prior,
        fixed=float(found[0] * (prior.fixed or prior.linear)),
        linear=float(found[1] * prior.linear),
        attention=float(found[2] * attention),
        match=prior.match * speed,
    )
    return Fitted(costs, shared=float(found[3] / speed), each=float(found[4] / speed))


def least_relative_error(terms: np.ndarray, start: np.ndarray, speed: float) -> np.ndarray:
    """The factors ([terms] float64, none negative) with the least sum of |1 - terms @ factors|, drawn to `start`.

    `terms` is [samples, terms]. By least squares, reweighted by the errors so far (Holland and Welsch, 1977,
    https://doi.org/10.1080/03610927708827533).
    """
    used = np.ones(terms.shape[1], bool)
    found = start.copy()
    for _ in range(ROUNDS):
        weight = 1 / np.sqrt(np.maximum(np.abs(1 - terms @ found), 1e-3))
        # A term that is off by the whole speed counts as an error of 1.
        drawn = np.diag(np.full(len(start), 1 / max(speed, 1e-12)))
        left = np.concatenate([terms * weight[:, None], drawn])[:, used]
        right = np.concatenate([weight, start / max(speed, 1e-12)])
        found = np.zeros_like(start)
        found[used] = np.linalg.lstsq(left, right, rcond=None)[0]
        if (found < 0).any():
            used &= found >= 0
            found = np.maximum(found, 0.0)
    return found
