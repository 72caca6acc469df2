"""Sequences without an engine, in any state."""

from __future__ import annotations

import numpy as np

from cache.pool import pages_for
from cache.prefix_cache import Lease
from serve.engine.request import Constraint, GenerationRequest
from serve.engine.sequence import DECODING, InFlightToken, Sequence, SequenceState

PAGE = 4


def lease_of(length: int, reused: int = 0, number: int = 1) -> Lease:
    """A lease with room for `length` tokens, as if extended; just matched where `length` equals `reused`."""
    pages = pages_for(length, PAGE)
    room = length if length == reused else pages * PAGE
    return Lease(number, np.arange(pages, dtype=np.int32), room, reused, b"")


def waiting(
    number: int = 1, prompt: int = 10, answer: int = 6, submitted: float = 0.0, constraint: Constraint | None = None
) -> Sequence:
    """A sequence that was just submitted."""
    tokens = np.zeros(prompt + answer, np.int32)
    tokens[:prompt] = np.arange(prompt) % 3  # repeats itself, so that there are drafts
    request = GenerationRequest(tokens[:prompt], answer, constraint=constraint)
    return Sequence(number, request, lambda event: None, tokens, prompt, PAGE, submitted)


def running(
    state: SequenceState, number: int = 1, prompt: int = 10, in_flight: bool = False, submitted: float = 0.0
) -> Sequence:
    """A sequence that was admitted and has come to this state; a decoding one may have its next token in flight."""
    sequence = waiting(number, prompt, submitted=submitted)
    sequence.admit(lease_of(0), now=1.0)
    sequence.hold(lease_of(prompt + 2))
    if state is DECODING:
        sequence.dispatch(prompt - 1, InFlightToken(1, 0))
        if in_flight:
            sequence.dispatch(1, InFlightToken(2, 0))
    else:
        sequence.wait_for_pages(state is not sequence.state)
    assert sequence.state is state
    return sequence
