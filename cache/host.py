"""The host tier: pages in this process's memory, the least recently used evicted first."""

import heapq
import threading
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from cache.tier import CLOCK_SLACK_NS, Item, Payload, TierStats, earlier, placed, stamps_now

STALE = 1024  # entries that do not count any more, beyond as many as there are pages, before they are swept out


class HostTier:
    """Pages in host memory under a budget in bytes of payload, the least recently used evicted first."""

    def __init__(self, budget_bytes: int) -> None:
        self.name = "host"
        self.budget_bytes = budget_bytes
        self.pages: dict[bytes, Payload] = {}
        self.used: dict[bytes, int] = {}  # stamps of these
        # A heap with a stamp and key for each page, and some more: a stamp may be out of date, but none is too late.
        self.oldest: list[tuple[int, bytes]] = []
        self.evicted_stamp = 0  # the latest use of any evicted page: an older page would be evicted next
        self.newest = 0  # stamp of any page that was put
        self.bytes = 0
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See Tier."""
        with self.lock:
            return [key in self.pages for key in keys]

    def touch_many(self, keys: Sequence[bytes], stamps: Sequence[int] | None = None) -> list[bool]:
        """See Tier."""
        with self.lock:
            self._use(keys, stamps)
            return [key in self.pages for key in keys]

    def demote_many(self, keys: Sequence[bytes], stamps: Sequence[int], seconds: float) -> None:
        """See Tier."""
        with self.lock:
            for key, stamp in zip(keys, stamps, strict=True):
                if earlier(stamp, seconds) < self.used.get(key, 0) <= stamp:
                    self.used[key] = earlier(stamp, seconds)
                    heapq.heappush(self.oldest, (self.used[key], key))
            if len(self.oldest) > 2 * len(self.used) + STALE:
                self._sweep()

    def recent(self, size: int, count: int) -> list[bytes]:
        """See Tier."""
        with self.lock:
            used = [(self.used[key], key) for key, page in self.pages.items() if memoryview(page).nbytes == size]
        return [key for _, key in heapq.nlargest(count, used)]

    def get_many(
        self,
        keys: Sequence[bytes],
        into: Sequence[np.ndarray] | None = None,
        stamps: Sequence[int] | None = None,
    ) -> list[Payload | None]:
        """See Tier."""
        with self.lock:
            found = [self.pages.get(key) for key in keys]
            self._use(keys, stamps)
        buffers = [None] * len(keys) if into is None else into
        result = [p if p is None else placed(p, buffer) for p, buffer in zip(found, buffers, strict=True)]
        hits = [memoryview(payload).nbytes for payload in result if payload is not None]
        with self.lock:
            self.counts.update(hits=len(hits), misses=len(keys) - len(hits), bytes_read=sum(hits))
        return result

    def put_many(self, items: Sequence[Item], stamps: Sequence[int] | None = None) -> None:
        """See Tier. A page larger than the whole budget is dropped."""
        used = stamps_now(len(items)) if stamps is None else stamps
        with self.lock:
            if self.newest > time.time_ns() + CLOCK_SLACK_NS:  # the clock was set back: all pages count as old
                self.newest = self.evicted_stamp = 0
                self.used = dict.fromkeys(self.pages, 0)
                self.oldest = [(0, key) for key in self.pages]
            self.newest = max([self.newest, *used[:1]])
            for (key, payload), stamp in zip(items, used, strict=True):
                size = memoryview(payload).nbytes
                if size > self.budget_bytes:
                    self.counts["dropped"] += 1
                elif key in self.pages:
                    self._use([key], [stamp])
                elif self._make_room(size, stamp):
                    self.pages[key], self.used[key] = payload, stamp
                    heapq.heappush(self.oldest, (stamp, key))
                    self.bytes += size
                    self.counts["bytes_written"] += size
                else:
                    self.counts["evicted"] += 1

    def delete(self, keys: Sequence[bytes]) -> bool:
        """See Tier."""
        with self.lock:
            for key in keys:
                if key in self.pages:
                    self.bytes -= memoryview(self.pages.pop(key)).nbytes
                    del self.used[key]
            self._sweep()
        return True

    def sync(self) -> None:
        """Do nothing: memory does not outlive the process."""

    def stats(self) -> TierStats:
        """See Tier."""
        with self.lock:
            return TierStats(self.name, len(self.pages), self.bytes, self.budget_bytes, open=True, **self.counts)

    def close(self) -> None:
        """Forget everything."""
        self.delete(list(self.pages))

    def _use(self, keys: Sequence[bytes], stamps: Sequence[int] | None) -> None:
        for key, stamp in zip(keys, stamps_now(len(keys)) if stamps is None else stamps, strict=True):
            if stamp > self.used.get(key, stamp):
                self.used[key] = stamp

    def _sweep(self) -> None:
        """Leave one entry for each page."""
        self.oldest = [(stamp, key) for key, stamp in self.used.items()]
        heapq.heapify(self.oldest)

    def _make_room(self, size: int, stamp: int) -> bool:
        """Evict to make room for a page of this size and last use; False if that page would be evicted next."""
        while self.bytes + size > self.budget_bytes and stamp > self.evicted_stamp:
            queued_at, key = self.oldest[0]
            if (used := self.used.get(key)) is None:  # evicted by another entry, from before it was demoted or after
                heapq.heappop(self.oldest)
            elif queued_at != used:
                heapq.heapreplace(self.oldest, (used, key))
            elif queued_at >= stamp:
                return False
            else:
                heapq.heappop(self.oldest)
                self.evicted_stamp = self.used.pop(key)
                self.bytes -= memoryview(self.pages.pop(key)).nbytes
                self.counts["evicted"] += 1
        return stamp > self.evicted_stamp
