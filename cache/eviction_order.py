"""What to evict next, by ranks that change with time (`cache.eviction`): a heap for each way in which they change."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Generic, TypeVar

from cache.eviction import Rank

T = TypeVar("T")

STALE = 64  # entries that do not count any more, beyond as many as count, before they are swept out


class EvictionOrder(Generic[T]):
    """Items in the order of their ranks. `put`, `discard` and `pop` take O(log n), however many ranks have changed."""

    def __init__(self, rank: Callable[[T, float], Rank]) -> None:
        self.rank = rank
        self.serials = itertools.count()
        self.entries: dict[T, int] = {}  # the serial number of each item's entry; older entries do not count
        # By level and slope: minus the rank's offset, the serial number, the item. The first is evicted first.
        self.heaps: dict[tuple[int, int], list[tuple[float, int, T]]] = {}
        self.changing: list[tuple[float, int, T]] = []  # when a rank is another one
        self.queued = 0  # entries in `heaps`
        self.evicted = 0.0  # minus the offset of the latest item of slope 0: the clock of rules without time

    def __contains__(self, item: T) -> bool:
        """Whether it is here."""
        return item in self.entries

    def __len__(self) -> int:
        """How many items there are."""
        return len(self.entries)

    def put(self, item: T, now: float) -> None:
        """Add an item, or rank it anew."""
        self.place(item, self.rank(item, now))

    def place(self, item: T, rank: Rank) -> None:
        """Add an item with a rank of its own until that changes, or give it this one."""
        serial = next(self.serials)
        self.entries[item] = serial
        heapq.heappush(self.heaps.setdefault((rank.level, rank.slope), []), (-rank.offset, serial, item))
        self.queued += 1
        if rank.until < math.inf:
            heapq.heappush(self.changing, (rank.until, serial, item))
        if self.queued > 2 * len(self.entries) + STALE:
            self._sweep()

    def discard(self, item: T) -> None:
        """Take an item out, if it is here."""
        self.entries.pop(item, None)

    def pop(self, now: float) -> T | None:
        """Take out the item to evict next; None if there is none."""
        while self.changing and self.changing[0][0] <= now:
            _, serial, item = heapq.heappop(self.changing)
            if self.entries.get(item) == serial:
                self.put(item, now)
        firsts = [(level, offset - slope * now, slope) for level, slope, offset in self._firsts()]
        if not firsts:
            return None
        level, _, slope = min(firsts)
        offset, _, item = heapq.heappop(self.heaps[level, slope])
        if not slope:
            self.evicted = max(self.evicted, offset)
        self.queued -= 1
        del self.entries[item]
        return item

    def _firsts(self) -> list[tuple[int, int, float]]:
        """Level, slope and minus the offset of the first item of each heap that has any."""
        found = []
        for (level, slope), heap in self.heaps.items():
            while heap and self.entries.get(heap[0][2]) != heap[0][1]:
                heapq.heappop(heap)
                self.queued -= 1
            if heap:
                found.append((level, slope, heap[0][0]))
        return found

    def _sweep(self) -> None:
        for heap in (*self.heaps.values(), self.changing):
            heap[:] = [entry for entry in heap if self.entries.get(entry[2]) == entry[1]]
            heapq.heapify(heap)
        self.queued = sum(map(len, self.heaps.values()))
