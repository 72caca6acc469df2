"""What a sequence takes back from the tiers below the device, and how far that has come."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

import jax

from cache.tier import Fetched
from cache.tiers import Found, StoredPage


@dataclass(frozen=True)
class Loaded:
    """Consecutive pages that were read, in arrays that the device can copy in."""

    first: int  # index of the first page in its sequence
    stop: int  # tokens that are computed once the last page is in its place
    arrays: list[jax.Array]  # of [batch, *page_shape]
    fetched: Fetched


@dataclass(eq=False)
class Slice:
    """Consecutive stored pages that are read together."""

    pages: list[StoredPage]
    loading: Future[Loaded] | None = None
    wanted: float | None = None  # since when its sequence has waited for it, seconds, monotonic

    @property
    def first(self) -> int:
        """Index of the first page."""
        return self.pages[0].index


@dataclass(eq=False)
class Restore:
    """What a sequence takes from the tiers: looked up and read ahead while it waits, copied in when its turn comes."""

    looking: Future[Found]
    held: int  # tokens that the device held then: only what comes behind was looked up
    since: float  # seconds, monotonic
    slices: deque[Slice] | None = None  # None until the lookup is done


def end_of(piece: Slice, page_size: int) -> int:
    """Tokens that are computed once a slice is in its place."""
    return piece.pages[-1].index * page_size + piece.pages[-1].tokens
