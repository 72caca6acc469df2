"""Reuse is exact: greedy output with the prefix store equals greedy output without it, whatever else is going on."""

import queue
import threading
from contextlib import contextmanager
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from serve.engine.buckets import SamplingParams
from serve.engine.engine import Engine
from serve.engine.inbox import Overloaded
from serve.engine.request import Failed, Finished, GenerationRequest, TokenEvent
from serve.engine.settings import EngineSettings
from tests.helpers.forced_answers import Script
from tests.helpers.tiny_engine import CRAMPED, SMALL, VOCAB, assert_same_or_tied, generate, outcome, reference, submit


@pytest.fixture(scope="module")
def engine(model):
    config, params = model
    running = Engine(params, config, SMALL)
    running.start()
    yield running
    running.stop()


def family(rng, count, shared=90):
    """Prompts that share prefixes, branch, and part in the middle of pages."""
    trunk = rng.integers(3, VOCAB, shared)
    prompts = []
    for _ in range(count):
        base = trunk if not prompts or rng.random() < 0.5 else prompts[rng.integers(len(prompts))]
        cut = int(rng.integers(1, len(base) + 1))
        prompts.append(np.concatenate([base[:cut], rng.integers(3, VOCAB, rng.integers(1, 40))])[:200])
    return prompts


@pytest.mark.parametrize("seed", range(4))
def test_greedy_output_with_reuse_equals_output_without(engine, model, seed, record_property):
    rng, known, flips, reused = np.random.default_rng(seed), {}, [], 0
    for prompt in family(rng, 12):
        tokens, started, _ = generate(engine, prompt)
        reused += started.reused_tokens
        assert_same_or_tied(model, prompt, tokens, reference(model, prompt, len(tokens), known), flips)
    record_property("flips", len(flips))
    print(f"flips: {len(flips)} of 12 prompts")
    assert reused > 0
    engine.core.memory.prefix_cache.check()


@pytest.mark.parametrize("seed", range(2))
def test_concurrent_requests_with_evictions_and_preemptions_are_exact(engine, model, seed):
    """More prompts at once than the pool holds, so pages are evicted and sequences preempted on the way."""
    rng, known, flips = np.random.default_rng(50 + seed), {}, []
    prompts = [*family(rng, 8, shared=150), *(rng.integers(3, VOCAB, 180) for _ in range(4))]
    evicted = engine.core.memory.prefix_cache.stats().pages_evicted
    pending = [(prompt, submit(engine, prompt, 40)[0]) for prompt in prompts]
    for prompt, events in pending:
        tokens, _, last = outcome(events)
        assert last == Finished("length")
        assert_same_or_tied(model, prompt, tokens, reference(model, prompt, len(tokens), known), flips)
    assert engine.core.memory.prefix_cache.stats().pages_evicted > evicted
    print(f"flips: {len(flips)} of {len(prompts)} prompts")
    engine.core.memory.prefix_cache.check()


@pytest.mark.parametrize("length", [1, 5, 32, 33, 170])
def test_a_request_for_no_tokens_computes_its_prompt_for_the_next_one(engine, model, length):
    prompt = np.random.default_rng(700 + length).integers(3, VOCAB, length)
    generated = engine.counters.generated_tokens
    for reused in (0, length - 1):  # the second time, one token runs as if it decoded
        tokens, started, last = generate(engine, prompt, 0)
        assert (tokens, last) == ([], Finished("length"))
        assert (started.prompt_tokens, started.reused_tokens) == (length, reused)
    assert engine.counters.generated_tokens == generated
    tokens, started, _ = generate(engine, prompt, 8)
    assert started.reused_tokens == length - 1
    assert_same_or_tied(model, prompt, tokens, reference(model, prompt, 8, {}), [])
    engine.core.memory.prefix_cache.check()


def test_a_full_pool_preempts_and_resumes(model):
    config, params = model
    engine = Engine(params, config, CRAMPED)
    engine.start()
    rng, known, flips = np.random.default_rng(9), {}, []
    prompts = [rng.integers(3, VOCAB, 70) for _ in range(4)]
    pending = [(prompt, submit(engine, prompt, 120)[0]) for prompt in prompts]
    for prompt, events in pending:
        tokens, _, last = outcome(events)
        assert last == Finished("length")
        assert len(tokens) == 120
        assert_same_or_tied(model, prompt, tokens, reference(model, prompt, 120, known), flips)
    assert engine.counters.preemptions > 0
    assert engine.core.memory.prefix_cache.stats().pages_in_use == 0
    engine.core.memory.prefix_cache.check()
    engine.stop()


def test_a_constraint_outlives_preemption_and_takes_each_token_once(model):
    config, params = model
    engine = Engine(params, config, CRAMPED)
    engine.start()
    rng, pending = np.random.default_rng(10), []
    for _ in range(4):
        script = Script(rng.integers(3, VOCAB, 120).tolist(), VOCAB)
        pending.append((script, submit(engine, rng.integers(3, VOCAB, 70), 120, constraint=script)[0]))
    for script, events in pending:
        tokens, _, last = outcome(events)
        assert (tokens, last) == (script.tokens, Finished("length"))
        assert script.at == 120
    assert engine.counters.preemptions > 0
    assert engine.core.memory.prefix_cache.stats().pages_in_use == 0
    engine.stop()


def test_a_constraint_that_allows_nothing_ends_its_request_alone(engine):
    class Nothing(Script):
        def mask(self):
            return np.zeros_like(super().mask())

    free, _ = submit(engine, [5, 6, 7], 40)
    _, started, last = generate(engine, [5, 6, 8], constraint=Nothing([9], VOCAB))
    assert (started, last) == (None, Failed("AssertionError: expected token 9, got 0"))
    assert outcome(free)[2] == Finished("length")
    assert engine.core.memory.prefix_cache.stats().pages_in_use == 0


def test_prompt_and_generated_tokens_are_reused_by_the_next_turn(engine):
    prompt = np.random.default_rng(21).integers(3, VOCAB, 61)
    tokens, _, _ = generate(engine, prompt, 10)
    turn = [*prompt, *tokens, 7, 8, 9]
    _, started, _ = generate(engine, turn)
    # The last sampled token never ran through the model; everything before it did.
    assert started.reused_tokens == len(prompt) + len(tokens) - 1


def test_a_mismatch_inside_a_page_reuses_every_token_before_it(engine):
    prompt = np.random.default_rng(22).integers(3, VOCAB, 60)
    generate(engine, prompt, 1)
    changed = prompt.copy()
    changed[37] = (changed[37] - 3 + 1) % (VOCAB - 3) + 3
    assert generate(engine, changed, 1)[1].reused_tokens == 37


def test_salts_do_not_share_prefixes(engine):
    prompt = np.random.default_rng(23).integers(3, VOCAB, 50)
    generate(engine, prompt, 1, salt=b"a")
    assert generate(engine, prompt, 1, salt=b"b")[1].reused_tokens == 0
    assert generate(engine, prompt, 1, salt=b"a")[1].reused_tokens == 49


def test_simultaneous_requests_share_the_prefill_of_a_common_prefix(model):
    config, params = model
    engine = Engine(params, config, SMALL)
    prompt = np.random.default_rng(24).integers(3, VOCAB, 200)
    pending = [submit(engine, [*prompt, i], 2)[0] for i in range(4)]
    engine.start()
    started = [outcome(events)[1] for events in pending]
    engine.stop()
    assert engine.counters.prefilled_tokens < 1.2 * len(prompt)
    assert sum(s.prompt_tokens - s.reused_tokens for s in started) < 1.2 * len(prompt) + 8


@contextmanager
def dispatches(engine):
    """The shapes of the steps that the engine dispatches from here on, in their order."""
    dispatched, steps = [], engine.core.runner.steps

    def noted(bucket, step):
        def forward(*args):
            dispatched.append(bucket)
            return step.forward(*args)

        return replace(step, forward=forward)

    engine.core.runner.steps = replace(steps, run={bucket: noted(bucket, step) for bucket, step in steps.run.items()})
    yield dispatched
    engine.core.runner.steps = steps


def test_the_next_step_is_dispatched_before_a_token_is_read(engine):
    """All but the last token of an answer, after which there is nothing to run."""
    seen, done = [], threading.Event()

    def emit(event):
        seen.append(len(dispatched)) if isinstance(event, TokenEvent) else None
        done.set() if isinstance(event, Finished) else None

    with dispatches(engine) as dispatched:
        engine.submit(GenerationRequest(np.arange(3, 20, dtype=np.int32), 5), emit)
        assert done.wait(60)
    assert seen == [2, 3, 4, 5, 5]


def test_a_token_that_ends_the_answer_is_in_the_cache_all_the_same(engine):
    prompt = np.random.default_rng(30).integers(3, VOCAB, 45)
    answer, _, _ = generate(engine, prompt, 6)
    stop = answer[-1]
    shorter = answer[: answer.index(stop)]
    salt = {"salt": b"stopped"}
    assert generate(engine, prompt, 30, stop_ids=frozenset([stop]), **salt)[0] == shorter
    assert generate(engine, [*prompt, *shorter, stop, 7], 1, **salt)[1].reused_tokens == len(prompt) + len(shorter) + 1


def test_a_prompt_is_prefilled_in_the_steps_of_those_that_decode(engine, model):
    rng, known, flips = np.random.default_rng(31), {}, []
    prompts = [rng.integers(3, VOCAB, 20), rng.integers(3, VOCAB, 100)]
    first, _ = submit(engine, prompts[0], 150)
    while not isinstance(first.get(timeout=60), TokenEvent):
        pass
    with dispatches(engine) as dispatched:
        second, _, _ = generate(engine, prompts[1], 20)
    rest = outcome(first)[0]
    chunks = [bucket for bucket in dispatched if bucket.chunk > 1]
    assert len(chunks) == -(-100 // SMALL.max_mixed_prefill_tokens)
    assert all(bucket.decode_seqs for bucket in chunks)
    for prompt, tokens in ((prompts[0], rest), (prompts[1], second)):
        expected = reference(model, prompt, 150 if tokens is rest else 20, known)
        assert_same_or_tied(model, prompt, tokens, expected[-len(tokens) :], flips)


def test_a_prompt_that_is_cached_passes_a_long_one_that_is_not(model):
    config, params = model
    engine = Engine(params, config, EngineSettings(**{**vars(SMALL), "max_num_seqs": 1}))
    engine.start()
    rng, order = np.random.default_rng(32), queue.Queue()
    cached = rng.integers(3, VOCAB, 280)
    generate(engine, cached, 1)
    running, _ = submit(engine, rng.integers(3, VOCAB, 20), 60)
    for name, prompt in (("long", rng.integers(3, VOCAB, 280)), ("cached", cached)):
        engine.submit(GenerationRequest(prompt, 1), lambda e, n=name: order.put(n) if isinstance(e, Finished) else None)
    outcome(running)
    assert [order.get(timeout=60) for _ in range(2)] == ["cached", "long"]
    engine.stop()


@pytest.fixture(scope="module")
def speculating(model):
    """An engine with speculative decoding."""
    config, params = model
    running = Engine(params, config, replace(SMALL, speculative_tokens=4))
    running.start()
    yield running
    running.stop()


@pytest.mark.parametrize("seed", range(3))
def test_drafts_change_no_token_of_greedy_answers(speculating, model, seed):
    rng, known, flips = np.random.default_rng(60 + seed), {}, []
    prompts = [np.tile(rng.integers(3, VOCAB, 9), 8), *family(rng, 6, shared=120)]
    pending = [(prompt, submit(speculating, prompt, 60)[0]) for prompt in prompts]
    for prompt, events in pending:
        tokens, _, last = outcome(events)
        assert last == Finished("length")
        assert_same_or_tied(model, prompt, tokens, reference(model, prompt, 60, known), flips)
    print(f"flips: {len(flips)} of {len(prompts)} prompts")
    assert 0 < speculating.counters.accepted_tokens < speculating.counters.draft_tokens
    assert speculating.core.memory.prefix_cache.stats().pages_in_use == 0
    speculating.core.memory.prefix_cache.check()


def test_drafts_change_no_token_that_is_sampled_at_random(engine, speculating):
    prompt, before = np.tile(np.arange(3, 12), 9), speculating.counters.draft_tokens
    for seed in range(4):
        warm = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, seed=seed)
        answers = [generate(e, prompt, 50, sampling=warm, salt=b"drawn")[0] for e in (engine, speculating)]
        assert answers[0] == answers[1]
    assert speculating.counters.draft_tokens > before


def test_an_answer_that_repeats_itself_takes_fewer_steps_with_drafts(speculating, model):
    """Until it does, greedy output of a small random model falls into a loop."""
    prompt = np.tile(np.arange(20, 25), 20)
    looping = [*prompt, *generate(speculating, prompt, 100)[0]]
    with dispatches(speculating) as dispatched:
        tokens, _, _ = generate(speculating, looping, 60)
    assert len(tokens) == 60
    assert len(dispatched) < 40


def test_right_draft_tokens_after_a_stop_id_are_not_part_of_the_answer(engine, speculating):
    prompt = np.tile(np.arange(20, 25), 20)
    looping = [*prompt, *generate(engine, prompt, 100)[0]]
    free = generate(engine, looping, 40)[0]
    for stop in set(free[1:6]):
        tokens, _, last = generate(speculating, looping, 40, stop_ids=frozenset([stop]))
        assert (tokens, last) == (free[: free.index(stop)], Finished("stop"))


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(engine):
    prompt = np.random.default_rng(25).integers(3, VOCAB, 30)
    free, _, _ = generate(engine, prompt, 12)
    stop = free[5]
    tokens, _, last = generate(engine, prompt, 12, stop_ids=frozenset({stop}))
    assert last == Finished("stop")
    assert tokens == free[: free.index(stop)]


def test_a_seed_gives_the_same_answer_alone_and_batched_with_others(engine):
    prompt = np.random.default_rng(26).integers(3, VOCAB, 40)
    warm = SamplingParams(temperature=1.0, top_p=0.95, seed=11)
    alone, _, _ = generate(engine, prompt, 20, sampling=warm)
    others = [submit(engine, np.random.default_rng(i).integers(3, VOCAB, 50 + i), 20)[0] for i in range(3)]
    together, _, _ = generate(engine, prompt, 20, sampling=warm)
    for events in others:
        outcome(events)
    assert alone == together
    assert alone != generate(engine, prompt, 20, sampling=SamplingParams(temperature=1.0, top_p=0.95, seed=12))[0]


def test_max_tokens_is_clamped_to_the_room_left(engine):
    tokens, _, last = generate(engine, np.full(310, 5), 32_000)
    assert (len(tokens), last) == (10, Finished("length"))


@pytest.mark.parametrize("length", [0, 320, 1000])
def test_a_prompt_without_room_for_one_token_is_refused(engine, length):
    with pytest.raises(ValueError, match="expected 1 to 319"):
        engine.submit(GenerationRequest(np.full(length, 5, np.int32), 1), lambda event: None)


def test_a_full_queue_refuses_and_recovers(model):
    config, params = model
    engine = Engine(params, config, EngineSettings(**{**vars(SMALL), "max_queue": 2}))
    pending = [submit(engine, [5, 6, 7, i], 2)[0] for i in range(2)]
    with pytest.raises(Overloaded):
        submit(engine, [1, 2], 2)
    engine.start()
    assert [outcome(events)[2] for events in pending] == [Finished("length")] * 2
    assert generate(engine, [1, 2], 2)[2] == Finished("length")
    engine.stop()


def test_a_cancelled_request_leaves_its_work_in_the_store_and_holds_no_page(engine):
    prompt = np.random.default_rng(27).integers(3, VOCAB, 100)
    events, number = submit(engine, prompt, 200)
    while not isinstance(events.get(timeout=60), TokenEvent):
        pass
    engine.cancel(number)
    _, started, _ = generate(engine, prompt, 1)
    assert started.reused_tokens == 99
    assert engine.core.memory.prefix_cache.stats().pages_in_use == 0


def test_a_step_that_raises_fails_what_was_running_and_nothing_else(model, monkeypatch):
    config, params = model
    engine = Engine(params, config, SMALL)
    broken, dispatch = threading.Event(), engine.core.dispatch

    def fail_once(plan):
        if not broken.is_set():
            broken.set()
            raise RuntimeError("injected")
        return dispatch(plan)

    monkeypatch.setattr(engine.core, "dispatch", fail_once)
    engine.start()
    assert generate(engine, [5, 6, 7], 2)[2] == Failed("RuntimeError: injected")
    assert generate(engine, [5, 6, 7], 2)[2] == Finished("length")
    assert engine.core.memory.prefix_cache.stats().pages_in_use == 0
    engine.stop()


def test_a_request_that_breaks_its_admission_fails_alone(model, monkeypatch):
    config, params = model
    engine = Engine(params, config, SMALL)
    match = engine.core.memory.prefix_cache.match

    def refuse(tokens, salt, head, use):
        if salt == b"bad":
            raise RuntimeError("injected")
        return match(tokens, salt, head, use)

    monkeypatch.setattr(engine.core.memory.prefix_cache, "match", refuse)
    first, second = submit(engine, [5, 6, 7], 2, salt=b"bad")[0], submit(engine, [5, 6, 7], 2)[0]
    engine.start()
    assert outcome(first)[2] == Failed("RuntimeError: injected")
    assert outcome(second)[2] == Finished("length")
    engine.stop()


def test_a_stopped_engine_fails_what_it_holds_and_refuses_more(model):
    config, params = model
    engine = Engine(params, config, SMALL)
    pending = [submit(engine, np.full(100 + i, 5), 200)[0] for i in range(6)]
    engine.start()
    engine.stop()
    assert [outcome(events)[2] for events in pending] == [Failed("the engine has stopped", temporary=True)] * 6
    with pytest.raises(Overloaded, match="stopped"):
        submit(engine, [1, 2], 2)


def test_a_lost_pool_is_replaced(model, monkeypatch):
    """A step that raises after its donation took the pool along: the engine goes on with an empty one."""
    config, params = model
    engine = Engine(params, config, SMALL)
    lost, dispatch = threading.Event(), engine.core.dispatch

    def lose_once(plan):
        dispatched = dispatch(plan)
        if not lost.is_set():
            lost.set()
            engine.core.memory.pool.k.delete()
            raise RuntimeError("injected")
        return dispatched

    engine.start()
    expected = generate(engine, [5, 6, 7], 4)[0]
    monkeypatch.setattr(engine.core, "dispatch", lose_once)
    assert generate(engine, [5, 6, 7, 8, 9], 4)[2] == Failed("RuntimeError: injected")
    tokens, started, _ = generate(engine, [5, 6, 7], 4)
    assert (tokens, started.reused_tokens) == (expected, 0)
    engine.stop()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(1, 12), st.booleans()), max_size=8))
def test_no_page_leaks_whatever_is_submitted_and_cancelled(engine, plan):
    pending = []
    for trunk, length, max_tokens, cancelled in plan:
        events, number = submit(engine, np.random.default_rng(trunk).integers(3, VOCAB, 60)[:length], max_tokens)
        if cancelled:
            engine.cancel(number)
        else:
            pending.append(events)
    for events in pending:
        assert outcome(events)[2] == Finished("length")
    generate(engine, [5, 6], 1)  # by now the cancellations have been seen
    assert engine.core.memory.prefix_cache.stats().pages_in_use == 0
    engine.core.memory.prefix_cache.check()
