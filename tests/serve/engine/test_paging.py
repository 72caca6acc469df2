"""Pages go down to the tiers and come back exactly: over restarts, evictions, holes, tails and preemptions."""

import gc
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from cache.tiers import StoredPage
from serve.cost.model import REMEMBERED, CostModel
from serve.engine.engine import Engine
from serve.engine.request import Finished, GenerationRequest
from serve.engine.restore import MEASURE_AGAIN_SECONDS, slices_of
from tests.helpers.http import eventually
from tests.helpers.tiny_engine import (
    ALWAYS,
    PAGE,
    SMALL,
    assert_same_or_tied,
    generate,
    outcome,
    prompt,
    reference,
    submit,
    tiers_of,
)

MIB = 1 << 20
KNOWN: dict = {}


class Running:
    """An engine with tiers, as a context."""

    def __init__(self, model, tiers, settings=SMALL, always=True):
        config, params = model
        self.engine = Engine(params, config, settings, b"fingerprint", tiers)
        if always:  # such a small model computes faster than any disk reads: restore all the same
            self.engine.core.costs.model = ALWAYS
        self.tiers = tiers

    def __enter__(self):
        self.engine.start()
        return self.engine

    def __exit__(self, *_):
        self.engine.stop()
        self.engine.core.memory.prefix_cache.check()
        assert not self.engine.core.memory.prefix_cache.live
        assert not self.engine.core.saver.pending_writes


def stored(model, folder, tokens):
    """Let an engine compute a prompt and store its pages; the keys of the full ones."""
    with Running(model, tiers_of(folder)) as engine:
        generate(engine, tokens, 4)
        return engine.core.memory.prefix_cache.keys(tokens)


def test_a_restarted_engine_answers_the_same_and_computes_only_the_last_token(model, tmp_path):
    tokens = prompt(0)
    with Running(model, tiers_of(tmp_path)) as engine:
        first, started, _ = generate(engine, tokens, 20)
        assert started.reused_tokens == 0
    with Running(model, tiers_of(tmp_path)) as engine:
        again, started, end = generate(engine, tokens, 20)
        assert end == Finished("length")
        assert started.reused_tokens == started.restored["disk"] == (len(tokens) - 1) // PAGE * PAGE
        assert engine.counters.prefilled_tokens == len(tokens) - started.reused_tokens
        # The turn that follows finds the last page as the first turn left it, not quite full.
        _, started, _ = generate(engine, np.concatenate([tokens, again, prompt(1, 5)]), 2)
        assert started.reused_tokens == len(tokens) + 19
    assert_same_or_tied(model, tokens, again, reference(model, tokens, 20, KNOWN), [])
    assert again == first
    with Running(model, tiers_of(tmp_path)) as engine:
        _, started, _ = generate(engine, np.concatenate([tokens, first, prompt(2, 5)]), 2)
        assert started.restored["disk"] == started.reused_tokens == len(tokens) + 19


@pytest.mark.parametrize("question", [30, 1])  # tokens: the second one's end is in the page in which they part
def test_what_two_prompts_share_of_a_page_is_read_for_a_third_one(model, tmp_path, question):
    shared = prompt(0, 100)
    asked = [np.concatenate([shared, [number], prompt(number, question)]) for number in (1, 2, 3)]
    with Running(model, tiers_of(tmp_path)) as engine:
        for tokens in asked[:2]:
            generate(engine, tokens, 2)
    with Running(model, tiers_of(tmp_path)) as engine:
        output, started, _ = generate(engine, asked[2], 4)
        assert started.restored["disk"] == len(shared)
        assert len(shared) % PAGE
    assert_same_or_tied(model, asked[2], output, reference(model, asked[2], 4, KNOWN), [])


def test_what_was_evicted_from_the_device_comes_back_from_host_memory(model):
    prompts = [prompt(seed, 280) for seed in range(6)]  # 6 x 35 pages of a pool of 96
    flips = []
    with Running(model, tiers_of(None, host=64 * MIB)) as engine:
        for _ in range(2):
            for tokens in prompts:
                output, started, _ = generate(engine, tokens, 6)
                assert_same_or_tied(model, tokens, output, reference(model, tokens, 6, KNOWN), flips)
        assert started.restored["host"] > 200
        assert engine.core.memory.prefix_cache.stats().pages_evicted > 100
        assert engine.core.tiers.writer.dropped == 0


def test_a_hole_is_computed_and_what_comes_after_it_is_restored(model, tmp_path):
    tokens = prompt(3, 300)
    keys = stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    tiers.pages.tiers[0].delete([keys[4], keys[5], keys[20]])
    with Running(model, tiers) as engine:
        output, started, _ = generate(engine, tokens, 4)
        assert started.restored["disk"] == (len(keys) - 3) * PAGE
        assert engine.counters.prefilled_tokens + 1 >= 3 * PAGE + len(tokens) % PAGE
    assert_same_or_tied(model, tokens, output, reference(model, tokens, 4, KNOWN), [])


def test_a_partly_filled_page_in_a_hole_is_never_taken_for_the_full_page_that_was_lost(model, tmp_path):
    tokens = prompt(15, 36)
    for length in (PAGE + 2, len(tokens)):  # the first turn ends in page 1, and the second fills it
        with Running(model, tiers_of(tmp_path)) as engine:
            generate(engine, tokens[:length], 1)
            keys = engine.core.memory.prefix_cache.keys(tokens)
    tiers = tiers_of(tmp_path)
    (disk,) = tiers.pages.tiers
    (whole,) = disk.get_many([keys[1]])
    disk.delete([keys[1]])
    with Running(model, tiers) as engine:
        output, started, _ = generate(engine, tokens, 8)
        assert started.restored["disk"] == 3 * PAGE + 2  # what comes after the hole is read, and the tail in it
        generate(engine, tokens, 2)  # the device has the page and the disk lacks it: it is written again
        tiers.writer.flush()
        (again,) = disk.get_many([keys[1]])
    assert_same_or_tied(model, tokens, output, reference(model, tokens, 8, KNOWN), [])
    whole, again = (np.frombuffer(page, np.float32) for page in (whole, again))
    np.testing.assert_allclose(again, whole, atol=1e-4 * np.abs(whole).max())


def test_a_page_that_is_not_full_ends_its_slice():
    pages = [StoredPage(i, bytes([i]), 3 if i in (2, 30) else PAGE, "disk", 0) for i in (*range(12), *range(20, 45))]
    slices = [[page.index for page in piece.pages] for piece in slices_of(pages, PAGE, 16)]
    assert slices == [[0, 1, 2], [*range(3, 12)], [*range(20, 31)], [*range(31, 45)]]


def test_a_page_that_vanishes_between_lookup_and_reading_is_computed(model, tmp_path):
    tokens = prompt(4, 250)
    keys = stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    (disk,) = tiers.pages.tiers
    read = disk.get_many
    disk.get_many = lambda wanted, into, stamps: [
        None if key == keys[7] else page for key, page in zip(wanted, read(wanted, into, stamps), strict=True)
    ]
    page_bytes = Running(model, tiers).engine.core.restorer.page_bytes
    with Running(model, tiers, replace(SMALL, restore_bytes=4 * 16 * page_bytes)) as engine:  # slices of 16 pages
        output, started, _ = generate(engine, tokens, 4)
        assert started.restored["disk"] == (15 + 7) * PAGE  # the first slice up to the page, and the second
    assert_same_or_tied(model, tokens, output, reference(model, tokens, 4, KNOWN), [])


def test_pages_of_one_prompt_come_from_several_tiers(model, tmp_path):
    tokens = prompt(5, 300)
    keys = stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path, host=64 * MIB)
    host, disk = tiers.pages.tiers
    host.put_many(list(zip(keys[3:9], disk.get_many(keys[3:9]), strict=True)))
    with Running(model, tiers) as engine:
        output, started, _ = generate(engine, tokens, 4)
        assert started.restored == {"host": 6 * PAGE, "disk": (len(keys) - 6) * PAGE}
    assert_same_or_tied(model, tokens, output, reference(model, tokens, 4, KNOWN), [])


def test_requests_that_restore_share_and_preempt_give_the_same_answers(model, tmp_path):
    rng = np.random.default_rng(6)
    trunk = prompt(7, 120)
    prompts = [np.concatenate([trunk[: rng.integers(40, 120)], prompt(100 + i, 60)]) for i in range(12)]
    flips = []
    for _ in range(3):
        with Running(model, tiers_of(tmp_path, host=MIB)) as engine:
            waiting = [(tokens, submit(engine, tokens, 24)[0]) for tokens in rng.permutation(np.array(prompts, object))]
            for tokens, events in waiting:
                output, _, end = outcome(events)
                assert end == Finished("length")
                assert_same_or_tied(model, tokens, output, reference(model, tokens, 24, KNOWN), flips)
    assert len(flips) <= 1


def test_salted_requests_do_not_find_each_others_pages(model, tmp_path):
    tokens = prompt(8)
    with Running(model, tiers_of(tmp_path)) as engine:
        generate(engine, tokens, 2, salt=b"a")
    with Running(model, tiers_of(tmp_path)) as engine:
        assert generate(engine, tokens, 2, salt=b"b")[1].reused_tokens == 0
        assert generate(engine, tokens, 2, salt=b"a")[1].reused_tokens > 0


def test_another_models_pages_are_never_found(model, tmp_path):
    tokens = prompt(9)
    stored(model, tmp_path, tokens)
    config, params = model
    engine = Engine(params, config, SMALL, b"another fingerprint", tiers_of(tmp_path))
    engine.start()
    assert generate(engine, tokens, 2)[1].reused_tokens == 0
    engine.stop()


def test_a_page_that_the_disk_lost_while_the_device_has_it_is_written_again(model, tmp_path):
    tokens = prompt(10)
    tiers = tiers_of(tmp_path)
    with Running(model, tiers) as engine:
        generate(engine, tokens, 2)
        tiers.writer.flush()
        keys = engine.core.memory.prefix_cache.keys(tokens)
        tiers.pages.tiers[0].delete(keys[:5])
        generate(engine, tokens, 20)
        tiers.writer.flush()
        assert all(tiers.pages.tiers[0].contains_many(keys[:-1]))


def test_a_computed_page_is_stored_while_its_request_still_runs(model, tmp_path):
    tiers = tiers_of(tmp_path)
    stored, sampled = [], []

    def emit(event):
        sampled.append(event)
        if len(sampled) == 4:  # the engine's thread stands here, so the request has not ended
            eventually(lambda: tiers.pages.tiers[0].stats().pages >= 5, "the prompt's pages are on disk")
            stored.append(True)

    with Running(model, tiers) as engine:
        engine.submit(GenerationRequest(prompt(11, 40), 20), emit)
        eventually(lambda: Finished("length") in sampled, "the request ends")
    assert stored


def test_pages_that_the_writer_is_too_slow_for_stay_in_the_pool_until_they_are_written(model, tmp_path):
    tiers = tiers_of(tmp_path, queue_bytes=1)
    go = threading.Event()
    (disk,) = tiers.pages.tiers
    put = disk.put_many
    disk.put_many = lambda items, stamps: (go.wait(60), put(items, stamps))
    with Running(model, tiers) as engine:
        tokens = prompt(12)
        generate(engine, tokens, 2)
        assert engine.core.saver.pending_writes
        # A full pool gives them up rather than refusing a request.
        for seed in range(20, 24):
            assert generate(engine, prompt(seed, 280), 4)[2] == Finished("length")
        assert tiers.writer.dropped > 0
        go.set()


def test_a_page_that_is_sooner_computed_than_read_is_computed(model, tmp_path):
    tokens = prompt(13)
    stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    running = Running(model, tiers, always=False)
    cost = CostModel(1.0, 0.0).prefilled(0, 1_000_000, 1.0).was_read("disk", 1, 1.0)  # a microsecond, a byte a second
    running.engine.core.costs.model = cost
    with running as engine:
        assert generate(engine, tokens, 2)[1].restored == {}
        assert engine.core.restorer.recomputed_pages == (len(tokens) - 1) // PAGE


def broken(*_):
    raise RuntimeError("RESOURCE_EXHAUSTED: a fault of the test")


@pytest.mark.parametrize("fault", ["gather", "submit", "look", "fetch"])
def test_what_fails_on_the_way_to_the_tiers_or_back_costs_hits_and_no_answers(model, tmp_path, fault):
    tokens = prompt(16)
    stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    running = Running(model, tiers)
    saver = running.engine.core.saver
    if fault == "gather":
        saver.copies = replace(saver.copies, gather=dict.fromkeys(saver.copies.gather, broken))
    else:
        owner = {"submit": tiers.writer, "look": tiers, "fetch": tiers.pages}[fault]
        setattr(owner, fault, broken)
    with running as engine:
        for seed in (16, 17):
            output, started, end = generate(engine, prompt(seed), 4)
            assert end == Finished("length")
            assert_same_or_tied(model, prompt(seed), output, reference(model, prompt(seed), 4, KNOWN), [])
            assert (started.reused_tokens > 0) == (seed == 16 and fault in ("gather", "submit"))
        assert (tiers.writer.dropped > 0) == (fault in ("gather", "submit"))


def test_stopping_ends_in_time_though_a_tier_hangs(model):
    tiers, hung, go = tiers_of(None, host=64 * MIB, queue_bytes=1), threading.Event(), threading.Event()
    (host,) = tiers.pages.tiers
    host.put_many = lambda *_: (hung.set(), go.wait())
    running = Running(model, tiers, replace(SMALL, stop_seconds=1.0))
    running.engine.start()
    assert generate(running.engine, prompt(18), 4)[2] == Finished("length")
    assert hung.wait(60)
    stopper = threading.Thread(target=running.engine.stop, daemon=True)
    stopper.start()
    stopper.join(60)
    ended = not stopper.is_alive()
    go.set()
    assert ended
    assert not running.engine.core.memory.prefix_cache.live
    assert not running.engine.core.saver.pending_writes


def test_what_is_read_ahead_stays_within_its_budget(model, tmp_path):
    prompts = [prompt(seed, 250) for seed in (70, 71, 72)]
    for tokens in prompts:
        stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    running = Running(model, tiers)
    page_bytes = running.engine.core.restorer.page_bytes
    running = Running(model, tiers, replace(SMALL, restore_bytes=8 * page_bytes))
    restorer, most, fetch = running.engine.core.restorer, [], tiers.pages.fetch

    def counted(keys, *rest):
        most.append(restorer.staged_bytes + len(keys) * page_bytes)
        return fetch(keys, *rest)

    tiers.pages.fetch = counted
    with running as engine:
        asked = [submit(engine, tokens, 4)[0] for tokens in prompts]
        for tokens, events in zip(prompts, asked, strict=True):
            output, started, _ = outcome(events)
            assert started.reused_tokens == 248
            assert_same_or_tied(model, tokens, output, reference(model, tokens, 4, KNOWN), [])
        eventually(lambda: restorer.staged_bytes == 0, "nothing is staged")
    assert 4 * page_bytes <= max(most) <= 8 * page_bytes


def test_reads_that_fail_take_no_room_from_those_that_follow(model, tmp_path, monkeypatch):
    prompts = [prompt(seed, 250) for seed in range(80, 90)]
    for tokens in prompts:
        stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    page_bytes = Running(model, tiers).engine.core.restorer.page_bytes
    running = Running(model, tiers, replace(SMALL, restore_bytes=8 * page_bytes))
    monkeypatch.setattr(running.engine.core.restorer, "load", broken)
    gc.disable()
    try:
        with running as engine:
            for tokens in prompts:
                assert generate(engine, tokens, 2)[2] == Finished("length")
            monkeypatch.undo()
            engine.core.memory.prefix_cache.tree.evict(SMALL.num_pages)
            assert generate(engine, prompts[0], 2)[1].restored["disk"] > 200
    finally:
        gc.enable()


def test_a_tier_that_hangs_in_a_read_holds_a_request_for_a_while_and_no_longer(model, tmp_path, monkeypatch):
    monkeypatch.setattr("serve.engine.restore.STALLED_SECONDS", 0.2)
    tokens = prompt(91)
    stored(model, tmp_path, tokens)
    tiers, go = tiers_of(tmp_path), threading.Event()
    (disk,) = tiers.pages.tiers
    monkeypatch.setattr(disk, "get_many", lambda *_: go.wait())
    running = Running(model, tiers, replace(SMALL, stop_seconds=2.0))
    with running as engine:
        output, started, end = generate(engine, tokens, 4)
        assert (started.restored, end) == ({}, Finished("length"))
        assert_same_or_tied(model, tokens, output, reference(model, tokens, 4, KNOWN), [])
    go.set()


def test_draining_ends_once_the_writer_has(model):
    tiers = tiers_of(None, host=64 * MIB, queue_bytes=1)
    running = Running(model, tiers, replace(SMALL, stop_seconds=2.0))
    engine, hung, go = running.engine, threading.Event(), threading.Event()
    tiers.pages.tiers[0].put_many = lambda *_: (hung.set(), go.wait())
    engine.start()
    generate(engine, prompt(92), 4)
    assert hung.wait(60)
    eventually(lambda: bool(engine.core.saver.pending_writes), "pages wait for the writer")
    tiers.writer.close(0.1)
    drained = threading.Thread(target=engine.stop, daemon=True)
    drained.start()
    drained.join(60)
    go.set()
    assert not drained.is_alive()
    assert not engine.core.saver.pending_writes


def test_a_tier_that_was_too_slow_is_measured_again_and_taken_back(model, tmp_path, monkeypatch):
    tokens = prompt(19)
    stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    running = Running(model, tiers, always=False)
    restorer, costs = running.engine.core.restorer, running.engine.core.costs
    costs.model = CostModel(1.0, 0.0).prefilled(0, 1000, 1.0).was_read("disk", 1, 1.0)  # a millisecond, a byte a second
    for _ in range(REMEMBERED):
        costs.model = costs.model.was_read("disk", 1, 1.0)
    monkeypatch.setattr(costs, "prefilled", lambda *_, **__: None)
    restorer.measured_at["disk"] = time.monotonic()
    with running as engine:
        assert generate(engine, tokens, 2)[1].restored == {}
        assert restorer.measuring is None  # it was read a moment ago
        restorer.measured_at["disk"] -= MEASURE_AGAIN_SECONDS
        for _ in range(REMEMBERED):
            engine.core.memory.prefix_cache.tree.evict(SMALL.num_pages)
            assert generate(engine, tokens, 2)[2] == Finished("length")
            if restorer.measuring:
                restorer.measuring.result(60)
            restorer.measured_at["disk"] = time.monotonic() - MEASURE_AGAIN_SECONDS
            if restorer.restored_tokens["disk"]:
                break
        assert restorer.restored_tokens["disk"] > 0


@pytest.mark.parametrize("fault", ["write", "read"])
def test_a_failing_disk_costs_hits_and_no_answers(model, tmp_path, fault):
    tokens = prompt(14)
    stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    (disk,) = tiers.pages.tiers
    attempt = disk.store.attempt
    disk.store.attempt = lambda kind, action, other: other if kind == fault else attempt(kind, action, other)
    with Running(model, tiers) as engine:
        output, started, _ = generate(engine, tokens, 4)
        assert (started.reused_tokens > 0) == (fault == "write")
    assert_same_or_tied(model, tokens, output, reference(model, tokens, 4, KNOWN), [])
