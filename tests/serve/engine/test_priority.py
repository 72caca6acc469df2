"""Background requests come after all others, wherever something is divided, and still have their turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.prefix_cache import PrefixCache
from cache.retained_file import Row, Rows
from cache.retention import Ask
from serve.api.pins import Pin
from serve.engine.engine import Engine
from serve.engine.fairness import EVERY, Queue, Shares, first_lines, gives_place, gives_way, line_of, make_place
from serve.engine.page_names import PageNames
from serve.engine.request import Finished, Started
from serve.engine.retaining import Retainer
from serve.engine.scheduler import ScheduledSequence
from serve.engine.sequence import DECODING, PREFILLING, Sequence
from serve.server.pins import Pins
from tests.helpers.sequences import running, waiting
from tests.helpers.tiny_engine import CRAMPED, PAGE, SMALL, generate, prompt, submit, tick


def some(owners: str, make: Callable[[int], Sequence], first: int = 1) -> list[Sequence]:
    """A request for each letter, of the owner with this name; a capital is in the background."""
    made = []
    for number, letter in enumerate(owners, first):
        sequence = make(number)
        sequence.request = replace(sequence.request, owner=letter.lower(), priority=-letter.isupper())
        made.append(sequence)
    return made


def letter(sequence: Sequence) -> str:
    return sequence.request.owner.upper() if sequence.request.background else sequence.request.owner


def decoding(number: int) -> Sequence:
    return running(DECODING, number)


def queue_of(owners: str) -> Queue:
    queue = Queue()
    queue.extend(some(owners, waiting))
    return queue


def admissions(queue: Queue, batch: list[Sequence], count: int) -> str:
    """Whose requests are admitted, one after the other, as places get free."""
    order = ""
    for _ in range(count):
        chosen = next(iter(queue.next_line(batch)))
        queue.remove(chosen)
        queue.admitted(chosen)
        order += letter(chosen)
    return order


@pytest.mark.parametrize(("queue", "order"), [("AAAb", "bAAA"), ("Aab", "abA"), ("ABc", "cAB"), ("AB", "AB")])
def test_who_is_in_the_background_waits_for_all_others(queue: str, order: str) -> None:
    assert admissions(queue_of(queue), [], len(order)) == order


@given(queue=st.text("abAB", min_size=30, max_size=60).filter(lambda text: "A" in text))
def test_of_eight_turns_one_goes_to_the_background(queue: str) -> None:
    """Every other request comes before the first of the background does, and still it does not starve."""
    order = admissions(queue_of(queue + "ab" * 40), [], EVERY)
    behind = sum(each.isupper() for each in order)
    assert behind == 1
    assert order[-1].isupper()


def test_a_turn_of_the_background_is_not_saved_up_while_nobody_waits_there() -> None:
    queue = queue_of("a" * 30)
    assert admissions(queue, [], 20) == "a" * 20
    queue.extend(some("B", waiting, first=99))
    assert admissions(queue, [], EVERY) == "a" * (EVERY - 1) + "B"


@pytest.mark.parametrize(
    ("batch", "line", "number"),
    [("aAAb", "c", 3), ("aabA", "c", 2), ("aA", "c", None), ("AABB", "a", 4), ("aaaa", "B", None), ("aAAA", "B", 4)],
)
def test_the_background_gives_its_places_but_the_last_and_takes_none(batch: str, line: str, number: int | None) -> None:
    (asking,) = some(line, waiting)
    found = gives_place(some(batch, decoding), line_of(asking))
    assert (found and found.number) == number


@pytest.mark.parametrize(("batch", "number"), [("abA", 3), ("aAb", 2), ("Aab", 3), ("AB", 2), ("aAB", 3)])
def test_when_the_pool_is_full_the_background_gives_way_unless_it_is_the_oldest(batch: str, number: int) -> None:
    assert gives_way(some(batch, decoding)).number == number


@given(batch=st.text("abAB", max_size=9), queue=st.text("abAB", min_size=1, max_size=9), places=st.integers(1, 9))
def test_places_are_never_taken_back_and_forth(batch: str, queue: str, places: int) -> None:
    running_now, line = some(batch[:places], decoding), Queue()
    line.extend(some(queue, waiting, first=100))

    def preempt(sequence: Sequence) -> None:
        running_now.remove(sequence)
        line.put_back(sequence)

    for _ in range(100):
        if not line or not make_place(running_now, line, lambda: len(running_now) >= places, lambda: False, preempt):
            break
        chosen = next(iter(line.next_line(running_now)))
        line.remove(chosen)
        line.admitted(chosen)
        running_now.append(chosen)
    else:
        pytest.fail("places go back and forth for ever")


def test_chunks_of_the_background_are_computed_in_one_of_eight_steps() -> None:
    shares = Shares()
    batch = [*some("Aab", lambda number: running(PREFILLING, number))]
    turns = ""
    for _ in range(3 * EVERY):
        sequence = shares.next_prefill(batch, 100.0, lambda start, stop: 1.0)
        assert sequence
        shares.noted([ScheduledSequence(sequence, 1)])
        turns += letter(sequence)
    assert [at for at, each in enumerate(turns, 1) if each == "A"] == [EVERY, 2 * EVERY, 3 * EVERY]
    assert abs(turns.count("a") - turns.count("b")) <= 1


@given(lines=st.lists(st.sampled_from(["a", "b", "a\0background", "b\0background"]), unique=True, min_size=1))
def test_some_line_is_always_next(lines: list[str]) -> None:
    for passed in range(EVERY):
        assert first_lines(lines, passed)


@pytest.fixture
def engine(model: Any) -> Engine:
    """An engine whose loop is turned by hand."""
    return Engine(model[1], model[0], SMALL, b"fingerprint")


def ended(events: Any) -> bool:
    return bool(events.queue) and isinstance(events.queue[-1], Finished)


def test_an_interactive_request_overtakes_background_ones_in_waiting_and_in_computing(engine: Engine) -> None:
    behind = [submit(engine, prompt(seed, 150), 4, priority=-1)[0] for seed in range(6)]
    for _ in range(3):
        tick(engine)
    assert (len(engine.running), len(engine.waiting)) == (4, 2)
    urgent, _ = submit(engine, prompt(99, 40), 4)
    turns = 0
    while not ended(urgent):
        turns += 1
        tick(engine)
    assert turns <= 10, "it took a place, and its chunks came first"
    assert sum(map(ended, behind)) <= 1
    while tick(engine):
        pass
    assert all(map(ended, behind))
    engine.core.memory.prefix_cache.check()


def test_pages_of_background_requests_are_evicted_first(model: Any) -> None:
    engine = Engine(model[1], model[0], CRAMPED, b"fingerprint")
    engine.start()
    urgent, behind = prompt(1, 60), prompt(2, 60)
    generate(engine, urgent, 1)
    generate(engine, behind, 1, priority=-1)
    generate(engine, prompt(3, 240), 1)
    tree = engine.core.memory.prefix_cache
    assert tree.peek(behind) < 50 < tree.peek(urgent), "though it was used later"
    engine.stop()


def test_a_request_that_fits_alone_gets_the_pages_that_others_asked_to_keep(model: Any) -> None:
    engine = Engine(model[1], model[0], replace(CRAMPED, retain_pages=20), b"fingerprint")
    engine.start()
    tokens = prompt(1, 80)
    _, started, _ = generate(engine, tokens, 1, asks=(Ask(80, 3600.0),))
    assert isinstance(started, Started)
    assert started.kept[0].tokens == 80
    generate(engine, prompt(2, 200), 1)
    assert engine.core.memory.prefix_cache.peek(tokens) >= 80, "there was room beside it"
    long = prompt(3, CRAMPED.max_model_len - 2)
    _, _, last = generate(engine, long, 1)
    assert isinstance(last, Finished)
    _, started, _ = generate(engine, tokens, 1, asks=(Ask(80, 3600.0),))
    assert "given up before" in started.kept[0].why
    pins = Pins(SimpleNamespace(engine=engine), None, known={"p": Pin("p", True, 80, "", "device", True, None)})
    generate(engine, tokens, 1, asks=(Ask(80, inf, "p"),))
    assert pins.listed().data[0].pinned
    generate(engine, long, 1)
    (given_up,) = pins.listed().data
    assert (given_up.pinned, given_up.tokens, given_up.tier) == (False, 0, None)
    assert "pin it again" in (given_up.instead or "")
    engine.stop()
    engine.core.memory.prefix_cache.check()
    assert not engine.core.memory.prefix_cache.live


def test_promises_of_several_servers_are_kept_within_the_budget(tmp_path: Path) -> None:
    keys = [bytes([number]) * 32 for number in range(6)]
    for name, which in (("a", keys[:3]), ("b", keys[3:])):
        row = Row("", 300.0, time.time() + 200, b"".join(which))
        tmp_path.joinpath(name).write_bytes(msgspec.msgpack.encode(Rows(b"model", (row,))))
    settings = replace(SMALL, retain_pages=4, retained_folder=tmp_path)
    retainer = Retainer(settings, PageNames(b"model", PAGE), lambda: PrefixCache(1, PAGE), lambda: None)
    assert len(retainer.retentions.resumed) == 4
    retainer.close(5)
