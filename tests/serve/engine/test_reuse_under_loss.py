"""Nothing wrong is answered, held or stored, whatever a store has lost, while others write to it too."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers import reuse_model
from tests.helpers.cold_reference import PAGE, PAGE_SHAPE, SETTINGS, records, wrong_logits, wrong_pages, wrong_records
from tests.helpers.reuse_model import Conversation, World, case_of, failing
from tests.helpers.stepped_engine import by_hand

# What a run must have had in it, or it has shown nothing.
MUST_HAPPEN = ("restored", "tails", "lost", "evicted", "preempted", "cancelled", "restarts", "deaths")
PRELOADS = ("preloads_taken", "preloads_evicted")  # a bucket is not listed, host memory does not outlive its engine
QUIET = replace(
    case_of(0, "disk"),
    host_bytes=0,
    store_bytes=64 << 20,
    queue_bytes=1 << 30,
    engines=1,
    speculative_tokens=0,
    patient=True,
)


@pytest.fixture(scope="module")
def clock():
    with by_hand() as clock:
        yield clock


class Tally:
    """What has happened in all cases so far."""

    def __init__(self):
        self.counts, self.flips, self.cases = Counter(), [], 0

    def add(self, world: World) -> None:
        self.cases += 1
        self.counts += world.counts
        self.flips += world.flips

    def __str__(self):
        return f"{self.cases} cases, flips: {len(self.flips)} of {self.counts['requests']} answers, {dict(self.counts)}"


@pytest.mark.parametrize(("lower", "cases"), [("disk", 70), ("remote", 25), ("none", 25)])
def test_what_is_lost_is_computed_again_and_nothing_wrong_is_answered_held_or_stored(
    clock, lower, cases, record_property
):
    tally = Tally()
    wrong = failing(range(cases), clock, lower, tally.add)
    print(tally)
    record_property("flips", len(tally.flips))
    assert not wrong, wrong
    assert all(tally.counts[name] for name in (*MUST_HAPPEN, *(PRELOADS if lower == "disk" else ()))), tally


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_cases_of_loss_hold_nothing_wrong(clock, capsys):
    tally = Tally()

    def seen(world):
        tally.add(world)
        if tally.cases % 500 == 0:
            with capsys.disabled():
                print(f"\n{tally}", flush=True)

    wrong = failing(range(1000, 11_000), clock, seen=seen)
    assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_processes_that_write_and_lose_the_same_pages_beside_each_other_find_nothing_wrong(tmp_path):
    command = [sys.executable, "-m", reuse_model.__name__, "beside", str(tmp_path), "0", "150"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for child, (out, err) in [(child, child.communicate()) for child in children]:
        assert child.returncode == 0, err[-4000:]
        print(out)
        assert json.loads(out)["restored"]


# The proof that a wrong page is seen, wherever it lies.


def swapped(pages: list[np.ndarray], at: int) -> dict[int, np.ndarray]:
    """Two neighbours in each other's place."""
    other = at + 1 if at + 1 < len(pages) else at - 1
    return {at: pages[other], other: pages[at]}


def flipped(pages: list[np.ndarray], at: int) -> dict[int, np.ndarray]:
    """The sign of the page's largest number is wrong."""
    page = pages[at].copy()
    page.flat[np.abs(page).argmax()] *= -1
    return {at: page}


def half_filled(pages: list[np.ndarray], at: int) -> dict[int, np.ndarray]:
    """What an earlier turn had left of the page, its last token still missing."""
    page = pages[at].copy()
    page[:, :, :, -1] = pages[at - 1][:, :, :, -1]
    return {at: page}


def shifted(pages: list[np.ndarray], at: int) -> dict[int, np.ndarray]:
    """Each token's numbers lie one place further on."""
    return {at: np.roll(pages[at], 1, axis=3)}


def another(pages: list[np.ndarray], at: int) -> dict[int, np.ndarray]:
    """A page that has nothing to do with it."""
    return {at: np.random.default_rng(at).normal(size=PAGE_SHAPE).astype(np.float32)}


@pytest.fixture
def told(clock, tmp_path):
    """A world in which one conversation of seven turns is on disk, the conversation, and what is stored."""
    world = World(QUIET, tmp_path, clock)
    talk = Conversation(np.arange(3, 5, dtype=np.int32), b"")
    for seed in range(10, 17):
        world.ask(random.Random(seed), talk, talk.tokens)
        world.finish(random.Random(seed))
    world.engines[0].core.tiers.writer.flush()
    yield world, talk, records(world.lower)
    world.close()


def put(world: World, pages: Mapping[bytes, bytes]) -> None:
    """Store pages in the place of whatever is there, under seals that fit."""
    world.lower.delete([*records(world.lower), *pages])
    world.lower.put_many(list(pages.items()))


# A query that sees all of two pages does not mind their order: keys know their positions. The page checks do mind.
@pytest.mark.parametrize(
    ("damage", "in_logits"),
    [(swapped, False), (shifted, False), (flipped, True), (half_filled, True), (another, True)],
)
def test_a_wrong_page_under_a_valid_seal_is_seen_on_disk_on_the_device_and_in_the_logits(told, damage, in_logits):
    world, talk, stored = told
    engine, before = world.engines[0], talk.tokens
    keys = engine.core.memory.prefix_cache.keys(before[:-1])
    right = [np.frombuffer(stored[key], np.float32).reshape(PAGE_SHAPE) for key in keys]
    seen_in_text = 0
    for at in range(len(keys)):
        wrong = {keys[i]: page.tobytes() for i, page in damage(right, at).items()}
        put(world, stored | wrong)
        assert len(wrong_records(world.lower, world.truth)) == len(wrong)
        engine.core.memory.prefix_cache.tree.evict(SETTINGS.num_pages)
        world.ask(random.Random(at), talk, before)
        while world.advance(random.Random(at), engine):
            pass
        asked = world.open.pop()
        world.settle(asked)
        assert len(wrong_pages(engine, world.truth)) >= len(wrong)
        assert wrong_logits(engine, world.truth, asked.said, talk.salt, asked.head) or not in_logits
        try:
            world.check_answer(asked)
        except AssertionError:
            seen_in_text += 1
        engine.core.tiers.writer.flush()
    put(world, stored)
    assert not wrong_records(world.lower, world.truth)
    print(f"{damage.__name__}: of {len(keys)} wrong pages, {seen_in_text} are seen in the answer, too")


def test_a_wrong_number_is_seen_in_every_record_and_none_where_a_record_is_not_filled(told):
    world, _, stored = told
    filled = {key: (len(world.truth.names[key]) - 1) % PAGE + 1 for key in stored}
    assert {*filled.values()} == {1, 2, 3, 4}, "full pages and tails of all lengths"
    for key, count in filled.items():
        page = np.frombuffer(stored[key], np.float32).reshape(PAGE_SHAPE).copy()
        page[:, :, :, count:] = np.nan
        put(world, stored | {key: page.tobytes()})
        assert not wrong_records(world.lower, world.truth)
        page[1, -1, 0, count - 1] += 1e-3 * np.abs(page[:, :, :, :count]).max()
        put(world, stored | {key: page.tobytes()})
        assert len(wrong_records(world.lower, world.truth)) == 1
