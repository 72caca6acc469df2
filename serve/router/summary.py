"""What a replica publishes of its cache: increments with sequence numbers, and a snapshot where one went missing.

A page is 8 bytes. An increment holds at most `MOST_PAGES` of them, and what is left comes with the next; the pages of a
prompt come in order, so that a router that has only a part knows a shorter prefix, not a wrong one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

MOST_PAGES = 1 << 16  # of an increment: half a megabyte
NO_KEYS = np.zeros(0, np.uint64)  # [0] uint64


@dataclass(frozen=True, eq=False)
class Increment:
    """Pages that a replica has gained and lost since its last increment; no page is both."""

    sequence: int  # 1 more than the last one's, from 1 on
    added: np.ndarray  # [pages] uint64
    removed: np.ndarray  # [pages] uint64


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All pages of a replica after increment `sequence`."""

    sequence: int
    held: np.ndarray  # [pages] uint64


@dataclass(frozen=True)
class Load:
    """All work of a replica, whoever sent it: for several routers that share replicas."""

    prefills: tuple[tuple[str, int, int], ...]  # (request, start, stop) in tokens, without a first token
    decodes: int  # requests that are being answered


class PageLog:
    """A replica's pages as it gains and loses them, and the increments that say so. Any thread may call it.

    Its engine's `Memory.listen` takes one; `take` what there is to publish, every so often.
    """

    def __init__(self) -> None:
        self.sequence = 0
        self.lock = threading.Lock()
        self.held: dict[int, None] = {}  # in the order of coming, as the next two
        self.gained: dict[int, None] = {}
        self.lost: dict[int, None] = {}

    def added(self, keys: np.ndarray) -> None:
        """Pages ([pages] uint64) are cached, in the order of their prompt."""
        with self.lock:
            for key in keys.tolist():
                if key not in self.held:
                    self.held[key] = None
                    if self.lost.pop(key, 0) == 0:
                        self.gained[key] = None

    def removed(self, keys: np.ndarray) -> None:
        """Pages ([pages] uint64) are cached no longer."""
        with self.lock:
            for key in keys.tolist():
                if self.held.pop(key, 0) is None and self.gained.pop(key, 0) == 0:
                    self.lost[key] = None

    def cleared(self) -> None:
        """Nothing is cached any more."""
        self.removed(np.fromiter(self.held, np.uint64, len(self.held)))

    def take(self) -> Increment | None:
        """The next increment; None if nothing has changed."""
        with self.lock:
            if not self.gained and not self.lost:
                return None
            self.sequence += 1
            removed = first_keys(self.lost, MOST_PAGES)
            return Increment(self.sequence, first_keys(self.gained, MOST_PAGES - len(removed)), removed)

    def snapshot(self) -> Snapshot:
        """All pages as of the last increment, for a router that missed one; the next increment follows on it."""
        with self.lock:
            held = [key for key in self.held if key not in self.gained] + list(self.lost)
            return Snapshot(self.sequence, np.array(held, np.uint64))


def first_keys(keys: dict[int, None], most: int) -> np.ndarray:
    """Take the first keys out of a dictionary, [pages] uint64, at most so many."""
    taken = [key for key, _ in zip(keys, range(most), strict=False)]
    for key in taken:
        del keys[key]
    return np.array(taken, np.uint64)
