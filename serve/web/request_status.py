"""How the latest requests went: what is told of them beside the report on their prompts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, Literal

import msgspec
from msgspec import Struct

from serve.api.answers import ContentBlockDelta, Event, MessageDelta, Usage
from serve.limits.bounds import DEFAULT_BOUNDS
from serve.limits.recent import Recent
from serve.web.timing import Phases

OUTCOME_BYTES = 1700  # that an outcome takes, about: numbers alone, whatever the request was


class RequestStatus(Struct, frozen=True, omit_defaults=True):
    """What became of one request."""

    state: Literal["running", "done", "aborted"] = "running"
    ttft_ms: float | None = None  # None until there is a first content_block_delta
    phases_ms: Mapping[str, float] = MappingProxyType({})  # what each phase took, as far as it got
    generated_tokens: int = 0  # known when it is done
    saved_tokens: Mapping[str, int] = MappingProxyType({})  # reused thanks to each rule alone


class RequestStatuses:
    """The latest outcomes by the ids of their messages. Any thread may use it."""

    def __init__(self, most_bytes: int = DEFAULT_BOUNDS.outcomes) -> None:
        self.known: Recent[str, RequestStatus] = Recent(most_bytes, lambda outcome: OUTCOME_BYTES)

    @property
    def bytes(self) -> int:
        """Memory that is taken, about."""
        return self.known.bytes

    def note(self, id: str, **fields: Any) -> None:
        """Set fields of a request's outcome."""
        self.known.change(id, lambda known: msgspec.structs.replace(known or RequestStatus(), **fields))

    def of(self, id: str) -> RequestStatus:
        """What is known of a request."""
        return self.known.get(id) or RequestStatus()


async def track(
    events: AsyncGenerator[Event, None],
    id: str,
    phases: Phases,
    outcomes: RequestStatuses,
    first: Callable[[float], object],
    done: Callable[[Usage], object],
    ended: Callable[[Mapping[str, float]], object],
) -> AsyncGenerator[Event, None]:
    """The same events, with their outcome noted.

    `first` is told the TTFT in seconds; `done` is told the usage when the answer is complete; `ended` is told the
    seconds of each phase, whether it is complete or not.
    """
    waiting, state = True, "aborted"
    async with aclosing(events):
        try:
            async for event in events:
                if waiting and isinstance(event, ContentBlockDelta):
                    waiting, ttft = False, phases.elapsed()
                    first(ttft)
                    outcomes.note(id, ttft_ms=1000 * ttft, phases_ms=phases.ms())
                if isinstance(event, MessageDelta):
                    state = "done"
                    outcomes.note(id, state=state, generated_tokens=event.usage.output_tokens, phases_ms=phases.ms())
                    done(event.usage)
                yield event
        finally:
            outcomes.note(id, state=state, phases_ms=phases.ms())
            ended(phases.seconds)
