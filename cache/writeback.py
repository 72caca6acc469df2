"""Write-back: a thread that takes sealed pages from a bounded queue and writes them to the tiers within a second.

The producer never waits: what does not fit into the queue is dropped and counted, because a page can be computed again.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache.tiers import Item, Payload, Tier

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Pages that are on their way: `load` runs on the write-back thread and returns one payload a key."""

    keys: Sequence[bytes]
    size: int  # bytes of all payloads together
    load: Callable[[], Sequence[Payload]]


class WriteBack:
    """Writes batches to every tier in order and syncs them, at most `flush_seconds` after they were queued.

    `queue_bytes` bounds what waits, device copies included. Newcomers are dropped when it is full: what waits already
    came earlier in its chain, and a chain is worth nothing without its head.
    """

    def __init__(self, tiers: Sequence[Tier], flush_seconds: float = 1.0, queue_bytes: int = 1 << 30) -> None:
        self.tiers = tuple(tiers)
        self.flush_seconds = flush_seconds
        self.queue_bytes = queue_bytes
        self.queued: deque[Batch] = deque()
        self.queued_bytes = 0  # the batch that is being written is still in it
        self.dropped = 0  # pages
        self.failed = 0  # pages whose payload could not be loaded
        self.urgent = False  # do not wait for more
        self.closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="write-back", daemon=True)
        self.thread.start()

    def submit(self, keys: Sequence[bytes], size: int, load: Callable[[], Sequence[Payload]]) -> bool:
        """Queue pages of `size` bytes in all; returns False, at once, if they had to be dropped."""
        with self.changed:
            if not self.has_room(size):
                self.dropped += len(keys)
                return False
            self.queued.append(Batch(keys, size, load))
            self.queued_bytes += size
            self.changed.notify_all()
            return True

    def has_room(self, size: int) -> bool:
        """Whether `submit` would take `size` bytes now; an empty queue takes a batch of any size."""
        return not self.closing and (not self.queued_bytes or self.queued_bytes + size <= self.queue_bytes)

    def drop(self, pages: int) -> None:
        """Count pages that were never submitted because there was no room for too long."""
        self.dropped += pages

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until nothing is queued and everything is written and synced; False if that took over `timeout` s."""
        with self.changed:
            self.urgent = True
            self.changed.notify_all()
            return self.changed.wait_for(lambda: not self.queued_bytes and not self.urgent, timeout)

    def close(self) -> None:
        """Write what is queued and stop; later submits are dropped. The tiers stay open."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.thread.join()

    def _run(self) -> None:
        while True:
            with self.changed:
                # Not for ever: the tiers have uses to record even when nothing is written.
                self.changed.wait_for(lambda: self.queued or self.urgent or self.closing, max(self.flush_seconds, 0.05))
                if self.queued:
                    # Half of the time allowed is for gathering a batch, the other half for writing it.
                    self.changed.wait_for(self._in_a_hurry, self.flush_seconds / 2)
                batches, self.urgent = list(self.queued), False
                self.queued.clear()
                if not batches and self.closing:
                    return
            for batch in batches:
                self._write(batch)
            for tier in self.tiers:
                tier.sync()
            with self.changed:
                self.queued_bytes -= sum(batch.size for batch in batches)
                self.changed.notify_all()

    def _in_a_hurry(self) -> bool:
        return self.urgent or self.closing or self.queued_bytes > self.queue_bytes // 2

    def _write(self, batch: Batch) -> None:
        try:
            items: list[Item] = list(zip(batch.keys, batch.load(), strict=True))
        except Exception:
            # The thread must outlive one bad batch: the engine would go on, and never again find a page on disk.
            log.exception("%d pages are lost to the tiers: their payloads could not be loaded", len(batch.keys))
            self.failed += len(batch.keys)
            return
        for tier in self.tiers:
            tier.put_many(items)
