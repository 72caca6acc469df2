"""The time of each phase of a request, and the `Server-Timing` header that lists it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Phases:
    """The duration of each phase of one request, in the order in which they ended; no two phases overlap."""

    received: float = field(default_factory=time.perf_counter)  # when the request's last byte arrived
    seconds: dict[str, float] = field(default_factory=dict)  # by phase; grows as the request goes on

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Record how long the block takes; a block that raises is not recorded."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start

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
