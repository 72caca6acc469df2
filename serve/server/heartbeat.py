"""The lag of the event loop, measured by a task on it that is due every few milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

PERIOD_SECONDS = 0.01


async def beat(lag: Callable[[float], object]) -> None:
    """Call `lag` forever with the seconds by which each beat was late; a blocked loop skips the beats in between."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + PERIOD_SECONDS
        await asyncio.sleep(PERIOD_SECONDS)
        lag(max(0.0, loop.time() - due))


@asynccontextmanager
async def heartbeat(lag: Callable[[float], object]) -> AsyncIterator[None]:
    """Run `beat` on the running loop until the block ends."""
    task = asyncio.create_task(beat(lag))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
