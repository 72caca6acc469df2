"""What a schedule has to come out as, step by step: the loop is turned by hand, so nothing depends on timing."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest

from cache.keys import all_keys, root_key
from serve.engine.buckets import SamplingParams
from serve.engine.engine import Engine
from serve.engine.programs import CompileError
from serve.engine.request import Failed, Finished, GenerationRequest, Started, TokenEvent
from tests.helpers.forced_answers import Script
from tests.helpers.tiny_engine import ALWAYS, CRAMPED, SMALL, VOCAB, generate, outcome, prompt, submit, tick, tiers_of


@pytest.fixture
def make(model):
    """Makes engines, which are not started; the tiers of all are closed at the end."""
    made = []

    def make(settings=SMALL, tiers=None):
        engine = Engine(model[1], model[0], settings, b"fingerprint", tiers)
        if tiers:
            engine.core.costs.model = ALWAYS
            made.append(tiers)
        return engine

    yield make
    for tiers in made:
        tiers.close()


def finish(engine):
    """Turn the loop until there is nothing to do; then nothing may be held."""
    while tick(engine):
        pass
    engine.core.memory.prefix_cache.check()
    assert not engine.core.memory.prefix_cache.live


def store(make, folder, tokens):
    """Compute a prompt in an engine whose tiers keep it; the keys of its full pages."""
    tiers = tiers_of(folder)
    engine = make(SMALL, tiers)
    submit(engine, tokens, 1)
    finish(engine)
    tiers.close()
    return engine.core.memory.prefix_cache.keys(tokens)


def test_two_that_restore_one_prefix_bring_it_once_and_both_fit_in_the_end(make, tmp_path):
    trunk = prompt(7, 120)
    store(make, tmp_path, np.append(trunk, 5))
    engine = make(CRAMPED, tiers_of(tmp_path))
    prompts = [np.concatenate([trunk, prompt(seed, 8)]) for seed in (20, 21)]
    asked = [submit(engine, tokens, count)[0] for tokens, count in zip(prompts, (30, 190), strict=True)]
    finish(engine)
    assert [outcome(events)[2] for events in asked] == [Finished("length")] * 2
    assert engine.core.restorer.restored_tokens == {"disk": 120}


def test_no_prompt_reuses_more_than_it_has_though_it_was_preempted_before_its_first_token(make):
    engine = make(replace(CRAMPED, max_mixed_prefill_tokens=2), tiers_of(None, host=64 << 20))
    tokens = prompt(7, 160)
    submit(engine, tokens[:100], 1)
    finish(engine)
    engine.core.tiers.writer.flush()
    submit(engine, prompt(1, 150), 170)
    for _ in range(8):
        tick(engine)
    asked, _ = submit(engine, tokens, 4)
    finish(engine)
    assert engine.counters.preemptions
    _, started, last = outcome(asked)
    assert last == Finished("length")
    assert started.reused_tokens < len(tokens)
    assert sum(started.restored.values()) <= started.reused_tokens


def test_what_was_read_ahead_stays_while_others_have_the_room(make, tmp_path):
    tokens = prompt(3, 250)
    store(make, tmp_path, tokens)
    tiers = tiers_of(tmp_path)
    engine = make(CRAMPED, tiers)
    read, fetch = [], tiers.pages.fetch
    tiers.pages.fetch = lambda keys, *rest: read.extend(keys) or fetch(keys, *rest)
    submit(engine, prompt(1, 60), 200)
    for i in range(3):
        submit(engine, prompt(30 + i, 10), 20 + 20 * i)
    for _ in range(8):
        tick(engine)
    asked, _ = submit(engine, tokens, 4)
    finish(engine)
    assert outcome(asked)[2] == Finished("length")
    assert len(read) <= 2 * len(tokens) // SMALL.page_size


def test_a_constrained_request_costs_nobody_the_step_that_runs_ahead(make):
    engine = make(replace(SMALL, max_num_seqs=2))
    submit(engine, prompt(1, 20), 60)
    scripted, _ = submit(engine, prompt(2, 20), 60, constraint=(script := Script([5, 9, 7] * 20, VOCAB)))
    for _ in range(6):
        tick(engine)
    order, steps, collect = [], engine.core.runner.steps, engine.core.collect

    def forward(step):
        return lambda *args: (order.append("dispatch"), step.forward(*args))[1]

    run = {bucket: replace(step, forward=forward(step)) for bucket, step in steps.run.items()}
    engine.core.runner.steps = replace(steps, run=run)
    engine.core.collect = lambda: (order.append("read"), collect())[1]
    for _ in range(4):
        tick(engine)
    assert order == ["dispatch", "read"] * 4
    engine.core.runner.steps, engine.core.collect = steps, collect
    finish(engine)
    assert outcome(scripted)[0] == script.tokens


def test_a_prompt_that_prefills_token_by_token_is_there_for_others_as_it_grows(make):
    engine = make(replace(SMALL, max_prefill_tokens=1, max_mixed_prefill_tokens=1))
    tokens = prompt(4, 60)
    submit(engine, tokens, 2)
    for _ in range(41):
        tick(engine)
    assert engine.core.memory.prefix_cache.peek(tokens) >= 40
    assert engine.counters.prefilled_tokens >= 40
    finish(engine)


def test_what_is_read_ahead_is_what_comes_next(make, tmp_path):
    short = prompt(41, 40)
    store(make, tmp_path, short)
    engine = make(replace(CRAMPED, max_num_seqs=1), tiers_of(tmp_path))
    submit(engine, prompt(1, 20), 60)
    for _ in range(3):
        tick(engine)
    for i in range(3):
        submit(engine, prompt(50 + i, 290), 2)
    submit(engine, short, 2)  # the last of those that wait, and the first to be admitted
    for waiting in engine.inbox.submissions:  # for as long: only what they take decides
        waiting.submitted = engine.inbox.submissions[0].submitted
    tick(engine)
    assert engine.core.in_line()[0].number == 5
    assert engine.core.restorer.looked_up(engine.core.in_line()[0])
    finish(engine)


def test_looking_at_what_is_cached_keeps_nothing_from_eviction(make):
    engine = make(SMALL)
    old, new = prompt(60, 40), prompt(61, 40)
    for tokens in (old, new):
        submit(engine, tokens, 1)
        finish(engine)
    engine.core.memory.prefix_cache.peek(old)
    engine.core.memory.prefix_cache.tree.evict(1)
    assert engine.core.memory.prefix_cache.peek(old) < engine.core.memory.prefix_cache.peek(new)


@pytest.mark.parametrize("at", range(1, 9))
def test_a_constraint_that_breaks_leaves_nothing_in_the_cache_that_nobody_has_said(make, at):
    class Breaks(Script):
        def accept(self, token):
            if self.at == at - 1:
                raise RuntimeError("a fault of the test")
            super().accept(token)

    tiers = tiers_of(None, host=64 << 20)
    engine = make(SMALL, tiers)
    tokens, script = prompt(5, 21), [7, 9, 11, 13, 15, 17, 19, 21, 23]
    asked, _ = submit(engine, tokens, 9, constraint=Breaks(script, VOCAB))
    finish(engine)
    assert isinstance(outcome(asked)[2], Failed)
    said = [*tokens, *script[: at - 1]]
    # The pass that ran ahead had computed a token that was never taken: a zero stands in its place.
    assert engine.core.memory.prefix_cache.peek(np.asarray([*said, 0], np.int32)) == len(said)
    assert tiers.writer.flush(60)
    root = root_key(b"fingerprint", 8, b"")
    unsaid = set(all_keys(root, np.asarray([*said, 0], np.int32), 8)) - set(
        all_keys(root, np.asarray(said, np.int32), 8)
    )
    assert unsaid
    assert not any(tiers.pages.tiers[0].contains_many(list(unsaid)))


def test_the_engine_rests_with_no_step_in_flight(make):
    engine = make(SMALL)
    first, _ = submit(engine, prompt(5, 20), 8)
    finish(engine)
    stop = outcome(first)[0][3]
    submit(engine, prompt(5, 20), 8, stop_ids=frozenset([stop]))
    finish(engine)
    assert engine.core.in_flight is None, "a step that nobody waits for would last until the next request"


@pytest.mark.parametrize("decoding", [False, True])
def test_holes_are_filled_in_the_store_also_while_another_decodes(make, tmp_path, decoding):
    tokens = prompt(3, 300)
    keys = store(make, tmp_path, tokens)
    holes, tiers = [keys[4], keys[5], keys[20]], tiers_of(tmp_path)
    disk = tiers.pages.tiers[0]
    disk.delete(holes)
    engine = make(SMALL, tiers)
    if decoding:
        submit(engine, prompt(9, 10), 200)
        for _ in range(5):
            tick(engine)
    submit(engine, tokens, 4)
    finish(engine)
    tiers.writer.flush()
    assert all(disk.contains_many(holes))


def test_a_request_is_admitted_once_the_writer_has_let_go_of_the_pages_it_needs(make, tmp_path):
    tiers, go = tiers_of(tmp_path, queue_bytes=1), threading.Event()
    disk = tiers.pages.tiers[0]
    put = disk.put_many
    disk.put_many = lambda items, stamps: (go.wait(60), put(items, stamps))
    engine = make(CRAMPED, tiers)
    submit(engine, prompt(2, 200), 2)
    while engine.inbox.submissions or engine.running or engine.waiting:
        tick(engine)
    assert engine.core.saver.pending_writes, "the writer is too slow"
    submit(engine, prompt(1, 20), 280)
    for _ in range(4):
        tick(engine)
    submit(engine, prompt(5, 150), 2)
    for _ in range(4):
        tick(engine)
    assert engine.waiting
    go.set()
    while engine.core.saver.pending_writes:
        assert tiers.writer.flush(60)
        tick(engine)
    tick(engine)
    assert not engine.waiting
    assert len(engine.running) == 2


def test_a_copy_that_fails_as_a_request_ends_costs_no_request_after_it(make, tmp_path):
    engine = make(SMALL, tiers_of(tmp_path))
    gather, faults = engine.core.saver.copies.gather, []

    def once(count):
        def run(pool, pages):
            if engine.core.saver.pending_writes and faults:
                raise RuntimeError(faults.pop())
            return gather[count](pool, pages)

        return run

    engine.core.saver.copies = replace(engine.core.saver.copies, gather={count: once(count) for count in gather})
    engine.start()
    faults.append("no memory for the copy")
    generate(engine, prompt(4, 100), 3)
    assert not faults, "it came as the request ended"
    for seed in range(10, 13):
        assert generate(engine, prompt(seed, 90), 5)[2] == Finished("length")
    engine.stop()
    assert not engine.core.memory.prefix_cache.live


def test_a_read_that_fails_is_computed_instead_and_costs_nobody_an_answer(make, tmp_path):
    tokens = prompt(3, 100)
    store(make, tmp_path, tokens)
    engine = make(SMALL, tiers_of(tmp_path))

    def load(*_):
        raise MemoryError("nowhere to put it")

    engine.core.restorer.load = load
    beside, _ = submit(engine, prompt(1, 20), 40)
    asked, _ = submit(engine, tokens, 4)
    finish(engine)
    assert [outcome(events)[2] for events in (beside, asked)] == [Finished("length")] * 2


def test_a_copy_that_cannot_be_compiled_is_done_without_and_costs_nobody_an_answer(make, tmp_path):
    tokens = prompt(3, 100)
    store(make, tmp_path, tokens)
    engine = make(SMALL, tiers_of(tmp_path))
    scatter, tried = engine.core.restorer.copies.scatter, []

    def broken(*_):
        tried.append(1)
        raise CompileError("no memory for it")

    scatter.update(dict.fromkeys(scatter, broken))
    beside, _ = submit(engine, prompt(1, 20), 40)
    asked, _ = submit(engine, tokens, 4)
    finish(engine)
    assert tried
    assert [outcome(events)[2] for events in (beside, asked)] == [Finished("length")] * 2


def test_a_caller_that_takes_no_events_ends_its_own_request_only(make):
    engine = make()
    beside, _ = submit(engine, prompt(1, 30), 60)
    loop = asyncio.new_event_loop()
    seen = []

    def emit(event):
        loop.call_soon_threadsafe(seen.append, event)

    engine.submit(GenerationRequest(prompt(3, 30), 200), emit)
    for _ in range(6):
        tick(engine)
    loop.close()
    finish(engine)
    assert outcome(beside)[2] == Finished("length")
    assert engine.counters.generated_tokens < 60 + 30


def test_a_step_that_fails_tells_all_though_one_cannot_be_told(make, monkeypatch):
    engine = make()

    def deaf(event):
        raise RuntimeError("gone")

    engine.submit(GenerationRequest(prompt(1, 30), 60), deaf)
    beside, _ = submit(engine, prompt(2, 30), 60)
    monkeypatch.setattr(engine.core, "collect", lambda: 1 / 0)
    engine.start()
    assert isinstance(outcome(beside)[2], Failed)
    monkeypatch.undo()
    assert generate(engine, prompt(5, 20), 2)[2] == Finished("length")
    engine.stop()


@pytest.mark.parametrize(
    ("count", "sampling", "named"),
    [
        (-1, SamplingParams(), "max_tokens is -1, expected 0 to"),
        (1, SamplingParams(seed=2**32), "seed is 4294967296, expected 0 to 4294967295"),
        (1, SamplingParams(top_k=2**31), "top_k is 2147483648"),
    ],
)
def test_numbers_that_no_step_can_take_are_refused_by_name(make, count, sampling, named):
    engine = make()
    with pytest.raises(ValueError, match=named):
        submit(engine, prompt(1, 8), count, sampling=sampling)
    assert not tick(engine)


def test_a_cold_prompt_is_not_passed_for_long_by_cached_ones(make):
    """Four callers ask again and again for answers to cached prompts, with room for two at a time."""
    engine = make(replace(SMALL, max_num_seqs=2))
    cached = [prompt(100 + i, 200) for i in range(4)]
    for tokens in cached:
        submit(engine, tokens, 1)
    finish(engine)
    order, cold = [], prompt(7, 300)

    def asks_again(i):
        def emit(event):
            if isinstance(event, Started):
                order.append(i)
            elif isinstance(event, Finished):
                engine.submit(GenerationRequest(cached[i], 20), asks_again(i))

        return emit

    for i in range(4):
        engine.submit(GenerationRequest(cached[i], 20), asks_again(i))
    while len(order) < 20:
        tick(engine)
    asked, _ = submit(engine, cold, 1)
    before = len(order)
    while not any(isinstance(event, TokenEvent) for event in list(asked.queue)):
        tick(engine)
        assert len(order) - before < 40, "each of the others has passed it ten times"
