"""What a replica publishes: increments add up to what it holds, and a snapshot stands for those before it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.router import summary
from serve.router.summary import Snapshot, increments


def keys(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def applied(held: set[int], published) -> set[int]:
    if isinstance(published, Snapshot):
        return set(published.held.tolist())
    return (held | set(published.added.tolist())) - set(published.removed.tolist())


PAGES = st.sets(st.integers(0, 20))


@settings(max_examples=60, deadline=None)
@given(st.lists(PAGES, max_size=12), st.integers(1, 5), st.integers(0, 12))
def test_increments_and_snapshots_add_up_to_what_is_held(states, most, joins):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "MOST_PAGES", most)
        truth, known, joined, sequence = set(), set(), None, 0
        for number, held in enumerate(states):
            if number == joins:  # a router that joins here
                joined = applied(set(), Snapshot(sequence, keys(*truth)))
            for each in increments(sequence, keys(*held - truth), keys(*truth - held)):
                assert each.sequence == sequence + 1
                assert 0 < len(each.added) + len(each.removed) <= most
                known, sequence = applied(known, each), each.sequence
                joined = None if joined is None else applied(joined, each)
            truth = held
            assert known == truth
        assert joined in (None, truth)


def test_nothing_is_published_where_nothing_has_changed():
    assert increments(3, keys(), keys()) == []


def test_an_increment_is_bounded_and_the_rest_comes_next(monkeypatch):
    monkeypatch.setattr(summary, "MOST_PAGES", 4)
    first, second, third = increments(0, keys(*range(10)), keys())
    assert first.added.tolist() == [0, 1, 2, 3]
    assert second.added.tolist() == [4, 5, 6, 7]
    assert [third.sequence, *third.added.tolist()] == [3, 8, 9]


def test_what_is_lost_comes_first(monkeypatch):
    monkeypatch.setattr(summary, "MOST_PAGES", 4)
    first, second = increments(7, keys(1, 2, 3), keys(4, 5))
    assert [first.sequence, first.removed.tolist(), first.added.tolist()] == [8, [4, 5], [1, 2]]
    assert [second.sequence, second.removed.tolist(), second.added.tolist()] == [9, [], [3]]
