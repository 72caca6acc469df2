"""Write-back: a thread that writes pages from a bounded queue to the tiers within a second.

The producer never waits: pages that do not fit into the queue are dropped and counted, as they can be recomputed.
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
    """Pages to write: `load` runs on the write-back thread and returns one payload per key."""

    keys: Sequence[bytes]
    stamps: Sequence[int]  # see Tier
    size: int  # bytes of all payloads together
    load: Callable[[], Sequence[Payload]]


class WriteBack:
    """Writes jobs to every tier in order and syncs them, at most `flush_seconds` after they were queued.

    `queue_bytes` bounds the queue, device copies included. When it is full, new jobs are dropped: those in the queue
    are earlier in their chains, and a chain is useless without its start. An exception in a tier costs only that tier's
    pages.
    """

    def __init__(self, tiers: Sequence[Tier], flush_seconds: float = 1.0, queue_bytes: int = 1 << 30) -> None:
        self.tiers = tuple(tiers)
        self.flush_seconds = flush_seconds
        self.queue_bytes = queue_bytes
        self.queued: deque[WriteJob] = deque()
        self.queued_bytes = 0  # includes the job that is being written
        self.used: list[tuple[Sequence[bytes], Sequence[int]]] = []  # keys and stamps of pages before these
        self.used_pages = 0
        self.demoted: list[tuple[Sequence[bytes], Sequence[int], float]] = []
        self.demoted_pages = 0
        self.dropped = 0  # pages that the queue had no room for
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
        """Queue pages of `size` bytes in all; returns at once, False if they had to be dropped."""
        with self.changed:
            if not self.has_room(size):
                self.dropped += len(keys)
                return False
            self.queued.append(WriteJob(keys, stamps_now(len(keys)) if stamps is None else stamps, size, load))
            self.queued_bytes += size
            self.changed.notify_all()
            return True

    def use(self, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        """Record a use of pages before any job that is submitted later."""
        with self.changed:
            if self.used_pages < MAX_USES:
                self.used.append((keys, stamps))
                self.used_pages += len(keys)

    def demote(self, keys: Sequence[bytes], stamps: Sequence[int], seconds: float) -> None:
        """Count uses of pages as earlier ones, after all jobs that were submitted before: see Tier.demote_many."""
        with self.changed:
            if self.demoted_pages < MAX_USES:
                self.demoted.append((keys, stamps, seconds))
                self.demoted_pages += len(keys)

    def has_room(self, size: int) -> bool:
        """Whether `submit` would take `size` bytes now; an empty queue takes a job of any size."""
        return not self.closing and (not self.queued_bytes or self.queued_bytes + size <= self.queue_bytes)

    def drop(self, pages: int) -> None:
        """Count pages that the caller dropped because the queue was full for too long."""
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

        False if that takes over `seconds`: what is still queued then is lost if the process ends.
        """
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def _run(self) -> None:
        while not self.ended:
            with self.changed:
                # With a timeout: the tiers have uses to record even when nothing is written.
                self.changed.wait_for(self._has_work, max(self.flush_seconds, 0.05))
                if self.queued:
                    # Half of the allowed time is for gathering jobs, the other half for writing them.
                    self.changed.wait_for(self._in_a_hurry, self.flush_seconds / 2)
            self._write_queued()

    def _has_work(self) -> bool:
        return bool(self.queued) or self.asked > self.done or self.closing

    def _in_a_hurry(self) -> bool:
        return self.asked > self.done or self.closing or self.queued_bytes > self.queue_bytes // 2

    def _write_queued(self) -> None:
        with self.changed:
            jobs, used, asked, closing = list(self.queued), self.used, self.asked, self.closing
            self.queued.clear()
            self.used, self.used_pages = [], 0
            demoted, self.demoted, self.demoted_pages = self.demoted, [], 0
        for keys, stamps in used:
            self._use(keys, stamps)
        for job in jobs:
            self._write(job)
        for keys, stamps, seconds in demoted:
            self._demote(keys, stamps, seconds)
        self._each("nothing is written through to the disk", lambda tier: tier.sync())
        with self.changed:
            self.queued_bytes -= sum(job.size for job in jobs)
            self.done, self.ended = asked, closing
            self.changed.notify_all()

    def _use(self, keys: Sequence[bytes], stamps: Sequence[int]) -> None:
        self._each(f"uses of {len(keys)} pages are lost", lambda tier: tier.touch_many(keys, stamps))

    def _demote(self, keys: Sequence[bytes], stamps: Sequence[int], seconds: float) -> None:
        self._each(f"{len(keys)} pages stay for longer", lambda tier: tier.demote_many(keys, stamps, seconds))

    def _write(self, job: WriteJob) -> None:
        lost, nothing = f"{len(job.keys)} pages are lost", list[Item]()
        items = self.failures.guard(
            f"{lost}: they could not be loaded",
            lambda: list(zip(job.keys, job.load(), strict=True)),
            nothing,
        )
        if items is nothing:
            self.failed += len(job.keys)
        else:
            self.failed += len(items) * self._each(lost, lambda tier: tier.put_many(items, job.stamps))

    def _each(self, lost: str, action: Callable[[Tier], object]) -> int:
        """Apply an action to every tier; return how many raised."""
        before = self.failures.count
        for tier in self.tiers:
            self.failures.guard(f"{tier.name}: {lost}", partial(action, tier), None)
        return self.failures.count - before
