"""The time of each phase of a request, and the `Server-Timing` header that lists it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

LATEST = 32  # requests


class Overhead:
    """What requests take besides their text and the engine, of late. One thread uses it."""

    def __init__(self) -> None:
        self.latest: deque[float] = deque(maxlen=LATEST)

    @property
    def seconds(self) -> float:
        """The median of the latest requests."""
        return median(self.latest) if self.latest else 0.0

    def observe(self, seconds: float) -> None:
        """One more request."""
        self.latest.append(seconds)


@dataclass(frozen=True)
class Phases:
    """The duration of each phase of one request, in the order in which they ended; no two phases overlap.

    A phase that comes again goes on.
    """

    received: float = field(default_factory=time.perf_counter)  # when the request's last byte arrived
    seconds: dict[str, float] = field(default_factory=dict)  # by phase; grows as the request goes on
    submitted: list[float] = field(default_factory=list)  # when the engine got it, seconds since it was received

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Record how long the block takes; a block that raises is not recorded."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def elapsed(self) -> float:
        """Seconds since the request's last byte arrived."""
        return time.perf_counter() - self.received

    def header(self) -> str:
        """The value of a `Server-Timing` header: the phases so far, and `total` until now."""
        return server_timing(self.seconds | {"total": self.elapsed()})

    def ms(self) -> dict[str, float]:
        """The phases so far, in milliseconds."""
        return {phase: round(1e3 * seconds, 3) for phase, seconds in self.seconds.items()}


def server_timing(seconds: Mapping[str, float]) -> str:
    """Durations in seconds by name -> the header's value in milliseconds, see https://www.w3.org/TR/server-timing/."""
    return ", ".join(f"{name};dur={1e3 * taken:.3f}" for name, taken in seconds.items())
