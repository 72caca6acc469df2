"""The soaked server's lives: it is started, ended by SIGTERM or kill -9, restarted on the same store, and watched.

Sessions reach it through `Stage.on`, which waits for the next life if the server was ended during a request. All of
this runs on one event loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import httpx
import psutil

from cache.disk import DiskTier
from experiments.harness.client import samples_of
from experiments.harness.server import running_server

T = TypeVar("T")

# Seconds: an idle connection is dropped before the 5 s after which uvicorn closes it, perhaps under a request.
KEEP_SECONDS = 3
PATIENCE_SECONDS = 180  # an answer that takes longer is a failure
QUIET_SECONDS = 60  # after which a server without clients must be idle
EARLY = 0.4  # of the run: the share in which the server is ended and started again

End = Literal["kill -9", "SIGTERM", "by itself"]


class Broken(Exception):
    """A failed answer: status 5xx, a stream that ended early, or an error event."""


@dataclass(frozen=True)
class Sample:
    """The server at one moment: its process, and its metrics as `figures` selects them."""

    at_s: float  # since the run's start
    life: int
    rss: int  # bytes of resident memory
    mapped: int  # of these, pages of mapped files: the stores' pages, and code
    descriptors: int
    threads: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Life:
    """One ended process of the server: how it was ended, its exit status, its log."""

    number: int
    started_s: float  # when it was ready, since the run's start
    ended_s: float
    end: End
    status: int
    log: Path


@dataclass(eq=False)
class Up:
    """A running server as sessions see it; `ending` is set before its process is ended."""

    number: int
    client: httpx.AsyncClient
    process: psutil.Process
    started_s: float
    ending: bool = False


@dataclass(eq=False)
class Stage:
    """The current server, where sessions find it. Only `live` changes it."""

    begun: float = field(default_factory=time.monotonic)  # when the first server was ready
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    up: Up | None = None
    interrupted: int = 0  # requests that were sent again because their server was ended

    def passed(self) -> float:
        """Seconds since the run's start."""
        return time.monotonic() - self.begun

    async def on(self, work: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        """The result of `work`, which is repeated on the next server if this one was ended meanwhile.

        Raises Broken, httpx.HTTPError and TimeoutError if it was not.
        """
        while True:
            await self.ready.wait()
            up = self.up
            assert up is not None
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    return await work(up.client)
            except (Broken, httpx.HTTPError, TimeoutError):
                if not up.ending:
                    raise
                self.interrupted += 1


def figures(samples: Mapping[str, float]) -> dict[str, float]:
    """A soak's figures from a metrics page: counts by tier in pages, hits in tokens."""

    def total(name: str, *holding: str) -> float:
        return sum(v for k, v in samples.items() if k.partition("{")[0] == name and all(h in k for h in holding))

    tiers = [key.split('"')[1] for key in samples if key.startswith("tokenzero_tier_pages{")]
    below = {tier: total("tokenzero_restored_tokens_total", f'tier="{tier}"') for tier in tiers}
    found = {
        "answers": total("tokenzero_http_responses_total"),
        "server_errors": total("tokenzero_http_responses_total", 'status="5'),
        "failed_requests": total("tokenzero_failed_requests_total"),
        "preemptions": total("tokenzero_preemptions_total"),
        "running": total("tokenzero_num_requests_running"),
        "waiting": total("tokenzero_num_requests_waiting"),
        "pages_in_use": total("tokenzero_pages", 'state="in_use"'),
        "unsaved_pages": total("tokenzero_write_dropped_pages_total"),
        "prompt_tokens": total("tokenzero_prompt_tokens_total"),
        "hits_device": total("tokenzero_reused_tokens_total") - sum(below.values()),
        "evicted_device": total("tokenzero_pages_evicted_total"),
    }
    for tier in tiers:
        found[f"hits_{tier}"] = below[tier]
        for name in ("evicted", "errors", "corrupt", "dropped"):
            found[f"{name}_{tier}"] = total(f"tokenzero_tier_{name}_total", f'tier="{tier}"')
    audits = {k.removeprefix("tokenzero_"): v for k, v in samples.items() if k.startswith("tokenzero_audit")}
    return found | {name: value for name, value in audits.items() if not name.endswith("_created")}


def ends(seconds: float, rng: random.Random) -> list[tuple[float, End]]:
    """When and how the server is ended: about once a minute in the first part of the run, and at its end.

    So the last life is long enough for a plateau. `kill -9` and SIGTERM alternate.
    """
    count = max(1, round(EARLY * seconds / 60))
    places = sorted((n + rng.uniform(0.6, 1)) * EARLY * seconds / count for n in range(count))
    early: list[tuple[float, End]] = [(at, ("kill -9", "SIGTERM")[n % 2]) for n, at in enumerate(places)]
    return [*early, (seconds, "SIGTERM")]


async def live(
    stage: Stage,
    model: str,
    flags: Sequence[str],
    folder: Path,
    plan: Sequence[tuple[float, End]],
    last_words: Callable[[], Awaitable[None]],
) -> list[Life]:
    """Start the server in `folder`, end it at its times, start it again; awaits `last_words` before the last end.

    A server that ends by itself is restarted as well. Raises RuntimeError if one does not start.
    """
    lives: list[Life] = []
    ending = list(plan)
    while ending:
        number = len(lives)
        log = folder / f"server-{number}.log"
        with ExitStack() as stack:
            server = await asyncio.to_thread(stack.enter_context, running_server(model, *flags, log=log))
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_SECONDS)
            client = httpx.AsyncClient(base_url=server.url, limits=limits, timeout=None)
            if not lives:
                stage.begun = time.monotonic()
            up = stage.up = Up(number, client, psutil.Process(server.process.pid), stage.passed())
            stage.ready.set()
            at, end = ending[0]
            while stage.passed() < at and server.process.poll() is None:
                await asyncio.sleep(0.1)
            if server.process.poll() is None and len(ending) == 1:
                await last_words()
            stage.ready.clear()
            up.ending = True
            if server.process.poll() is not None:
                end = "by itself"
                await asyncio.sleep(1)
            elif end == "kill -9":
                server.process.kill()
            ended = stage.passed()
            await asyncio.to_thread(stack.close)
            await client.aclose()
        if stage.passed() >= at or end != "by itself":
            ending.pop(0)
        lives.append(Life(number, up.started_s, ended, end, server.process.returncode, log))
    return lives


async def sample(stage: Stage, up: Up) -> Sample | None:
    """The server now, after a read of its metrics and request reports; None if it is being ended."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            metrics = await up.client.get("/metrics")
            reports = await up.client.get("/v1/requests")
            if metrics.status_code != 200 or reports.status_code != 200:
                raise Broken(f"/metrics answers {metrics.status_code}, /v1/requests {reports.status_code}")
        with up.process.oneshot():
            memory, threads = up.process.memory_info(), up.process.num_threads()
        descriptors = up.process.num_fds()
    except (Broken, httpx.HTTPError, TimeoutError, psutil.Error):
        if up.ending or not up.process.is_running() or up.process.status() == psutil.STATUS_ZOMBIE:
            return None
        raise
    return Sample(
        stage.passed(), up.number, memory.rss, memory.shared, descriptors, threads, figures(samples_of(metrics.text))
    )


async def until_quiet(stage: Stage) -> Sample | None:
    """A sample of the server as soon as it is idle, or after QUIET_SECONDS."""
    deadline, up = stage.passed() + QUIET_SECONDS, stage.up
    assert up is not None
    while True:
        found = await sample(stage, up)
        if found is None or is_idle(found) or stage.passed() > deadline:
            return found
        await asyncio.sleep(0.1)


def is_idle(found: Sample) -> bool:
    """Whether nothing runs or waits and no page is held."""
    return not any(found.figures[name] for name in ("running", "waiting", "pages_in_use"))


def lose(store: Path, budget_bytes: int, share: float, rng: random.Random) -> int:
    """Delete a random share of a store's pages, as another process that shares it may; returns how many."""
    tier = DiskTier(store, budget_bytes)
    try:
        keys = [entry.key for entry in tier.entries()]
        lost = rng.sample(keys, round(share * len(keys)))
        tier.delete(lost)
        return len(lost)
    finally:
        with suppress(Exception):
            tier.close()
