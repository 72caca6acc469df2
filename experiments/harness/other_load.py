"""How much of the cores' time other processes took while something was measured.

Processes that the measuring one started count as its own, if it waits for their end or they run still.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import psutil

LIMIT = 0.05  # from which on a comparison says that it was disturbed


def start_watch() -> Callable[[], float]:
    """A function that returns the share of all cores' time that other processes have taken since this call."""
    process, cores = psutil.Process(), psutil.cpu_count() or 1
    begin, all_before, own_before = time.perf_counter(), _busy_s(), _own_s(process)

    def share() -> float:
        taken = (_busy_s() - all_before) - (_own_s(process) - own_before)
        return round(max(0.0, taken / cores / max(time.perf_counter() - begin, 1e-9)), 3)

    return share


def warning(share: float) -> str:
    """A line for the end of a table; empty if the machine was quiet."""
    if share < LIMIT:
        return ""
    return f"\nother processes took {share:.0%} of the cores: threads that wait for each other are slowed most"


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))


def _own_s(process: psutil.Process) -> float:
    own = 0.0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = each.cpu_times()  # children_*: of processes that it has waited for
            own += times.user + times.system + times.children_user + times.children_system
    return own
