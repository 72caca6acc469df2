"""Memory that was freed goes back to the system while the engine rests: glibc keeps it otherwise, 130 MB in a soak."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

PERIOD_SECONDS = 20.0


def malloc_trim() -> None:
    """Hand free memory back; nothing happens where the C library has no such function. Takes some 10 ms."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


async def trimming(done: Callable[[], int], idle: Callable[[], bool], period: float = PERIOD_SECONDS) -> None:
    """For ever: trim, in a thread, whenever the engine is idle and has done something since."""
    seen = -1
    while True:
        await asyncio.sleep(period)
        if idle() and done() != seen:
            seen = done()
            await asyncio.to_thread(malloc_trim)
