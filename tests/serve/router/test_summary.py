"""What a replica publishes: increments add up to what it holds, and a snapshot stands for those before it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.router import summary
from serve.router.summary import PageLog, Snapshot


def keys(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def applied(held: set[int], published) -> set[int]:
    if isinstance(published, Snapshot):
        return set(published.held.tolist())
    return (held | set(published.added.tolist())) - set(published.removed.tolist())


STEP = st.tuples(st.sampled_from(["add", "remove", "take", "snapshot"]), st.lists(st.integers(0, 20), max_size=8))


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=40))
def test_increments_and_snapshots_add_up_to_what_is_held(steps):
    log, truth, known, joined = PageLog(), set(), set(), None
    for what, numbers in steps:
        if what == "add":
            log.added(keys(*numbers))
            truth |= set(numbers)
        elif what == "remove":
            log.removed(keys(*numbers))
            truth -= set(numbers)
        elif what == "take" and (increment := log.take()):
            known = applied(known, increment)
            joined = None if joined is None else applied(joined, increment)
        elif what == "snapshot":
            snapshot = log.snapshot()
            assert snapshot.sequence == log.sequence
            assert set(snapshot.held.tolist()) == known  # as of the last increment
            joined = set(snapshot.held.tolist())  # a router that joins here
    while increment := log.take():
        known = applied(known, increment)
        joined = None if joined is None else applied(joined, increment)
    assert known == truth
    assert joined in (None, truth)


def test_a_page_that_comes_and_goes_in_between_is_not_published():
    log = PageLog()
    log.added(keys(1, 2))
    log.removed(keys(1, 2))
    assert log.take() is None


def test_an_increment_is_bounded_and_the_rest_comes_next(monkeypatch):
    monkeypatch.setattr(summary, "MOST_PAGES", 4)
    log = PageLog()
    log.added(keys(*range(10)))
    first, second, third = log.take(), log.take(), log.take()
    assert first.added.tolist() == [0, 1, 2, 3]
    assert second.added.tolist() == [4, 5, 6, 7]
    assert [third.sequence, *third.added.tolist()] == [3, 8, 9]


def test_a_cleared_cache_loses_all():
    log = PageLog()
    log.added(keys(1, 2))
    log.take()
    log.cleared()
    assert log.take().removed.tolist() == [1, 2]
