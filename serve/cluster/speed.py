"""How fast each replica computes: by its own measurements, drawn to what all of them have measured.

A replica that starts has timed one chunk, while everything else starts, too: of four equal ones, measured on two cores,
one counted as four times as fast as another, got all the requests, and the others had no chance to measure again. Nor
do the chunks of short prompts say how long a long one takes: most of their time is a step's own. And the chunks of one
prompt are slowed by the same stall: of four equal replicas one counted as half as fast for it, and lost its sessions.
So a replica's own measurements count as they are many, large, recent, and from several reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from serve.cost.model import weighted_median

EXPECTED = 2e10  # FLOPs a second, assumed of all replicas until one has measured its own
SHARED_CHUNKS = 16  # a replica's own measurements count for half when they are so many, of the largest size
HALF_LIFE_S = 60.0  # after which measurements count for half as many
ALIKE = 1.5  # replicas whose speeds differ by less are equal machines, measured beside other work
REPORTS = 8  # that told something new, the latest ones; fewer count for less


@dataclass(frozen=True)
class Speed:
    """What a replica has measured last, by its reports that told something new."""

    told: tuple[float, ...]  # FLOPs a second by each of the latest REPORTS reports
    chunks: int  # that the latest one is the median of
    since: float  # when it came, seconds
    chunk_flops: float = 1.0  # of one of these chunks, their mean

    def again(self, flops: float, chunks: int, now: float, chunk_flops: float = 1.0) -> Speed:
        """The same after a report of FLOPs a second, which may tell nothing new."""
        if not chunks or (self.told[-1:] == (flops,) and chunks == self.chunks):
            return self
        return Speed((*self.told, flops)[-REPORTS:], chunks, now, chunk_flops)

    @property
    def flops(self) -> float:
        """FLOPs a second; 0 until measured."""
        return median(self.told) if self.told else 0.0

    @property
    def evidence(self) -> float:
        """The FLOPs that were measured, as far as several reports agree."""
        return self.chunks * self.chunk_flops * len(self.told) / REPORTS


UNMEASURED = Speed((), 0, 0.0)


def expected_flops(measured: Mapping[str, Speed], now: float) -> dict[str, float]:
    """FLOPs a second to expect of each replica."""
    largest = max((each.chunk_flops for each in measured.values()), default=0.0) or 1.0
    weights = {
        name: each.evidence / largest * 0.5 ** min(64.0, (now - each.since) / HALF_LIFE_S)
        for name, each in measured.items()
    }
    # Rounded: of two replicas, the one that reported last would have the median otherwise.
    known = [(each.flops, round(weights[name], 2)) for name, each in measured.items() if each.flops]
    common = weighted_median(known) if known else EXPECTED
    factors = {
        name: ((each.flops or common) / common) ** (weights[name] / (weights[name] + SHARED_CHUNKS))
        for name, each in measured.items()
    }
    return {name: common if 1 / ALIKE < factor < ALIKE else common * factor for name, factor in factors.items()}
