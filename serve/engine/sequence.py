"""What the engine is asked for, what it answers, and the state of a request on its way through it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np

from cache.prefix_cache import Lease
from model.sampling import Sampling
from serve.engine.request import Event, GenerationRequest
from serve.engine.restore import Restore
from serve.engine.steps import CompiledStep


@dataclass(frozen=True)
class ScheduledSequence:
    """What a sequence runs in the next step: its next `count` tokens, and guesses behind them."""

    sequence: Sequence
    count: int
    guesses: tuple[int, ...] = ()


@dataclass(frozen=True)
class SequenceOutput:
    """A sequence's place in a step that was launched."""

    sequence: Sequence
    at: int  # of what the step samples, the first that is this sequence's
    guesses: tuple[int, ...]  # tokens that ran on trial behind the known ones
    samples: bool  # whether it had no token left to run, so that what is sampled is its next token


@dataclass(frozen=True, eq=False)
class UnsampledStep:
    """What the model's pass of a step came to, before anything is picked from it."""

    step: CompiledStep
    logits: jax.Array  # [samples, vocab] float32
    sampling: Sampling  # without masks


@dataclass(eq=False)
class InFlightStep:
    """A step that was launched and that nobody has read."""

    seats: list[SequenceOutput]
    launched: float  # by `time.perf_counter`
    chunk: tuple[int, int] | None  # tokens [start, stop) of a prompt, where the step runs nothing else
    unpicked: UnsampledStep | None  # until what constrains its tokens is known
    sampled: jax.Array | None = None  # [samples] int32, from then on

    def at(self, sequence: Sequence) -> int:
        """Where the sequence's next token is sampled."""
        return next(seat.at for seat in self.seats if seat.sequence is sequence)


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine; touched by the engine's thread only."""

    number: int
    request: GenerationRequest
    emit: Callable[[Event], object]
    tokens: np.ndarray  # [prompt + max_tokens] int32
    length: int  # tokens known: the prompt and what was sampled
    submitted: float
    started: float = 0.0
    answered: float = 0.0  # when its first token came
    lease: Lease | None = None
    computed: int = 0  # tokens whose keys and values are in the lease's pages
    reused: int = 0  # of these, the ones that somebody else had computed
    taken_over: int = 0  # the last of these ends here; what comes between them it has computed itself
    restored: Counter[str] = field(default_factory=Counter)  # of those, the ones that came from a tier, by its name
    sampled: int = 0
    flight: InFlightStep | None = None  # the step that samples its next token, which then is the one behind `length`
    keys: list[bytes] = field(default_factory=list)  # of its full pages, as far as they are known
    restore: Restore | None = None
    used: int = field(default_factory=time.time_ns)  # ns since 1970: page i has the stamp `used - i` in the tiers
    stamped: int = 0  # full pages whose use the writer knows
    sealed: int = 0  # full pages that were looked at for saving
    unsaved: list[int] = field(default_factory=list)  # of these, the ones that still have to go to the tiers

    @property
    def pending(self) -> int:
        """Tokens to run through the model before the next one can be sampled."""
        return self.length - self.computed

    @property
    def decodes(self) -> bool:
        """Whether its next step runs one token, be it known or in the air, and samples another."""
        return self.pending == 1 if self.flight is None else self.room > 1

    @property
    def room(self) -> int:
        """Tokens that may still be sampled."""
        return len(self.tokens) - self.length

    def take_over(self, length: int, page_size: int) -> None:
        """Count the first `length` tokens as computed by somebody else, whose business it is to save their pages."""
        if not self.sampled:
            self.reused += length - self.computed
            self.taken_over = length
        self.unsaved.extend(range(self.sealed, self.computed // page_size))  # its own, from a step in the air
        self.computed = length
        self.sealed = max(self.sealed, length // page_size)

    @property
    def known(self) -> np.ndarray:
        """The tokens that a cache may already have, [tokens] int32: all but the last, which runs for its logits."""
        return self.tokens[: self.length - 1]
