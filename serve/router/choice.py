"""The choice of a replica: the lowest expected time to the first token, all of it in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.router.replica import ReplicaState
from serve.router.request import RoutedRequest


@dataclass(frozen=True)
class Choice:
    """A replica, and what a request's first token is expected to take there, in seconds."""

    replica: str
    cached: int  # tokens expected in its cache
    restored: int  # tokens after these that a tier brings
    queue_s: float  # until the work before it is done
    restore_s: float  # to bring pages from a tier
    prefill_s: float  # to compute the rest
    others_s: float  # what it costs other requests

    @property
    def expected_ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.queue_s + self.restore_s + self.prefill_s


def choose(
    request: RoutedRequest,
    replicas: Sequence[ReplicaState],
    overlap: Mapping[str, int],
    agent_replica: str | None = None,
) -> Choice:
    """The replica with the lowest cost; `overlap` is the pages of the request's that each has cached.

    Ties go to `agent_replica`, where the request's agent was last, then to the least queue, then by name. Raises
    ValueError if there is no replica.
    """
    if not replicas:
        raise ValueError("no replica to choose from: add one first")
    choices = [priced(request, replica, overlap.get(replica.name, 0)) for replica in replicas]
    return min(
        choices,
        key=lambda c: (c.expected_ttft_s + c.others_s, c.replica != agent_replica, c.queue_s, c.replica),
    )


def priced(request: RoutedRequest, replica: ReplicaState, overlap: int) -> Choice:
    """What a request costs on one replica that has `overlap` of its pages cached."""
    # The last token of a prompt is always computed.
    cached = min(overlap * request.page_size, request.tokens - 1)
    return Choice(
        replica=replica.name,
        cached=cached,
        restored=0,
        queue_s=replica.queued_s(),
        restore_s=0.0,
        prefill_s=replica.costs.ttft_s(request.tokens, cached),
        others_s=0.0,
    )
