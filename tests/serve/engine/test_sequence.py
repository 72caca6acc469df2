"""A sequence's states and invariants: what its methods refuse, and what they keep up whatever is called."""

from __future__ import annotations

import ast
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from serve.engine.sequence import (
    DECODING,
    ENDED,
    NEXT_STATES,
    PREFILLING,
    RESTORING,
    WAITING,
    InFlightToken,
    SequenceState,
)
from tests.helpers.sequences import PAGE, lease_of, running, waiting


def test_a_sequence_goes_through_its_states_to_its_last_token() -> None:
    sequence, states = waiting(prompt=10, answer=2), []
    sequence.admit(lease_of(5, reused=5), now=1.0)
    states.append(sequence.state)
    sequence.wait_for_pages(True)
    states.append(sequence.state)
    sequence.hold(lease_of(12, reused=5))
    sequence.mark_restored(8, {"disk": 3})
    sequence.wait_for_pages(False)
    states.append(sequence.state)
    assert not sequence.dispatch(1, InFlightToken(1, 0))
    states.append(sequence.state)
    assert sequence.dispatch(1, InFlightToken(2, 0))
    sequence.collect(2)
    sequence.accept_token(7)
    states.append(sequence.state)
    sequence.leave(ENDED)
    states.append(sequence.state)
    assert states == [PREFILLING, RESTORING, PREFILLING, DECODING, DECODING, ENDED]
    assert (sequence.reused, sequence.restored, sequence.length) == (8, {"disk": 3}, 11)


def test_a_prompt_that_is_cached_but_for_its_last_token_decodes_at_once() -> None:
    sequence = waiting(prompt=10)
    sequence.admit(lease_of(9, reused=9), now=1.0)
    assert sequence.state is DECODING
    assert sequence.decodes


def test_a_preempted_sequence_waits_without_pages_and_counts_no_reuse_twice() -> None:
    sequence = waiting(prompt=10)
    sequence.admit(lease_of(8, reused=8), now=1.0)
    sequence.restored.update({"disk": 4})
    assert sequence.leave(WAITING).reused == 8
    assert (sequence.state, sequence.lease, sequence.computed) == (WAITING, None, 0)
    sequence.admit(lease_of(4, reused=4, number=2), now=2.0)
    assert (sequence.started, sequence.reused, sequence.restored) == (1.0, 4, {})


def test_no_token_is_computed_that_the_lease_does_not_cover() -> None:
    sequence = waiting(prompt=10)
    sequence.admit(lease_of(4, reused=4), now=1.0)
    with pytest.raises(AssertionError, match="a lease covers what is computed"):
        sequence.dispatch(1, InFlightToken(1, 0))


def test_one_unknown_token_runs_at_most() -> None:
    sequence = running(DECODING)
    sequence.hold(lease_of(16))
    sequence.dispatch(1, InFlightToken(1, 0))
    sequence.dispatch(1, InFlightToken(2, 0))
    with pytest.raises(AssertionError, match="one unknown token runs at most"):
        sequence.dispatch(1, InFlightToken(3, 0))


def test_a_token_in_flight_is_not_lost_by_preemption_and_may_be_by_cancellation() -> None:
    sequence = running(DECODING, in_flight=True)
    with pytest.raises(AssertionError, match="a token in flight would be lost"):
        sequence.leave(WAITING)
    sequence.leave(ENDED)
    assert sequence.in_flight is None


def test_a_collected_step_takes_no_token_of_a_later_one_away() -> None:
    sequence = running(DECODING)
    sequence.dispatch(1, InFlightToken(1, 0))
    sequence.dispatch(1, InFlightToken(2, 3))
    sequence.collect(1)
    assert sequence.in_flight == InFlightToken(2, 3)
    sequence.collect(2)
    assert sequence.in_flight is None


def test_what_ended_stays_ended() -> None:
    sequence = waiting()
    sequence.end()
    sequence.end()
    with pytest.raises(AssertionError, match="does not lead to"):
        sequence.admit(lease_of(0), now=1.0)


@pytest.mark.parametrize("state", [WAITING, RESTORING, PREFILLING, DECODING])
def test_every_state_leads_to_the_end(state: SequenceState) -> None:
    assert ENDED in NEXT_STATES[state]


def test_no_other_module_writes_to_what_a_sequence_holds() -> None:
    engine = Path(__file__).parents[3] / "serve" / "engine"
    held = {"computed", "length", "lease", "state"}
    writers = {
        (path.name, node.attr)
        for path in engine.glob("*.py")
        if path.name != "programs.py"  # whose programs have a state of their own
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in held
    }
    assert writers == {("sequence.py", name) for name in held}


def test_pages_of_others_are_not_saved_and_own_ones_are() -> None:
    sequence = waiting(prompt=30)
    sequence.admit(lease_of(5, reused=5), now=1.0)
    sequence.hold(lease_of(30, reused=5))
    sequence.dispatch(9, InFlightToken(1, 0))  # up to token 14: pages 1 and 2 are its own
    sequence.mark_cached(21)  # another has computed up to here
    assert sequence.seal() == 21 // PAGE
    assert sequence.unsaved == [1, 2]
    sequence.mark_saved([1])
    assert sequence.unsaved == [2]


STEPS = st.lists(st.sampled_from(["prefill", "wait", "cached", "decode", "collect", "preempt"]), max_size=40)


@given(steps=STEPS, prompt=st.integers(2, 30), chunk=st.integers(1, 9))
def test_whatever_happens_in_order_keeps_the_invariants(steps: list[str], prompt: int, chunk: int) -> None:
    """Each operation is tried where it may be; all invariants are asserted inside."""
    sequence, number = waiting(prompt=prompt, answer=12), 0
    for name in steps:
        if sequence.state is WAITING:
            sequence.admit(lease_of(0), now=1.0)
            sequence.hold(lease_of(len(sequence.tokens)))
        if name == "prefill" and sequence.state is PREFILLING:
            number += 1
            sequence.dispatch(min(chunk, sequence.pending), InFlightToken(number, 0))
        elif name == "wait":
            sequence.wait_for_pages(sequence.state is PREFILLING)
        elif name == "cached" and sequence.pending > 1:
            sequence.mark_cached(sequence.computed + 1)
        elif name == "decode" and sequence.decodes and sequence.pending >= 0:
            number += 1
            sequence.dispatch(1, InFlightToken(number, 0))
        elif name == "collect" and sequence.in_flight:
            sequence.accept_token(5)
            if sequence.pending > 0:
                sequence.collect(number)
            if not sequence.remaining_tokens:
                sequence.leave(ENDED)
                return
        elif name == "preempt" and sequence.in_flight is None:
            sequence.forget_unknown()
            sequence.leave(WAITING)
            assert sequence.computed == 0
        decoding = sequence.lease is not None and sequence.pending <= 1
        assert (sequence.state is DECODING) == decoding
