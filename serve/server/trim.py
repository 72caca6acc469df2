"""Return freed memory to the system while the engine is idle; glibc would keep it (130 MB in a soak test)."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

PERIOD_SECONDS = 20.0


def malloc_trim() -> None:
    """Return free memory to the system, in about 10 ms; does nothing if the C library has no such function."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


async def trim_while_idle(steps: Callable[[], int], idle: Callable[[], bool], period: float = PERIOD_SECONDS) -> None:
    """Each `period` seconds, forever: trim in a thread if the engine is idle and has run steps since the last time."""
    trimmed_at = -1
    while True:
        await asyncio.sleep(period)
        if idle() and steps() != trimmed_at:
            trimmed_at = steps()
            await asyncio.to_thread(malloc_trim)
