"""Engines and tiers in which nothing happens by itself: look-ups, reads, writes and the clock move when a test says so.

So anything that may come between two of them can be made to, in the same way each time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import jax.numpy as jnp
import pytest

from cache.tiers import Tiers
from cache.worker import Worker
from model.kv import empty_pool
from model.sharding import make_mesh, pool_sharding
from serve.engine.page_copies import make_page_copies
from serve.engine.programs import COPIES_RANK, user_programs
from serve.engine.steps import make_steps
from tests.helpers.cold_reference import CONFIG, DEVICES, PAGE, SETTINGS, parameters


@cache
def compiled():
    """The programs, steps and page copies of every engine here: all have one shape."""
    mesh = make_mesh(CONFIG, DEVICES)
    pool = empty_pool(CONFIG, SETTINGS.num_pages, PAGE, jnp.float32, pool_sharding(CONFIG, mesh))
    programs = user_programs(mesh)
    steps = make_steps(programs, parameters(DEVICES), pool, CONFIG, SETTINGS)
    copies = make_page_copies(programs, pool, COPIES_RANK)
    programs.wait()
    return programs, steps, copies


class Clock:
    """Stands in for the module `time`: what is stamped is stamped by the case's clock, which may jump."""

    def __init__(self):
        self.now = 1_700_000_000 * 10**9  # nanoseconds

    def time_ns(self):
        self.now += 1000
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


@contextmanager
def by_hand() -> Iterator[Clock]:
    """Engines that are compiled once, stores whose trees nobody walks, and the clock of their stamps."""
    programs, steps, copies = compiled()
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve.engine.core.user_programs", lambda mesh: programs)
        patch.setattr("serve.engine.core.make_steps", lambda *_: steps)
        patch.setattr("serve.engine.core.warm_up", lambda steps, params, pool, limit: (pool, (0, 1), 1.0))
        patch.setattr("serve.engine.core.make_page_copies", lambda *_: copies)
        patch.setattr("serve.engine.restore.PATIENCE_SECONDS", 0.0)
        for module in ("tiers", "disk"):
            patch.setattr(f"cache.{module}.time", clock)
        patch.setattr("cache.lmdb_env.check_tree", lambda path, seconds: "")
        yield clock
    compiled.cache_clear()
    parameters.cache_clear()


class Later(Worker):
    """Runs its jobs when `turn` is called, on the thread that calls it."""

    def _run(self):
        pass

    def turn(self) -> bool:
        """Run the job that has waited longest; False if there is none."""
        if not self.queued:
            return False
        future, call = self.queued.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
        return True


class Shared:
    """A tier that several engines use, and that outlives each of them."""

    def __init__(self, tier):
        self.tier = tier

    def __getattr__(self, name):
        return getattr(self.tier, name)

    def close(self):
        self.tier.sync()


def tiers_over(lower, host_bytes: int, queue_bytes: int) -> Tiers:
    """Host memory, if any, over a tier, if any; nothing is looked up, read or written unless it is asked for."""
    tiers = Tiers(None, 0, host_bytes or 1, flush_seconds=1e6, queue_bytes=queue_bytes)
    used = (*(tiers.pages.tiers if host_bytes or lower is None else ()), *([] if lower is None else [Shared(lower)]))
    tiers.pages.tiers = tiers.writer.tiers = used
    for worker in (tiers.searcher, tiers.lister, tiers.pages.reader):
        worker.stop()
    tiers.searcher, tiers.pages.reader = Later("look-up"), Later("restore")
    tiers.lister = tiers.searcher
    tiers.writer._in_a_hurry = tiers.writer._has_work = lambda: (
        tiers.writer.asked > tiers.writer.done or tiers.writer.closing
    )
    return tiers
