"""Which pages a replica has, for routers: increments with sequence numbers, or a snapshot where too many went by."""

from __future__ import annotations

from collections import deque

import numpy as np

from cache.journal import Journal, ListedPages
from serve.engine.engine import Engine
from serve.router.summary import Increment, Snapshot, increments

KEPT_KEYS = 1 << 17  # of increments, 1 MiB: a router that lacks more gets a snapshot


class Publisher:
    """Follows the prefix cache of an engine that is not started yet. Used by one thread at a time."""

    def __init__(self, engine: Engine) -> None:
        settings = engine.settings
        self.journal = engine.core.memory.prefix_cache.tree.journal = Journal()
        self.pages = ListedPages(settings.num_pages, settings.page_size, engine.fingerprint)
        self.sequence = 0  # of the latest increment
        self.kept: deque[Increment] = deque()

    def take(self) -> None:
        """Make increments of what has changed since the last call; to be called regularly."""
        if not self.journal.entries:
            return
        changed = increments(self.sequence, *self.pages.take(self.journal))
        self.sequence += len(changed)
        self.kept += changed
        while size(self.kept) > KEPT_KEYS:
            self.kept.popleft()

    def since(self, sequence: int) -> tuple[Increment, ...] | Snapshot:
        """The increments after number `sequence`, or a snapshot if they are not all here; -1 asks for a snapshot."""
        missing = self.sequence - sequence
        if sequence < 0 or not 0 <= missing <= len(self.kept):
            return Snapshot(self.sequence, self.pages.held())
        return tuple(self.kept)[len(self.kept) - missing :]


def size(increments: deque[Increment]) -> int:
    """The keys of some increments."""
    return int(np.sum([len(each.added) + len(each.removed) for each in increments]))
