"""Write-back: a thread that takes sealed pages from a bounded queue and writes them to the tiers within a second.

The producer never waits: what does not fit into the queue is dropped and counted, because a page can be computed again.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cache.tier import Item, Payload, Tier, stamps_now
from cache.worker import Failures

MAX_USES = 1 << 16  # pages whose use waits to be recorded


@dataclass(frozen=True)
class WriteJob:
    """Pages that are on their way: `load` runs on the write-back thread and returns one payload a key."""

    keys: Sequence[bytes]
    stamps: Sequence[int]  # see Tier
    size: int  # bytes of all payloads together
    load: Callable[[], Sequence[Payload]]


class WriteBack:
    """Writes batches to every tier in order and syncs them, at most `flush_seconds` after they were queued.

    `queue_bytes` bounds what waits, device copies included. Newcomers are dropped when it is full: what waits already
    came earlier in its chain, and a chain is worth nothing without its head. Whatever a tier raises costs that tier's
    pages and nothing else.
    """

    def __init__(self, tiers: Sequence[Tier], flush_seconds: float = 1.0, queue_bytes: int = 1 << 30) -> None:
        self.tiers = tuple(tiers)
        self.flush_seconds = flush_seconds
        self.queue_bytes = queue_bytes
        self.queued: deque[WriteJob] = deque()
        self.queued_bytes = 0  # the batch that is being written is still in it
        self.used: list[tuple[Sequence[bytes], Sequence[int]]] = []  # keys and stamps of pages in front of these
        self.used_pages = 0
        self.dropped = 0  # pages that there was no room for
        self.failed = 0  # pages that could not be loaded, or that a tier raised for
        self.failures = Failures()
        self.asked = self.done = 0  # flushes
        self.closing = self.ended = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="write-back", daemon=True)
        self.thread.start()

    def submit(
        self,
        keys: Sequence[bytes],
        size: int,
        load: Callable[[], Sequence[Payload]],
        stamps: Sequence[int] | None = None,
    ) -> bool:
        """Queue pages of `size` bytes in all; returns False, at once, if they had to be dropped."""
        with self.changed:
            if not self.has_room(size):
                self.dropped += len(keys)
                return False
            self.queued.append(WriteJob(keys, stamps_now(len(keys)) if stamps is None else stamps, size, load))
            self.queued_bytes += size
            self.changed.notify_all()
            return True

    def use(self, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        """Have a use of pages recorded, before anything is written that is submitted later."""
        with self.changed:
            if self.used_pages < MAX_USES:
                self.used.append((keys, stamps))
                self.used_pages += len(keys)

    def has_room(self, size: int) -> bool:
        """Whether `submit` would take `size` bytes now; an empty queue takes a batch of any size."""
        return not self.closing and (not self.queued_bytes or self.queued_bytes + size <= self.queue_bytes)

    def drop(self, pages: int) -> None:
        """Count pages that were never submitted because there was no room for too long."""
        self.dropped += pages

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until what is queued now is written and synced; False if that takes over `seconds`."""
        with self.changed:
            self.asked += 1
            mine = self.asked
            self.changed.notify_all()
            return self.changed.wait_for(lambda: self.done >= mine or self.ended, seconds)

    def close(self, seconds: float | None = None) -> bool:
        """Write what is queued and stop; later submits are dropped. The tiers stay open.

        False if that takes over `seconds`: what is still queued then is lost when the process ends.
        """
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def _run(self) -> None:
        while not self.ended:
            with self.changed:
                # Not for ever: the tiers have uses to record even when nothing is written.
                self.changed.wait_for(self._has_work, max(self.flush_seconds, 0.05))
                if self.queued:
                    # Half of the time allowed is for gathering a batch, the other half for writing it.
                    self.changed.wait_for(self._in_a_hurry, self.flush_seconds / 2)
            self._write_queued()

    def _has_work(self) -> bool:
        return bool(self.queued) or self.asked > self.done or self.closing

    def _in_a_hurry(self) -> bool:
        return self.asked > self.done or self.closing or self.queued_bytes > self.queue_bytes // 2

    def _write_queued(self) -> None:
        with self.changed:
            batches, used, asked, closing = list(self.queued), self.used, self.asked, self.closing
            self.queued.clear()
            self.used, self.used_pages = [], 0
        for keys, stamps in used:
            self._use(keys, stamps)
        for batch in batches:
            self._write(batch)
        self._each("nothing is written through to the disk", lambda tier: tier.sync())
        with self.changed:
            self.queued_bytes -= sum(batch.size for batch in batches)
            self.done, self.ended = asked, closing
            self.changed.notify_all()

    def _use(self, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        self._each(f"uses of {len(keys)} pages are lost", lambda tier: tier.touch_many(keys, stamps))

    def _write(self, batch: WriteJob) -> None:
        lost, nothing = f"{len(batch.keys)} pages are lost", list[Item]()
        items = self.failures.guard(
            f"{lost}: they could not be loaded",
            lambda: list(zip(batch.keys, batch.load(), strict=True)),
            nothing,
        )
        if items is nothing:
            self.failed += len(batch.keys)
        else:
            self.failed += len(items) * self._each(lost, lambda tier: tier.put_many(items, batch.stamps))

    def _each(self, lost: str, action: Callable[[Tier], object]) -> int:
        """Do something with every tier; returns how many raised."""
        before = self.failures.count
        for tier in self.tiers:
            self.failures.guard(f"{tier.name}: {lost}", partial(action, tier), None)
        return self.failures.count - before
