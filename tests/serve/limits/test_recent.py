"""The values stay within their limit in bytes, and the latest stay longest."""

from __future__ import annotations

import asyncio
from contextvars import copy_context

from hypothesis import given
from hypothesis import strategies as st
from starlette.concurrency import run_in_threadpool

from serve.limits.recent import ENTRY_BYTES, SCOPE, Recent

KEYS = st.integers(0, 5)
STEPS = st.lists(st.tuples(st.sampled_from(["put", "get", "change"]), KEYS, st.integers(0, 900)), max_size=60)


@given(steps=STEPS, most=st.sampled_from([None, 2]))
def test_the_bytes_are_those_of_what_is_held_and_never_too_many(
    steps: list[tuple[str, int, int]], most: int | None
) -> None:
    recent: Recent[int, bytes] = Recent(1500, len, most)
    for step, key, size in steps:
        if step == "put":
            recent.put(key, bytes(size))
        elif step == "get":
            recent.get(key)
        else:
            recent.change(key, lambda old, size=size: None if old is None else bytes(size))
        held = recent.values()
        assert recent.bytes == sum(ENTRY_BYTES + len(value) for value in held) <= 1500
        assert len(held) == len(recent) <= (most or 1500)
        assert sum(recent.peek(key) is not None for key in range(6)) == len(recent)


def test_what_was_used_longest_ago_goes_first() -> None:
    recent: Recent[str, bytes] = Recent(3 * (ENTRY_BYTES + 10), len)
    for key in "abc":
        recent.put(key, bytes(10))
    recent.get("a")
    recent.peek("b")
    recent.change("b", lambda old: old)
    recent.put("d", bytes(10))
    assert [key for key in "abcd" if recent.peek(key) is not None] == ["a", "c", "d"]


def test_what_is_larger_than_everything_is_not_kept_and_costs_nothing_else() -> None:
    recent: Recent[str, bytes] = Recent(1000, len)
    recent.put("a", bytes(10))
    recent.put("b", bytes(2000))
    assert (recent.get("a"), recent.get("b"), len(recent)) == (bytes(10), None, 1)


def test_scoped_values_are_found_by_whom_they_were_made_for_and_share_one_limit() -> None:
    made: Recent[str, str] = Recent(10 * ENTRY_BYTES, len, scoped=True)

    def work_for(name: str, value: str) -> tuple[str | None, str | None]:
        SCOPE.set(name)
        before = made.get("text")
        made.put("text", value)
        made.change("text", lambda known: known and known.upper())
        return before, made.peek("text")

    assert [copy_context().run(work_for, name, name * 2) for name in ("a", "b", "a")] == [
        (None, "AA"),
        (None, "BB"),
        ("AA", "AA"),
    ]
    assert made.get("text") is None
    assert (len(made), made.bytes) == (2, 2 * (ENTRY_BYTES + 2))


def test_the_threads_that_work_for_a_task_have_its_scope() -> None:
    async def task(name: str) -> str:
        SCOPE.set(name)
        return await run_in_threadpool(SCOPE.get)

    async def both() -> list[str]:
        return list(await asyncio.gather(task("a"), task("b")))

    assert asyncio.run(both()) == ["a", "b"]
    assert SCOPE.get() == ""
