"""What the router knows of one replica: what its work costs there, and the work that is in flight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from serve.cost.model import Constants


@dataclass(frozen=True)
class Prefill:
    """A prompt whose tokens [start, stop) are being computed on a replica, or wait for it."""

    request: str  # its id
    start: int
    stop: int


@dataclass(frozen=True)
class ReplicaState:
    """One replica: immutable, each event makes a new one."""

    name: str
    costs: Constants  # refitted while it serves
    prefills: tuple[Prefill, ...] = ()  # sent there and without a first token, the oldest first
    decodes: int = 0  # requests there that have had their first token
    # Seconds to read a token's page from each tier that the replica reaches: its bytes over the tier's bytes a second.
    tiers: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def queued_s(self) -> float:
        """Seconds of prefill in flight."""
        return sum(self.costs.compute_s(each.start, each.stop) for each in self.prefills)
