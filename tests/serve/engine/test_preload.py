"""Pages that were read before a request asked for them: who takes them over, what becomes of the others."""

import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from cache.lmdb_env import Databases
from cache.tiers import Tiers
from serve.engine.engine import Engine
from serve.engine.programs import CompileError
from serve.engine.request import Finished
from tests.helpers.http import eventually
from tests.helpers.tiny_engine import (
    ALWAYS,
    CRAMPED,
    PAGE,
    SMALL,
    assert_same_or_tied,
    generate,
    outcome,
    prompt,
    reference,
    submit,
    tick,
    tiers_of,
)

KNOWN: dict = {}
PRELOADING = replace(SMALL, preload_bytes=1 << 30)


def engine_on(model, tiers: Tiers, settings=PRELOADING, fingerprint=b"fingerprint") -> Engine:
    """An engine that restores whatever is there; it is not started."""
    config, params = model
    engine = Engine(params, config, settings, fingerprint, tiers)
    engine.core.costs.model = ALWAYS
    return engine


def preloaded(model, folder, settings=PRELOADING, **options) -> Engine:
    """A started engine that has preloaded what it can."""
    engine = engine_on(model, tiers_of(folder), settings, **options)
    engine.preload(lambda: False)
    engine.start()
    return engine


def stored(model, folder, *prompts, answer=4) -> list[list[int]]:
    """Let an engine compute prompts one after the other and store their pages; the answers."""
    engine = engine_on(model, tiers_of(folder), SMALL)
    engine.start()
    answers = [generate(engine, tokens, answer)[0] for tokens in prompts]
    stopped(engine)
    return answers


def stopped(engine: Engine) -> None:
    engine.stop()
    engine.core.memory.prefix_cache.check()
    assert not engine.core.memory.prefix_cache.live


def right(model, tokens, output) -> None:
    assert_same_or_tied(model, tokens, output, reference(model, tokens, len(output), KNOWN), [])


def of(engine: Engine):
    return engine.core.memory.prefix_cache.preloaded


def test_a_preloaded_prefix_is_taken_over_without_a_read_and_counts_as_restored(model, tmp_path):
    tokens = prompt(0)
    stored(model, tmp_path, tokens)
    engine = preloaded(model, tmp_path)
    (disk,) = engine.core.tiers.pages.tiers
    full, reads = (len(tokens) - 1) // PAGE, disk.stats().hits
    assert len(of(engine)) == reads >= full
    output, started, _ = generate(engine, tokens, 4)
    assert started.restored == {"disk": started.reused_tokens} == {"disk": full * PAGE}
    assert engine.core.restorer.restored_tokens["disk"] == full * PAGE
    assert engine.counters.prefilled_tokens == len(tokens) - full * PAGE
    assert (of(engine).taken, disk.stats().hits) == (full, reads)
    right(model, tokens, output)
    stopped(engine)


def test_the_partly_filled_page_where_an_answer_ended_is_taken_over_too(model, tmp_path):
    tokens = prompt(1)
    (answer,) = stored(model, tmp_path, tokens, answer=7)
    turn = np.concatenate([tokens, answer, prompt(2, 11)])
    assert (len(tokens) + 6) % PAGE
    engine = preloaded(model, tmp_path)
    hits = engine.core.tiers.pages.tiers[0].stats().hits
    output, started, _ = generate(engine, turn, 4)
    assert engine.core.runner.dispatched == 4, "one chunk computes all that comes after the partly filled page"
    assert started.restored == {"disk": len(tokens) + 6}  # the last token was sampled, and never ran
    assert engine.core.tiers.pages.tiers[0].stats().hits == hits
    right(model, turn, output)
    stopped(engine)


def test_the_latest_conversation_is_preloaded_from_its_start_where_there_is_no_room_for_all(model, tmp_path):
    older, newer = prompt(3, 300), prompt(4, 300)
    stored(model, tmp_path, newer, older)
    stored(model, tmp_path, newer)  # used again
    engine = preloaded(model, tmp_path, replace(PRELOADING, preload_bytes=30 * page_bytes(model)))
    assert len(of(engine)) == 30
    assert of(engine).run(engine.core.memory.prefix_cache.keys(newer))[29:]
    for tokens in (newer, older):  # what is not preloaded is read
        output, started, _ = generate(engine, tokens, 4)
        assert started.reused_tokens == started.restored["disk"] == 296
        right(model, tokens, output)
    assert of(engine).taken == 30
    stopped(engine)


def page_bytes(model) -> int:
    config, _ = model
    return 2 * config.num_layers * config.num_kv_heads * PAGE * config.head_dim * 4


def test_what_is_read_ahead_before_the_store_is_listed_counts_and_may_be_more_than_is_preloaded(model, tmp_path):
    tokens = prompt(5, 300)
    stored(model, tmp_path, tokens)
    engine = engine_on(model, tiers_of(tmp_path), replace(PRELOADING, preload_bytes=2 * page_bytes(model)))
    preloader, keys = engine.core.preloader, engine.core.memory.prefix_cache.keys(tokens)
    preloader.listing, preloader.left = Future(), dict.fromkeys(keys[:10])

    def read() -> bool:
        preloader.step(quiet=True)
        return not (preloader.left or preloader.reads)

    eventually(read, "pages are read ahead")
    preloader.listing.set_result(keys)
    assert not preloader.step(quiet=True)
    assert len(of(engine)) == 10
    engine.start()
    stopped(engine)


def test_pages_behind_a_hole_are_taken_over_once_it_is_computed(model, tmp_path):
    tokens = prompt(5, 300)
    stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    engine = engine_on(model, tiers)
    keys = engine.core.memory.prefix_cache.keys(tokens)
    tiers.pages.tiers[0].delete([keys[4], keys[5], keys[20]])
    engine.preload(lambda: False)
    engine.start()
    output, started, _ = generate(engine, tokens, 4)
    assert started.restored == {"disk": (len(keys) - 3) * PAGE}
    assert of(engine).taken == len(keys) - 3
    right(model, tokens, output)
    stopped(engine)


def test_a_corrupt_record_is_not_preloaded_and_its_page_is_computed(model, tmp_path):
    tokens = prompt(6)
    stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    (disk,) = tiers.pages.tiers
    engine = engine_on(model, tiers, SMALL)
    key = engine.core.memory.prefix_cache.keys(tokens)[3]

    def flip(dbs: Databases) -> bool:
        with dbs.env.begin(write=True) as txn:
            page = bytearray(txn.get(key, db=dbs.pages))
            page[100] ^= 1
            return txn.put(key, bytes(page), db=dbs.pages)

    assert disk.store.attempt("write", flip, False)
    engine = engine_on(model, tiers)
    engine.preload(lambda: False)
    assert key not in of(engine)
    assert disk.stats().corrupt == 1
    engine.start()
    output, started, _ = generate(engine, tokens, 4)
    assert started.restored == {"disk": ((len(tokens) - 1) // PAGE - 1) * PAGE}
    right(model, tokens, output)
    stopped(engine)


KILLED = """
import os, pickle, signal, sys
from cache.disk import DiskTier
tier = DiskTier(sys.argv[2], 64 << 20)
tier.put_many(pickle.load(open(sys.argv[1], "rb")))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_stored_is_preloaded(model, tmp_path):
    tokens = prompt(7)
    stored(model, tmp_path / "first", tokens)
    tiers = tiers_of(tmp_path / "first")
    keys = engine_on(model, tiers, SMALL).core.memory.prefix_cache.keys(tokens)
    (tmp_path / "items").write_bytes(pickle.dumps([*zip(keys, tiers.pages.tiers[0].get_many(keys), strict=True)]))
    tiers.close()
    command = [sys.executable, "-c", KILLED, tmp_path / "items", tmp_path / "store"]
    assert subprocess.run(command, timeout=60).returncode == -9
    engine = preloaded(model, tmp_path / "store")
    assert len(of(engine)) == len(keys)
    output, started, _ = generate(engine, tokens, 4)
    assert started.restored["disk"] == of(engine).taken * PAGE == (len(tokens) - 1) // PAGE * PAGE
    right(model, tokens, output)
    stopped(engine)


def test_two_requests_that_need_the_same_pages_at_once_get_them_from_one(model, tmp_path):
    shared = prompt(8, 160)
    stored(model, tmp_path, shared)
    engine = engine_on(model, tiers_of(tmp_path))
    engine.preload(lambda: False)
    asked = [np.concatenate([shared, prompt(seed, 20)]) for seed in (9, 10)]
    events = [submit(engine, tokens, 6)[0] for tokens in asked]  # before the thread starts
    engine.start()
    for tokens, came in zip(asked, events, strict=True):
        output, started, end = outcome(came)
        assert end == Finished("length")
        assert started.reused_tokens >= len(shared) - PAGE
        right(model, tokens, output)
    assert of(engine).taken <= -(-len(shared) // PAGE)
    stopped(engine)


def test_preloaded_pages_go_first_when_the_pool_needs_room(model, tmp_path):
    kept, others = prompt(11, 60), [prompt(seed, 220) for seed in (12, 13)]
    stored(model, tmp_path, others[0])
    engine = engine_on(model, tiers_of(tmp_path), replace(CRAMPED, preload_bytes=1 << 30))
    engine.start()
    generate(engine, kept, 2)
    eventually(lambda: len(of(engine)) == CRAMPED.num_pages // 2, "half of the pool is preloaded")
    for _ in range(2):
        output, _, end = generate(engine, others[1], 6)
        assert end == Finished("length")
        right(model, others[1], output)
    assert of(engine).evicted > 0
    assert engine.core.memory.prefix_cache.stats().pages_evicted == 0
    assert generate(engine, kept, 2)[1].restored == {}, "what a request has computed was evicted for what nobody asked"
    stopped(engine)


def test_another_models_pages_and_other_salts_are_never_taken_over(model, tmp_path):
    tokens = prompt(14)
    stored(model, tmp_path, tokens)
    for fingerprint, salt in ((b"another fingerprint", b""), (b"fingerprint", b"salt")):
        engine = preloaded(model, tmp_path, fingerprint=fingerprint)
        assert of(engine)
        output, started, _ = generate(engine, tokens, 4, salt=salt)
        assert (started.reused_tokens, of(engine).taken) == (0, 0)
        right(model, tokens, output)
        stopped(engine)


def test_pages_of_another_size_are_not_preloaded(model, tmp_path):
    tiers = tiers_of(tmp_path)
    tiers.pages.tiers[0].put_many([(bytes([i]) * 32, bytes(page_bytes(model) + 1)) for i in range(9)])
    engine = engine_on(model, tiers)
    engine.preload(lambda: False)
    assert not of(engine)
    assert tiers.pages.tiers[0].stats().bytes_read == 0
    tiers.close()


def test_nothing_is_read_before_it_is_asked_for_where_that_is_turned_off(model, tmp_path):
    tokens = prompt(15)
    stored(model, tmp_path, tokens)
    engine = preloaded(model, tmp_path, SMALL)
    assert engine.core.tiers.pages.tiers[0].stats().hits == 0
    assert generate(engine, tokens, 4)[1].restored["disk"] > 0
    assert of(engine).read == 0
    stopped(engine)


def test_a_running_request_holds_preloading_up_and_what_it_restores_is_not_read_twice(model, tmp_path):
    tokens = prompt(16, 300)
    stored(model, tmp_path, tokens)
    engine = engine_on(model, tiers_of(tmp_path))
    eventually(lambda: engine.core.preloader.listing.done(), "the store is listed")
    submit(engine, tokens, 30)
    engine.core.waiting.extend(engine.inbox.read()[0])
    engine.core.step()
    assert not engine.core.preloader.step(engine.core.quiet)
    assert of(engine).read == 0
    engine.start()
    eventually(lambda: engine.core.quiet and not engine.core.preloader.left, "the request has ended")
    assert of(engine).read < PAGE, "pages that the request has restored are read again"
    stopped(engine)


def fails(*_):
    raise RuntimeError("RESOURCE_EXHAUSTED: a fault of the test")


def cannot_be_compiled(*_):
    raise CompileError("a fault of the test")


@pytest.mark.parametrize("fault", ["listing", "reading", "copying", "compiling"])
def test_what_fails_while_preloading_costs_nothing_but_the_pages(model, tmp_path, monkeypatch, fault):
    tokens = prompt(17)
    stored(model, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    (disk,) = tiers.pages.tiers
    if fault in ("listing", "reading"):
        monkeypatch.setattr(disk, "recent" if fault == "listing" else "get_many", fails)
    engine = engine_on(model, tiers)
    restorer, wrong = engine.core.restorer, fails if fault == "copying" else cannot_be_compiled
    scatter = restorer.copies.scatter
    if fault in ("copying", "compiling"):
        restorer.copies = replace(restorer.copies, scatter=dict.fromkeys(scatter, wrong))
    engine.preload(lambda: False)
    assert not of(engine)
    engine.core.memory.prefix_cache.check()
    monkeypatch.undo()
    restorer.copies = replace(restorer.copies, scatter=scatter)
    engine.start()
    output, started, _ = generate(engine, tokens, 4)
    assert started.restored["disk"] > 0
    right(model, tokens, output)
    stopped(engine)


def test_a_start_does_not_wait_for_a_tier_that_hangs(model, tmp_path, monkeypatch):
    stored(model, tmp_path, prompt(18))
    tiers, go = tiers_of(tmp_path), threading.Event()
    monkeypatch.setattr(tiers.pages.tiers[0], "recent", lambda *_: go.wait() and [])
    engine = engine_on(model, tiers)
    turns = iter(range(5))
    engine.preload(lambda: next(turns, None) is None)
    go.set()
    assert not of(engine)
    tiers.close()


def test_a_restore_does_not_wait_until_a_large_store_is_listed(model, tmp_path, monkeypatch):
    tokens = prompt(18)
    stored(model, tmp_path, tokens)
    tiers, go = tiers_of(tmp_path), threading.Event()
    monkeypatch.setattr(tiers.pages.tiers[0], "recent", lambda *_: go.wait() and [])
    engine = engine_on(model, tiers)
    engine.start()
    _, started, _ = generate(engine, tokens, 4)
    go.set()
    assert started.restored == {"disk": (len(tokens) - 1) // PAGE * PAGE}
    stopped(engine)


def test_a_copy_that_fails_without_the_pool_costs_no_running_request(model, tmp_path):
    tokens = prompt(21)
    stored(model, tmp_path, prompt(22))
    engine = engine_on(model, tiers_of(tmp_path))
    restorer, preloader = engine.core.restorer, engine.core.preloader
    eventually(lambda: preloader.listing.done(), "the store is listed")
    preloader.step(quiet=True)
    eventually(lambda: preloader.reads[0].loading.done(), "pages are read")
    restorer.copies = replace(restorer.copies, scatter=dict.fromkeys(restorer.copies.scatter, fails))
    events, _ = submit(engine, tokens, 4)
    while engine.inbox.submissions or engine.core.unfinished:
        engine.turn(engine.receive())
    output, _, end = outcome(events)
    assert end == Finished("length")
    right(model, tokens, output)
    assert not of(engine)
    assert not preloader.reads
    engine.core.memory.prefix_cache.check()
    engine.core.tiers.close()


def test_a_lost_pool_takes_what_was_preloaded_along(model, tmp_path):
    tokens = prompt(19)
    stored(model, tmp_path, tokens)
    engine = engine_on(model, tiers_of(tmp_path))
    engine.preload(lambda: False)
    assert of(engine)
    engine.core.memory.pool.k.delete()
    engine.core.recover("a fault of the test")
    assert not of(engine)
    submit(engine, tokens, 4)
    while tick(engine):
        pass
    assert engine.core.restorer.restored_tokens["disk"] == (len(tokens) - 1) // PAGE * PAGE
    engine.core.memory.prefix_cache.check()
    engine.core.tiers.close()


def test_what_an_audit_doubts_is_given_back(model, tmp_path):
    stored(model, tmp_path, prompt(20))
    engine = engine_on(model, tiers_of(tmp_path))
    engine.preload(lambda: False)
    free = engine.core.memory.prefix_cache.pool.free_pages
    held = len(of(engine))
    engine.core.preloader.forget()
    assert held
    assert engine.core.memory.prefix_cache.pool.free_pages == free + held
    assert not engine.core.preloader.step(quiet=True)
    engine.core.tiers.close()
