"""The status of the latest requests: what `/v1/requests` has of them besides the report on their prompts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Literal

import msgspec
from msgspec import Struct

from serve.api.answers import CacheForecast, ContentBlockDelta, Event, MessageDelta, Usage
from serve.api.sessions import AgentState
from serve.limits.bounds import DEFAULT_BOUNDS
from serve.limits.recent import Recent
from serve.web.timing import Phases

STATUS_BYTES = 2100  # memory of a status, about, without the words that a client has chosen
UPSTREAM_BYTES = 150  # more, for each upstream


class RequestStatus(Struct, frozen=True, omit_defaults=True):
    """The state, times and counts of one request."""

    state: Literal["running", "done", "aborted"] = "running"
    request_id: str = ""  # the `x-request-id` of request and response
    ttft_ms: float | None = None  # None until the first content_block_delta
    phases_ms: Mapping[str, float] = {}  # time of each phase that has ended
    generated_tokens: int = 0  # known when it is done
    saved_tokens: Mapping[str, int] = {}  # tokens reused because of each rule alone
    upstream: str | None = None  # where a proxy with several has sent it
    expected_cached_tokens: int = 0  # there
    expected_ttft_ms: Mapping[str, float] = {}  # at each upstream that could take it
    forecast: CacheForecast | None = None  # what a server expected as the request came
    session: str = ""  # this and the next two: as its client names them, cut
    agent: str = ""  # a session's main agent has the session's id
    parent: str = ""  # the agent that waits for its end
    agent_state: AgentState | None = None  # what the agent does after the answer


def status_bytes(status: RequestStatus) -> int:
    """The memory of a status, about."""
    names = sum(map(len, (status.request_id, status.session, status.agent, status.parent)))
    return STATUS_BYTES + names + UPSTREAM_BYTES * len(status.expected_ttft_ms)


class RequestStatuses:
    """The latest statuses by the ids of their messages. Any thread may use it."""

    def __init__(self, most_bytes: int = DEFAULT_BOUNDS.statuses) -> None:
        self.known: Recent[str, RequestStatus] = Recent(most_bytes, status_bytes)

    @property
    def bytes(self) -> int:
        """Memory in use, about."""
        return self.known.bytes

    def update(self, id: str, **fields: Any) -> None:
        """Set fields of a request's status."""
        self.known.change(id, lambda known: msgspec.structs.replace(known or RequestStatus(), **fields))

    def get(self, id: str) -> RequestStatus:
        """The status of a request; the default one if nothing is known of it."""
        return self.known.get(id) or RequestStatus()


async def track(
    events: AsyncGenerator[Event, None],
    id: str,
    phases: Phases,
    statuses: RequestStatuses,
    first: Callable[[float], object],
    done: Callable[[Usage], object],
    ended: Callable[[Mapping[str, float]], object],
) -> AsyncGenerator[Event, None]:
    """The same events; on the way, the request's status is kept up to date.

    `first` is called with the TTFT in seconds, `done` with the usage when the answer is complete, and `ended` with the
    seconds of each phase, whether the answer is complete or not.
    """
    waiting, state = True, "aborted"
    async with aclosing(events):
        try:
            async for event in events:
                if waiting and isinstance(event, ContentBlockDelta):
                    waiting, ttft = False, phases.elapsed()
                    first(ttft)
                    statuses.update(id, ttft_ms=1000 * ttft, phases_ms=phases.ms())
                if isinstance(event, MessageDelta):
                    state = "done"
                    statuses.update(id, state=state, generated_tokens=event.usage.output_tokens, phases_ms=phases.ms())
                    done(event.usage)
                yield event
        finally:
            statuses.update(id, state=state, phases_ms=phases.ms())
            ended(phases.seconds)
