"""What the engine is asked for, and the events with which it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from serve.engine.steps import GREEDY, SamplingParams


class Constraint(Protocol):
    """Which tokens an answer may go on with. It belongs to one request and is asked on the engine's thread only.

    A mask is asked for when all tokens before are known: the model's pass over the latest one may be under way by then.

    Whatever either method raises ends that request and no other.
    """

    def mask(self) -> np.ndarray:
        """The tokens that may come next, as `pack_masks` wants them; asking twice changes nothing."""

    def accept(self, token: int) -> None:
        """Take the token that was sampled, stop ids included."""


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """What to generate, in tokens."""

    tokens: np.ndarray  # [tokens] int32
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = GREEDY
    salt: bytes = b""
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Started:
    """The prompt is computed; sent just before the first token."""

    prompt_tokens: int
    reused_tokens: int
    queued_s: float  # from submission to the first step
    prefill_s: float  # from the first step to the first token
    restored: Mapping[str, int] = field(default_factory=dict)  # of these, what came from a tier, by its name


@dataclass(frozen=True)
class TokenEvent:
    """One more token."""

    token: int


@dataclass(frozen=True)
class Finished:
    """The last event of a request that ended well: reason is `stop` (a stop id was sampled) or `length`."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The last event of a request that the engine could not finish."""

    message: str


@dataclass(frozen=True)
class Waiting:
    """Nothing has happened for a while, and the request is still alive."""


Event = Waiting | Started | TokenEvent | Finished | Failed
