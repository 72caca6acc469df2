"""One sequence: a request on its way through the engine, its named state, and the only writer of what it holds.

A sequence is `tokens[:length]`, of which `tokens[:computed]` have their keys and values in the pages of its lease:

    WAITING -> PREFILLING <-> RESTORING      admitted; the next page is looked up in a tier, or read from one
                   |              |
                   v              v
                DECODING -> ENDED            at most one known token is left to run: each step samples the next one

Every state but ENDED leads back to WAITING when the sequence is preempted, and to ENDED when it is cancelled or fails.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np

from cache.nodes import Use
from cache.prefix_cache import Lease
from cache.tiers import StoredPage
from serve.engine.request import Event, Forecast, GenerationRequest

log = logging.getLogger("tokenzero.engine")

# What is expected of a request, where the tiers have these pages of it.
Foresee = Callable[[Iterable[StoredPage]], Forecast]


class SequenceState(Enum):
    """Where a sequence is between its submission and its last event."""

    WAITING = "waiting"  # in the queue, without pages: it is new, or was preempted
    RESTORING = "restoring"  # has pages; the next one is being looked up in a tier, or read from one
    PREFILLING = "prefilling"  # has pages; more than one known token has to run through the model
    DECODING = "decoding"  # has pages; at most one known token has to run, and the next one is sampled
    ENDED = "ended"


WAITING, RESTORING, PREFILLING, DECODING, ENDED = SequenceState

NEXT_STATES: dict[SequenceState, set[SequenceState]] = {
    WAITING: {PREFILLING, DECODING, ENDED},
    RESTORING: {PREFILLING, DECODING, WAITING, ENDED},
    PREFILLING: {RESTORING, DECODING, WAITING, ENDED},
    DECODING: {WAITING, ENDED},
    ENDED: set(),
}


class InFlightToken(NamedTuple):
    """A sequence's next token, which a step in flight samples and the host has not read."""

    step: int  # number of the step
    offset: int  # among the tokens that the step samples


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine; touched by the engine's thread only.

    Only the methods of this class write to it, except `keys`, which PageNames extends, and `stamped`, which is Saver's.
    """

    number: int
    request: GenerationRequest
    emit: Callable[[Event], object]
    tokens: np.ndarray  # [prompt + max_tokens] int32
    length: int  # tokens known: the prompt and what was sampled
    page_size: int
    submitted: float  # this and the next two: seconds, `time.perf_counter`
    started: float = 0.0
    answered: float = 0.0  # when its first token came
    state: SequenceState = WAITING
    lease: Lease | None = None
    use: Use | None = None  # of the pages that it holds; Memory's
    computed: int = 0  # tokens whose keys and values are in the lease's pages, or will be after the steps in flight
    sampled: int = 0
    in_flight: InFlightToken | None = None  # its next token, which comes after `length`
    reused: int = 0  # of the prompt, tokens that it did not compute itself
    reused_until: int = 0  # the last of these ends here; it may have computed some tokens before
    restored: Counter[str] = field(default_factory=Counter)  # reused tokens that came from a tier, by its name
    foresee: Foresee | None = None  # what is expected of it, as it found the engine
    stored: tuple[StoredPage, ...] = ()  # what the first look-up in the tiers has found
    restoring_s: float = 0.0  # seconds in the state RESTORING
    entered: float = 0.0  # when it came into its state, seconds, `time.perf_counter`
    used: int = field(default_factory=time.time_ns)  # ns since 1970: page i has the stamp `used - i` in the tiers
    keys: list[bytes] = field(default_factory=list)  # of its full pages, as far as they are known
    stamped: int = 0  # full pages whose use the writer knows
    sealed: int = 0  # full pages that are in `unsaved`, were saved, or are another's to save
    unsaved: list[int] = field(default_factory=list)  # full pages that still have to go to the tiers

    @property
    def pending(self) -> int:
        """Known tokens to run through the model before the next one can be sampled."""
        return self.length - self.computed

    @property
    def decodes(self) -> bool:
        """Whether its next step runs one token, be it known or in flight, and samples another."""
        return self.state is DECODING and (self.in_flight is None or self.remaining_tokens > 1)

    @property
    def remaining_tokens(self) -> int:
        """Tokens that may still be sampled."""
        return len(self.tokens) - self.length

    @property
    def matchable_tokens(self) -> np.ndarray:
        """The tokens that a cache may already have, [tokens] int32: all but the last, which runs for its logits."""
        return self.tokens[: self.length - 1]

    # Waiting.

    def arrive(self, foresee: Foresee | None) -> None:
        """Note what is expected of the request, as it found the engine."""
        self.foresee = foresee

    @property
    def forecast(self) -> Forecast | None:
        """What was expected of it as it came, with what the tiers had of it; None if nothing was foreseen."""
        try:
            return self.foresee(self.stored) if self.foresee else None
        except Exception:  # which is not the request's fault
            log.exception("request %d: nothing is foreseen of it", self.number)
            return None

    def note_stored(self, pages: Iterable[StoredPage]) -> None:
        """Note what the tiers have of the prompt, the first time that they are asked."""
        self.stored = self.stored or tuple(pages)

    # Holding pages.

    def admit(self, lease: Lease, now: float) -> None:
        """Start with the pages of the longest cached prefix, at `now` (seconds, `time.perf_counter`)."""
        assert self.lease is None
        self.lease, self.computed = lease, lease.reused
        self.sealed = self.computed // self.page_size
        if not self.sampled:
            self.reused_until = self.computed
        if not self.started:
            self.started, self.reused = now, self.computed
        elif not self.sampled:
            # It was preempted: some of what it matches now it has computed, and some of what it had reused may be gone.
            self.reused = min(self.reused, self.computed)
            self.restored.clear()
        self._enter(PREFILLING)
        self._check()

    def hold(self, lease: Lease) -> None:
        """Go on with the lease that an extension of the present one returned."""
        assert self.lease is not None
        assert lease.number == self.lease.number
        self.lease = lease
        self._check()

    def refresh(self, lease: Lease) -> Lease:
        """Go on with a longer match, made now that another request has computed more. Returns the present lease."""
        assert self.lease is not None
        assert lease.reused > self.computed
        old, self.lease = self.lease, lease
        self.mark_cached(lease.reused)
        return old

    def leave(self, state: SequenceState) -> Lease:
        """Give the pages up, to wait again or for good. Returns the lease, which the caller ends."""
        assert self.lease is not None
        assert state in (WAITING, ENDED)
        assert state is ENDED or self.in_flight is None, "a token in flight would be lost"
        lease, self.lease, self.in_flight, self.computed = self.lease, None, None, 0
        self._enter(state)
        return lease

    def end(self) -> None:
        """End a sequence that holds no pages."""
        assert self.lease is None
        if self.state is not ENDED:
            self._enter(ENDED)

    # Growing.

    def wait_for_pages(self, waits: bool) -> None:
        """Note whether the next page is on its way from a tier; a decoding sequence needs none."""
        if self.state in (PREFILLING, RESTORING):
            self._enter(RESTORING if waits else PREFILLING)
            self._check()

    def mark_cached(self, length: int) -> None:
        """Count the first `length` tokens as computed by another, whose task it is to save their pages."""
        assert length >= self.computed
        if not self.sampled:
            self.reused += length - self.computed
            self.reused_until = length
        self.unsaved.extend(range(self.sealed, self.computed // self.page_size))  # its own, from a step in flight
        self.computed = length
        self.sealed = max(self.sealed, length // self.page_size)
        self._check()

    def mark_restored(self, length: int, tokens: Mapping[str, int]) -> None:
        """Count the first `length` tokens as computed: `tokens` of them, by tier, have just been copied in."""
        if not self.sampled:
            self.restored.update(tokens)
        self.mark_cached(length)

    def dispatch(self, count: int, token: InFlightToken) -> bool:
        """Count the next `count` tokens as computed. Whether `token`, which their step samples, is the next one."""
        self.computed += count
        samples = self.computed >= self.length
        self.in_flight = token if samples else None
        self._check()
        return samples

    def collect(self, step: int) -> None:
        """Note that the step of this number has been read."""
        if self.in_flight and self.in_flight.step == step:
            self.in_flight = None

    def start_answer(self, now: float) -> None:
        """Note when its first token came, in seconds of `time.perf_counter`."""
        self.answered = now

    def accept_token(self, token: int) -> None:
        """Append a sampled token."""
        self.tokens[self.length] = token
        self.length += 1
        self.sampled += 1
        self._check()

    def accept_draft(self) -> None:
        """Count the latest token as computed: it ran as a draft token in the step that also sampled it."""
        self.computed += 1
        self._check()

    def forget_unknown(self) -> None:
        """Do not count a token that ran before anybody knew which one it is, and that will not be accepted."""
        self.computed = min(self.computed, self.length)

    # Being saved.

    def seal(self) -> int:
        """Note the pages that it has filled since the last call as unsaved. Returns the number of full pages."""
        full = self.computed // self.page_size
        self.unsaved.extend(range(self.sealed, full))
        self.sealed = max(self.sealed, full)
        return full

    def mark_unsaved(self, pages: Iterable[int]) -> None:
        """Note full pages that the device has, and the tiers have lost."""
        self.unsaved.extend(pages)

    def mark_saved(self, pages: Iterable[int]) -> None:
        """Note that pages are on their way to the tiers."""
        saved = set(pages)
        self.unsaved = [page for page in self.unsaved if page not in saved]

    def _enter(self, state: SequenceState) -> None:
        if state is not self.state:
            assert state in NEXT_STATES[self.state], f"request {self.number}: {self.state} does not lead to {state}"
            now = time.perf_counter()
            self.restoring_s += now - self.entered if self.state is RESTORING else 0.0
            self.state, self.entered = state, now

    def _check(self) -> None:
        """Assert the invariants of a sequence with pages, after it may have come to decode."""
        assert self.lease is not None
        assert self.computed <= self.lease.length, "a lease covers what is computed"
        assert self.computed <= self.length + (self.in_flight is not None), "one unknown token runs at most"
        if self.pending <= 1:
            self._enter(DECODING)
        assert self.state in (RESTORING, PREFILLING, DECODING), f"{self.state} with a lease"
