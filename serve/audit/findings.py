"""What an audit looks at, a request that reused a prefix, and what it may find wrong in it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

# Bytes that a record takes in addition to its arrays, about.
RECORD_BYTES = 512


@dataclass(frozen=True, eq=False)
class ReusedPrefix:
    """A request that reused a prefix."""

    tokens: np.ndarray  # [prompt tokens] int32
    reused: int  # length of the prefix; gaps in it may have been computed
    salt: bytes
    leased: bytes  # the salt under which its pages were found
    keys: tuple[bytes, ...]  # by which the tiers were asked for the reused full pages, as far as they were
    first: int | None  # its first token, if that is the most likely one
    head: int = 0  # tokens that all salts share

    @property
    def size(self) -> int:
        """Bytes that the record takes, about."""
        return self.tokens.nbytes + 32 * len(self.keys) + RECORD_BYTES


@dataclass
class Records:
    """The latest reused prefixes, up to `max_bytes`, from which audits are sampled."""

    max_bytes: int
    random: random.Random
    records: deque[ReusedPrefix] = field(default_factory=deque)
    bytes: int = 0

    def __len__(self) -> int:
        """The number of records."""
        return len(self.records)

    def __iter__(self) -> Iterator[ReusedPrefix]:
        """The records, the oldest first."""
        return iter(self.records)

    def add(self, record: ReusedPrefix) -> None:
        """Add one, and drop the oldest ones that there is no room for."""
        self.records.append(record)
        self.bytes += record.size
        while self.bytes > self.max_bytes:
            self.bytes -= self.records.popleft().size

    def take_random(self) -> ReusedPrefix:
        """Remove one at random and return it. Raises ValueError without records."""
        at = self.random.randrange(len(self.records))
        record = self.records[at]
        del self.records[at]
        self.bytes -= record.size
        return record

    def clear(self) -> None:
        """Drop all."""
        self.records.clear()
        self.bytes = 0


@dataclass(frozen=True)
class Mismatch:
    """What an audit found wrong."""

    witness: str  # page, logits, token or name
    source: str  # device, or the tier that held the page
    position: int  # of the first token concerned
    drop: int  # what was cached from this position on is not to be trusted
    layer: int | None = None
    part: str | None = None  # keys or values
    error: float = 0.0
    scale: float = 0.0  # the largest of the right values

    def __str__(self) -> str:
        """What is wrong, where, and by how much."""
        where = f", {self.part} of layer {self.layer}" if self.part else ""
        size = f": off by {self.error:.3g} of {self.scale:.3g}" if self.witness != "name" else ""
        return f"{self.witness} at token {self.position}{where} ({self.source}){size}"
