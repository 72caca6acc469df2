"""What an audit looks at, a request that reused a prefix, and what it may find wrong in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Bytes that a record takes beside its arrays, about.
RECORD_BYTES = 512


@dataclass(frozen=True, eq=False)
class Reuse:
    """A request that reused a prefix."""

    tokens: np.ndarray  # [prompt tokens] int32
    reused: int  # up to here; holes between may have been computed
    salt: bytes
    leased: bytes  # the salt under which its pages were found
    keys: tuple[bytes, ...]  # by which the tiers were asked for the reused full pages, as far as they were
    first: int | None  # its first token, if that is the most likely one

    @property
    def size(self) -> int:
        """Bytes that the record takes, about."""
        return self.tokens.nbytes + 32 * len(self.keys) + RECORD_BYTES


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
    scale: float = 0.0  # of the right values

    def __str__(self) -> str:
        """What is wrong, where, and by how much."""
        where = f", {self.part} of layer {self.layer}" if self.part else ""
        size = f": off by {self.error:.3g} of {self.scale:.3g}" if self.witness != "name" else ""
        return f"{self.witness} at token {self.position}{where} ({self.source}){size}"
