"""What the engine is asked for, and the events that answer it; no state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cache.retention import Ask, Kept
from serve.engine.buckets import GREEDY, SamplingParams


class Constraint(Protocol):
    """Which tokens may come next in one request's answer. Only the engine's thread calls it.

    `mask` is called when all tokens before are known; the model's forward pass over the latest one may be under way.
    An exception in either method ends that request and no other.
    """

    def mask(self) -> np.ndarray:
        """The tokens that may come next, [ceil(vocab / 32)] uint32: bit t of word w allows token 32w + t.

        A second call without `accept` in between returns the same.
        """

    def accept(self, token: int) -> None:
        """Go on after the token that was sampled; stop ids are passed as well."""


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """What to generate, in tokens."""

    tokens: np.ndarray  # the prompt, [tokens] int32
    max_tokens: int  # of the answer; 0 computes the prompt only, for later requests
    stop_ids: frozenset[int] = frozenset()  # the answer ends before one of these
    sampling: SamplingParams = GREEDY
    salt: bytes = b""  # only requests of the same salt share pages
    head: int = 0  # but for so many tokens, whole pages at the start of the prompt: those all requests share
    constraint: Constraint | None = None
    agent: str = ""  # whose requests follow each other, for a router; "" if unknown
    session: str = ""  # that the agent belongs to
    parent: str = ""  # the agent that waits for its end; "" if a person does
    id: str = ""  # by which `Engine.answered` names it
    priority: int = 0  # below 0 is background
    owner: str = ""  # among whom places and steps are divided fairly; "" where nobody is named
    asks: tuple[Ask, ...] = ()  # what is to be kept of the prompt, once it is computed
    share: float = 1.0  # of what may be kept, the owner's

    @property
    def background(self) -> bool:
        """Whether others come first."""
        return self.priority < 0


@dataclass(frozen=True)
class Forecast:
    """What a request is expected to find in the cache as it comes, and what its first token takes."""

    tokens: int  # of the prompt
    cached: Mapping[str, int]  # of these, tokens that are read, by where they are: `device`, or a tier's name
    wait_s: float  # until the work before it is done
    restore_s: float  # until what tiers have of it is on the device, which comes meanwhile
    prefill_s: float  # to compute the rest

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return max(self.wait_s, self.restore_s) + self.prefill_s


@dataclass(frozen=True)
class Started:
    """The prompt is computed; sent just before the first token."""

    prompt_tokens: int
    reused_tokens: int
    queued_s: float  # from submission to the first step
    prefill_s: float  # from the first step to the first token
    restored: Mapping[str, int] = field(default_factory=dict)  # of the reused ones, tokens from each tier, by its name
    forecast: Forecast | None = None  # as it came; None if nothing was foreseen
    kept: tuple[Kept, ...] = ()  # what was done about each of the request's `asks`


@dataclass(frozen=True)
class TokenEvent:
    """One more token."""

    token: int


@dataclass(frozen=True)
class Finished:
    """The last event of a request that succeeded: reason is `stop` (a stop id was sampled) or `length`."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The last event of a request that the engine could not finish."""

    message: str
    temporary: bool = False  # the engine ends, or is gone: the same request can be sent again


@dataclass(frozen=True)
class Waiting:
    """Nothing has happened for a while, and the request is still alive."""

    forecast: Forecast | None = None  # as it came; None if nothing was foreseen


Event = Waiting | Started | TokenEvent | Finished | Failed
