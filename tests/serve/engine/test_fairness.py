"""Owners share the engine: a hundred requests of one delay another's single one by no more than one would."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.engine import Engine
from serve.engine.fairness import Queue, Shares, gives_place, gives_way, make_place, owner_of
from serve.engine.inbox import Overloaded
from serve.engine.request import Finished
from serve.engine.scheduler import ScheduledSequence
from serve.engine.sequence import DECODING, PREFILLING, Sequence
from tests.helpers.sequences import running, waiting
from tests.helpers.tiny_engine import CRAMPED, SMALL, assert_same_or_tied, outcome, prompt, reference, submit, tick


def of(owner: str, sequence: Sequence) -> Sequence:
    sequence.request = replace(sequence.request, owner=owner)
    return sequence


def some(owners: str, make: Any = waiting, first: int = 1) -> list[Sequence]:
    """A request for each letter, of the owner with this name."""
    return [of(owner, make(number=number)) for number, owner in enumerate(owners, first)]


def decoding(number: int) -> Sequence:
    return running(DECODING, number)


def queue_of(sequences: list[Sequence]) -> Queue:
    queue = Queue()
    queue.extend(sequences)
    return queue


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
        ("", "aaaa", ""),
    ],
)
def test_the_owner_with_the_fewest_places_is_next(queue: str, batch: str, first: str) -> None:
    assert names(list(queue_of(some(queue)).next_line(some(batch, decoding)))) == first


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


def admitted(queue: Queue, batch: list[Sequence]) -> Sequence:
    """Take the next request out of the queue."""
    chosen = next(iter(queue.next_line(batch)))
    queue.remove(chosen)
    queue.turns.take(owner_of(chosen))
    return chosen


def test_with_more_owners_than_places_each_has_its_turn_however_many_came_before() -> None:
    queue = queue_of(some("a" * 100))
    order = owner_of(admitted(queue, []))
    queue.extend(some("b" * 100 + "c", first=200))
    for _ in range(6):  # a single place, which is free again
        order += owner_of(admitted(queue, []))
    assert order[0] == "a"
    assert "c" in order[1:4], order
    assert max(map(order.count, "ab")) <= 4, order


def test_owners_that_come_and_go_keep_none_from_its_turn() -> None:
    """Two send a request as soon as their last one has ended; the third has waited all the time."""
    queue, order = queue_of(some("abc")), ""
    for number in range(10, 22):
        order += (owner := owner_of(admitted(queue, [])))
        queue.turns.present(dict.fromkeys(queue.lines))  # the others are all that there are for a moment
        queue.extend(some(owner, first=number))
    assert all(order.count(each) == 4 for each in "abc"), order


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_no_request_is_lost_or_counted_twice(moves: list[tuple[str, bool]]) -> None:
    queue, known, number = Queue(), dict[int, Sequence](), 0
    for owner, comes in moves:
        if comes or not known:
            number += 1
            known[number] = some(owner, first=number)[0]
            (queue.extend([known[number]]) if number % 3 else queue.put_back(known[number]))
        else:
            queue.remove(known.pop(min(known)))
        assert {sequence.number for sequence in queue} == set(known)
        assert len(queue) == len(known) == sum(map(queue.count, "abc"))
        assert all(queue.lines.values()), "no line is empty"


@pytest.mark.parametrize(("batch", "number"), [("aaa", 3), ("aab", 2), ("abb", 3), ("ab", 2), ("baa", 3), ("babab", 5)])
def test_when_the_pool_is_full_the_owner_with_the_most_gives_way(batch: str, number: int) -> None:
    assert gives_way(some(batch, decoding)).number == number


@given(batch=st.text("abc", min_size=2, max_size=9))
def test_the_oldest_of_all_never_gives_way(batch: str) -> None:
    assert gives_way(some(batch, decoding)).number > 1


@given(batch=st.text("abc", max_size=9), queue=st.text("abc", min_size=1, max_size=9), places=st.integers(1, 9))
def test_places_are_made_until_each_has_its_share_and_never_for_ever(batch: str, queue: str, places: int) -> None:
    running_now, line = some(batch[:places], decoding), queue_of(some(queue, first=100))

    def preempt(sequence: Sequence) -> None:
        running_now.remove(sequence)
        line.put_back(sequence)

    preempted = 0
    for _ in range(100):
        before = len(running_now)
        if not make_place(running_now, line, lambda: len(running_now) >= places, lambda: False, preempt):
            break
        preempted += before - len(running_now)
        running_now.append(admitted(line, running_now))
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
        shares.noted([ScheduledSequence(sequence, 1)])
        turns += owner_of(sequence)
    assert turns == "ababab"


def test_short_prompts_that_come_and_go_do_not_keep_a_long_one_from_its_chunks() -> None:
    """Owners b and c send a prompt of one chunk each, as soon as their last one is computed."""
    shares, long = Shares(), of("a", running(PREFILLING, 1))
    short = {name: of(name, running(PREFILLING, number)) for number, name in enumerate("bc", 2)}
    turns = ""
    for _ in range(12):
        sequence = shares.next_prefill([long, *short.values()], 100.0, lambda start, stop: 1.0)
        assert sequence
        shares.noted([ScheduledSequence(sequence, 1)])
        turns += (owner := owner_of(sequence))
        if owner in short:  # it is gone for a step of another
            shares.turns.present([each for each in "abc" if each != owner])
    assert turns.count("a") == 4, turns


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


def ended(events: Any) -> bool:
    return bool(events.queue) and isinstance(events.queue[-1], Finished)


def test_a_prompt_without_room_holds_up_no_other_owner_and_once_cancelled_nobody(model: Any) -> None:
    engine = Engine(model[1], model[0], CRAMPED, b"fingerprint")

    def ask(owner: str, seed: int, length: int, answer: int) -> tuple[Any, int]:
        made = submit(engine, prompt(seed, length), answer, owner=owner)
        for _ in range(8):
            tick(engine)
        return made

    ask("a", 1, 40, 200)
    _, large = ask("a", 2, 300, 4)
    assert (len(engine.running), len(engine.waiting)) == (1, 1)
    other, _ = ask("b", 3, 16, 2)
    assert ended(other), "there is room for it"
    late, _ = ask("a", 4, 16, 2)
    assert not ended(late), "its owner's other request has waited longer"
    engine.cancel(large)
    for _ in range(8):
        tick(engine)
    assert ended(late)
    assert len(engine.running) == 1, "the first one runs all the time"


def test_a_full_queue_of_one_owner_refuses_its_own_requests_only(engine: Engine) -> None:
    asked = [submit(engine, prompt(seed, 20), 2, owner="a")[0] for seed in range(6)]
    with pytest.raises(Overloaded, match="6 requests are waiting already"):
        submit(engine, prompt(7, 20), 2, owner="a")
    asked.append(submit(engine, prompt(8, 20), 2, owner="b")[0])
    while tick(engine):
        pass
    assert all(isinstance(outcome(events)[2], Finished) for events in asked)
