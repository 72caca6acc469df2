"""Fit a cost model's constants to measurements: least squares, intervals, and how well they predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np

from serve.cost.model import Constants

TERMS = tuple(Constants.__dataclass_fields__)


class Timed(Protocol):
    """Work that was timed."""

    @property
    def seconds(self) -> float:
        """How long it took, above 0."""

    def terms(self) -> tuple[float, ...]:
        """The factor of each of TERMS."""


@dataclass(frozen=True)
class Sample:
    """The measured TTFT of a prompt, of which some tokens were cached, and some of these restored."""

    prompt: int
    cached: int
    restored: int
    seconds: float

    def terms(self) -> tuple[float, ...]:
        """The factor of each of TERMS."""
        n, p = self.prompt, self.cached
        return (1.0, n - p, (n**2 - p**2) / 2, p, self.restored)


def fit_cost_model(samples: Sequence[Timed]) -> Constants:
    """The constants with the least squared relative error, so a millisecond counts for more in a short request.

    No constant is negative: a term that comes out negative is left out, and the others are fitted again. Raises
    ValueError where the samples do not separate prompt length from position.
    """
    terms = np.array([s.terms() for s in samples]) / np.array([[s.seconds] for s in samples])  # [samples, terms]
    used = [i for i in range(len(TERMS)) if terms[:, i].any()]
    while True:
        scale = np.linalg.norm(terms[:, used], axis=0)
        found, _, rank, _ = np.linalg.lstsq(terms[:, used] / scale, np.ones(len(samples)), rcond=None)
        if rank < len(used):
            raise ValueError(
                f"the cost model needs samples of more lengths and positions: {len(samples)} samples settle {rank} "
                f"of its {len(used)} constants"
            )
        if found.min() >= 0:
            values = {TERMS[i]: float(value) for i, value in zip(used, found / scale, strict=True)}
            return Constants(**dict.fromkeys(TERMS, 0.0) | values)
        del used[int(found.argmin())]


def intervals(samples: Sequence[Sample], seed: int = 0, rounds: int = 1000) -> dict[str, tuple[float, float]]:
    """A 95% interval for each constant, by the pairs bootstrap: fits of as many samples, drawn with replacement."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(rounds):
        chosen = [samples[i] for i in rng.integers(0, len(samples), len(samples))]
        try:
            drawn.append(astuple(fit_cost_model(chosen)))
        except ValueError:  # a draw of few different samples
            continue
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {term: (float(a), float(b)) for term, a, b in zip(TERMS, low, high, strict=True)}


def held_out(samples: Sequence[Sample], seed: int = 0, folds: int = 5) -> np.ndarray:
    """Predicted seconds, [samples]; each sample is predicted by a fit of the folds that do not contain it."""
    order = np.random.default_rng(seed).permutation(len(samples))
    predicted = np.zeros(len(samples))
    for fold in range(folds):
        hidden = set(order[fold::folds].tolist())
        constants = fit_cost_model([s for i, s in enumerate(samples) if i not in hidden])
        for i in hidden:
            predicted[i] = constants.ttft_s(samples[i].prompt, samples[i].cached, samples[i].restored)
    return predicted


def accuracy(measured: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Median and largest relative error, and R^2, the share of the variance that the prediction explains."""
    errors = np.abs(predicted - measured) / measured
    explained = 1 - np.sum((predicted - measured) ** 2) / np.sum((measured - measured.mean()) ** 2)
    return {
        "median_relative_error": float(np.median(errors)),
        "largest_relative_error": float(errors.max()),
        "r_squared": float(explained),
    }
