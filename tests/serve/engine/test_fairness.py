"""Owners share the engine: a hundred requests of one delay another's single one by no more than one would."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.engine import Engine
from serve.engine.fairness import Shares, gives_place, make_place, may_queue, next_owners, owner_of
from serve.engine.inbox import Overloaded
from serve.engine.request import Finished
from serve.engine.scheduler import ScheduledSequence
from serve.engine.sequence import DECODING, PREFILLING, Sequence
from tests.helpers.sequences import running, waiting
from tests.helpers.tiny_engine import SMALL, assert_same_or_tied, outcome, prompt, reference, submit, tick


def of(owner: str, sequence: Sequence) -> Sequence:
    sequence.request = replace(sequence.request, owner=owner)
    return sequence


def some(owners: str, make: Any = waiting, first: int = 1) -> list[Sequence]:
    """A request for each letter, of the owner with this name."""
    return [of(owner, make(number=number)) for number, owner in enumerate(owners, first)]


def decoding(number: int) -> Sequence:
    return running(DECODING, number)


def names(sequences: Many[Sequence]) -> str:
    return "".join(map(owner_of, sequences))


@pytest.mark.parametrize(
    ("queue", "batch", "first"),
    [
        ("aaaab", "aaa", "b"),
        ("aaaab", "", "aaaa"),
        ("aabb", "ab", "aa"),
        ("bca", "ab", "c"),
        ("aaa", "aaaa", "aaa"),
    ],
)
def test_the_owner_with_the_fewest_places_is_next(queue: str, batch: str, first: str) -> None:
    assert names(list(next_owners(deque(some(queue)), some(batch, decoding)))) == first


@pytest.mark.parametrize(
    ("batch", "owner", "number"),
    [
        ("aaaa", "b", 4),
        ("abab", "c", 3),
        ("ab", "c", None),
        ("aab", "c", 2),
        ("aaab", "b", 3),
        ("aab", "b", None),
        ("", "b", None),
    ],
)
def test_the_youngest_of_who_has_two_more_makes_place(batch: str, owner: str, number: int | None) -> None:
    found = gives_place(some(batch, decoding), owner)
    assert (found and found.number) == number


@given(batch=st.text("abc", max_size=9), queue=st.text("abc", min_size=1, max_size=9), places=st.integers(1, 9))
def test_places_are_made_until_each_has_its_share_and_never_for_ever(batch: str, queue: str, places: int) -> None:
    running_now, line = some(batch[:places], decoding), deque(some(queue, first=100))

    def preempt(sequence: Sequence) -> None:
        running_now.remove(sequence)
        line.appendleft(sequence)

    preempted = 0
    for _ in range(100):
        before = len(running_now)
        if not make_place(running_now, line, lambda: len(running_now) >= places, lambda: False, preempt):
            break
        preempted += before - len(running_now)
        chosen = next(iter(next_owners(line, running_now)))
        line.remove(chosen)
        running_now.append(chosen)
        if not line:
            break
    else:
        pytest.fail("owners take places from each other for ever")
    assert preempted <= places


def test_owners_whose_prompts_are_computed_take_turns() -> None:
    shares, batch = Shares(), [of("a", running(PREFILLING, n)) for n in range(1, 4)] + [of("b", running(PREFILLING, 9))]
    turns = ""
    for _ in range(6):
        sequence = shares.next_prefill(batch, 100.0, lambda start, stop: 1.0)
        assert sequence
        shares.noted([ScheduledSequence(sequence, 1)], batch)
        turns += owner_of(sequence)
    assert turns == "ababab"


def test_each_owner_has_a_queue_of_its_own() -> None:
    assert [may_queue(some("aaa"), owner, 3) for owner in "ab"] == [False, True]
    assert [may_queue(some("aab"), owner, 3) for owner in "abc"] == [True, True, True]
    assert [may_queue(some("aabb"), owner, 2) for owner in "abc"] == [False, False, True]


@pytest.fixture
def engine(model: Any) -> Engine:
    """An engine whose loop is turned by hand."""
    return Engine(model[1], model[0], replace(SMALL, max_queue=6), b"fingerprint")


def test_a_preempted_request_of_a_busy_owner_has_the_same_answer(engine: Engine, model: Any) -> None:
    prompts = [prompt(seed, 40) for seed in range(6)]
    busy = [submit(engine, tokens, 40, owner="a")[0] for tokens in prompts]
    for _ in range(20):
        tick(engine)
    assert (len(engine.running), len(engine.waiting)) == (4, 2)
    late, _ = submit(engine, prompt(99, 40), 4, owner="b")
    for _ in range(12):
        tick(engine)
    events = list(late.queue)
    assert isinstance(events[-1], Finished), "its answer is whole while all others go on"
    assert engine.counters.preemptions == 1
    while tick(engine):
        pass
    known: dict[Any, Any] = {}
    flips: list[Any] = []
    for tokens, events_of in zip(prompts, busy, strict=True):
        answer, _, last = outcome(events_of)
        assert isinstance(last, Finished)
        assert_same_or_tied(model, tokens, answer, reference(model, tokens, len(answer), known), flips)
    engine.core.memory.prefix_cache.check()
    assert not engine.core.memory.prefix_cache.live


def test_a_full_queue_of_one_owner_refuses_its_own_requests_only(engine: Engine) -> None:
    asked = [submit(engine, prompt(seed, 20), 2, owner="a")[0] for seed in range(6)]
    with pytest.raises(Overloaded, match="6 requests are waiting already"):
        submit(engine, prompt(7, 20), 2, owner="a")
    asked.append(submit(engine, prompt(8, 20), 2, owner="b")[0])
    while tick(engine):
        pass
    assert all(isinstance(outcome(events)[2], Finished) for events in asked)
