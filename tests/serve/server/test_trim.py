"""Freed memory is returned while nothing runs, and only once after work."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from serve.server import trim


def test_it_trims_when_idle_and_once_for_each_stretch_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    work, idle = [1], [False]
    looks = iter(range(100))

    def is_idle() -> bool:
        look = next(looks)
        idle[0] = look >= 3
        if look == 6:
            work[0] = 2
        if look == 9:
            raise KeyboardInterrupt
        return idle[0]

    monkeypatch.setattr(trim, "malloc_trim", lambda: trimmed.append(work[0]))
    with suppress(KeyboardInterrupt):
        asyncio.run(trim.trim_while_idle(lambda: work[0], is_idle, period=0))
    assert trimmed == [1, 2]


def test_trimming_is_harmless() -> None:
    trim.malloc_trim()
