"""How long the event loop stands still: a task on it that wants to run every few milliseconds, and when it did."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

PERIOD_SECONDS = 0.01


async def beat(lag: Callable[[float], object]) -> None:
    """Report, for ever, the seconds by which each beat came late; a loop that stands still longer misses beats."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + PERIOD_SECONDS
        await asyncio.sleep(PERIOD_SECONDS)
        lag(max(0.0, loop.time() - due))


@asynccontextmanager
async def beating(lag: Callable[[float], object]) -> AsyncIterator[None]:
    """Beat on the running loop until the block ends."""
    task = asyncio.create_task(beat(lag))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
