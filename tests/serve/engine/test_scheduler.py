"""Who is admitted, who runs and who gives way: short before long, cached before cold, and no request waits for ever."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.fairness import gives_way
from serve.engine.scheduler import (
    CHOSEN_FROM,
    ScheduledSequence,
    admission_order,
    draft,
    fits,
    most_urgent,
    narrowed,
    next_prefill,
    plan_step,
    response_ratio,
)
from serve.engine.sequence import DECODING, PREFILLING, RESTORING, Sequence
from serve.engine.settings import EngineSettings
from tests.helpers.forced_answers import Script
from tests.helpers.sequences import lease_of, running, waiting

SETTINGS = EngineSettings(num_pages=10, max_model_len=32, max_prefill_tokens=8, max_mixed_prefill_tokens=3)


@dataclass(frozen=True)
class Request:
    """One that came at a time and takes a time, in seconds."""

    came: float
    takes: float


def chosen(requests: list[Request], now: float) -> Request:
    return most_urgent(requests, lambda r: now - r.came, lambda r: r.takes)


def test_a_short_request_passes_a_long_one_that_came_just_before() -> None:
    long, short = Request(0.0, 10.0), Request(0.1, 0.1)
    assert chosen([long, short], 0.2) is short


def test_a_long_request_that_has_waited_passes_a_short_one_that_comes() -> None:
    long, short = Request(0.0, 10.0), Request(100.0, 0.1)
    assert chosen([short, long], 100.1) is long


def test_of_equals_the_first_goes_first() -> None:
    first, second = Request(0.0, 1.0), Request(0.0, 1.0)
    assert chosen([first, second], 5.0) is first


def test_who_takes_no_time_goes_at_once_and_who_takes_for_ever_has_no_claim() -> None:
    assert response_ratio(0.0, 0.0) == float("inf")
    assert response_ratio(5.0, float("inf")) == 1


@given(takes=st.floats(0.001, 60), rival=st.floats(0.001, 60))
def test_nobody_starves_behind_an_endless_stream_of_others(takes: float, rival: float) -> None:
    """A new rival comes whenever the one before is done; the claim of who waits grows, the newcomer's is always 1."""
    patient, now, passed = Request(0.0, takes), 0.0, 0
    while chosen([Request(now, rival), patient], now) is not patient:
        now += rival
        passed += 1
    assert passed <= 1


def test_the_next_request_is_chosen_among_those_that_have_waited_longest() -> None:
    queue = [waiting(number, prompt=20) for number in range(CHOSEN_FROM)] + [waiting(99, prompt=2)]
    order = admission_order(queue, 5.0, lambda s: float(s.length))
    assert [s.number for s in order] == list(range(CHOSEN_FROM))
    order = admission_order(queue[1:], 5.0, lambda s: float(s.length))
    assert [s.number for s in order] == [99, *range(1, CHOSEN_FROM)]


def test_a_sequence_alone_always_fits_and_others_are_promised_their_prompts() -> None:
    assert fits(1000, [], free_tokens=0)
    other = running(PREFILLING, prompt=10)  # its lease has room for 12 tokens
    assert fits(6, [other], free_tokens=6)
    growing = waiting(2, prompt=20)
    growing.admit(lease_of(0), now=1.0)  # 20 tokens are still to come
    assert not fits(6, [other, growing], free_tokens=25)
    assert fits(6, [other, growing], free_tokens=26)


def test_the_youngest_gives_way() -> None:
    assert gives_way([running(PREFILLING, number=n) for n in (3, 7, 5)]).number == 7


def test_a_sequence_that_waits_for_its_pages_does_not_prefill() -> None:
    restoring, prefilling = running(RESTORING, 1), running(PREFILLING, 2)
    assert next_prefill([restoring], 1.0, lambda start, stop: 1.0) is None
    assert next_prefill([restoring, prefilling], 1.0, lambda start, stop: 1.0) is prefilling


def test_of_prompts_the_one_with_the_highest_response_ratio_prefills() -> None:
    long, short = running(PREFILLING, 1, prompt=30), running(PREFILLING, 2, prompt=5)
    assert next_prefill([long, short], 1.0, lambda start, stop: float(stop - start)) is short
    late = running(PREFILLING, 3, prompt=5, submitted=99.0)
    assert next_prefill([long, late], 100.0, lambda start, stop: float(stop - start)) is long


def test_a_chunk_ends_where_a_stored_page_begins() -> None:
    prefill = running(PREFILLING, prompt=30)
    assert plan_step([], prefill, 5, SETTINGS)[0].count == 5
    assert plan_step([], prefill, 1 << 30, SETTINGS)[0].count == 8
    assert plan_step([], prefill, 0, SETTINGS)[0].count == 8


def test_draft_tokens_follow_a_repetition_and_never_exceed_what_may_still_be_sampled() -> None:
    assert draft(waiting(prompt=12, answer=6), 4) == (0, 1, 2, 0)
    assert draft(waiting(prompt=12, answer=3), 4) == (0, 1)
    assert draft(waiting(prompt=12), 0) == ()
    assert draft(waiting(prompt=12, constraint=Script([1], 8)), 4) == ()


def test_only_steps_without_a_chunk_run_drafts() -> None:
    settings = EngineSettings(num_pages=10, max_model_len=32, speculative_tokens=2)
    decoding = [running(DECODING, prompt=12)]
    assert plan_step(decoding, None, 0, settings)[0].draft_tokens
    assert not any(each.draft_tokens for each in plan_step(decoding, running(PREFILLING, 2), 0, settings))


RUNNING = st.lists(
    st.tuples(st.sampled_from([DECODING, PREFILLING, RESTORING]), st.integers(3, 30), st.booleans(), st.floats(0, 9)),
    max_size=8,
)


@given(kinds=RUNNING, before_page=st.integers(0, 12), rate=st.floats(0.1, 100))
def test_every_plan_runs_all_that_decode_and_one_chunk_within_the_limits(
    kinds: list[tuple], before_page: int, rate: float
) -> None:
    sequences: list[Sequence] = [
        running(state, number, prompt, in_flight and state is DECODING, submitted)
        for number, (state, prompt, in_flight, submitted) in enumerate(kinds)
    ]
    before = [(s.state, s.computed, s.length, s.lease) for s in sequences]
    decoding = [s for s in sequences if s.decodes]
    prefill = next_prefill(sequences, 10.0, lambda start, stop: (stop - start) / rate)
    plan = plan_step(decoding, prefill, before_page, SETTINGS)
    assert [each.sequence for each in plan if each.sequence.state is DECODING] == decoding
    chunks = [each for each in plan if each.sequence.state is not DECODING]
    assert [each.sequence for each in chunks] == ([prefill] if prefill else [])
    assert (prefill is None) == (not any(s.state is PREFILLING for s in sequences))
    if prefill:
        most = SETTINGS.max_mixed_prefill_tokens if decoding else SETTINGS.max_prefill_tokens
        assert plan[0].sequence is prefill, "a chunk comes first in its batch"
        assert 1 <= plan[0].count <= min(most, prefill.pending, before_page or prefill.pending)
    assert all(each.count == 1 for each in plan if each.sequence.state is DECODING)
    assert [(s.state, s.computed, s.length, s.lease) for s in sequences] == before, "planning changes nothing"
    assert np.all([s.remaining_tokens > 0 for s in sequences])


def planned(*counts: int, prefill: bool, drafts: int = 0) -> list[ScheduledSequence]:
    """A plan: a chunk first where one prefills, then sequences that decode."""
    states = [PREFILLING if prefill and not i else DECODING for i in range(len(counts))]
    return [
        ScheduledSequence(running(state, i), count, (1,) * drafts)
        for i, (state, count) in enumerate(zip(states, counts, strict=True), 1)
    ]


def test_a_plan_that_a_compiled_shape_fits_stays_whole() -> None:
    plan = planned(3, 1, 1, prefill=True)
    assert narrowed(plan, lambda _: True, chunk_was_last=True) == plan
    assert narrowed([], lambda _: False, chunk_was_last=True) == []


def test_while_no_mixed_shape_is_compiled_a_chunk_and_those_that_decode_take_turns() -> None:
    plan, last, ran = planned(3, 1, 1, prefill=True), False, []
    for _ in range(4):
        part = narrowed(plan, lambda _: False, last)
        last = part[0].sequence.state is PREFILLING
        ran.append(part)
    assert ran == [plan[:1], plan[1:]] * 2


def test_drafts_are_left_out_before_anything_waits() -> None:
    part = narrowed(planned(1, 1, prefill=False, drafts=2), lambda _: False, chunk_was_last=False)
    assert [(each.count, each.draft_tokens) for each in part] == [(1, ())] * 2


def test_what_cannot_be_narrowed_waits_for_its_shape() -> None:
    for plan in (planned(3, prefill=True), planned(1, 1, prefill=False)):
        assert narrowed(plan, lambda _: False, chunk_was_last=True) == plan
