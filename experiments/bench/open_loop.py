"""Sessions that arrive at a Messages endpoint at fixed times, and the timing of its answers' events.

One thread and one event loop run all sessions; how late that loop runs is measured as well.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import httpx
import numpy as np

from experiments.harness.client import prompt_counts

REFUSALS = (429, 529)
LAG_SECONDS = 0.01  # how often the client measures how late it is


@dataclass(frozen=True)
class Plan:
    """One session: its arrival, its requests, and its pause after each answer."""

    arrival_s: float
    headers: dict[str, str]
    bodies: tuple[bytes, ...]
    pauses_s: tuple[float, ...]


@dataclass(frozen=True)
class Asked:
    """One request and its outcome; a completed one without text has no TTFT."""

    outcome: Literal["completed", "refused", "failed", "timed out"]
    error: str = ""
    sent_s: float = 0.0  # since the rate's start
    ttft_ms: float | None = None
    gaps_ms: tuple[float, ...] = ()  # between two events with text
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


async def ask(client: httpx.AsyncClient, body: bytes, headers: dict[str, str], timeout: float) -> Asked:
    """Send one request and time its events; every failure is an outcome. Takes `timeout` s at most."""
    sent, times, usage, ended = time.perf_counter(), list[float](), dict[str, Any](), False

    async def content() -> AsyncIterator[bytes]:
        nonlocal sent
        yield body
        sent = time.perf_counter()

    sizes = {"content-length": str(len(body)), "content-type": "application/json"}
    try:
        async with (
            asyncio.timeout(timeout),
            client.stream("POST", "/v1/messages", content=content(), headers=headers | sizes) as response,
        ):
            if response.status_code != 200:
                error = f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:300]}"
                return Asked("refused" if response.status_code in REFUSALS else "failed", error)
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                at, event = time.perf_counter(), json.loads(line[6:])
                match event["type"]:
                    case "content_block_delta":
                        times.append(at)
                    case "message_start":
                        usage = event["message"]["usage"]
                    case "message_delta":
                        usage |= event["usage"]
                    case "message_stop":
                        ended = True
                    case "error":
                        return Asked("failed", str(event["error"])[:300])
    except TimeoutError:
        return Asked("timed out", f"no whole answer within {timeout:g} s")
    except (httpx.HTTPError, LookupError, ValueError, TypeError) as error:
        return Asked("failed", f"{type(error).__name__}: {error}")
    if not ended:
        return Asked("failed", "the stream ended before its message_stop")
    prompt, cached = prompt_counts(usage)
    return Asked(
        "completed",
        ttft_ms=1e3 * (times[0] - sent) if times else None,
        gaps_ms=tuple((1e3 * np.diff(times)).tolist()),
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=usage.get("output_tokens") or 0,
    )


async def offer(
    client: httpx.AsyncClient, plans: Sequence[Plan], end: float, timeout: float, tick: Callable[[float], object]
) -> tuple[list[Asked], list[float]]:
    """Run sessions that arrive at their times for `end` seconds: each request's outcome, and the client's lags in s.

    After `end` no request is sent; those under way are awaited, each `timeout` seconds at most. `tick` gets the seconds
    that have passed.
    """
    asked, lags = list[Asked](), list[float]()
    start = time.perf_counter()

    def passed() -> float:
        return time.perf_counter() - start

    async def attend(plan: Plan) -> None:
        await asyncio.sleep(plan.arrival_s - passed())
        for body, pause in zip(plan.bodies, plan.pauses_s, strict=True):
            if (sent := passed()) >= end:
                return
            asked.append(replace(await ask(client, body, plan.headers, timeout), sent_s=sent))
            if asked[-1].outcome != "completed":
                return
            await asyncio.sleep(pause)

    async def watch() -> None:
        while True:
            before = passed()
            await asyncio.sleep(LAG_SECONDS)
            lags.append(passed() - before - LAG_SECONDS)
            tick(passed())

    watching = asyncio.create_task(watch())
    await asyncio.gather(*map(attend, plans))
    await asyncio.sleep(max(0.0, end - passed()))
    watching.cancel()
    return asked, lags
