"""The values stay within their limit in bytes, and the latest stay longest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.limits.recent import ENTRY_BYTES, Recent

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
