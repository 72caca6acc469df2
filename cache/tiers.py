"""The tiers below the device pool: one small protocol, the host memory tier, and reads over several tiers at once.

A tier maps 32-byte page keys (cache.keys) to opaque payloads. It never raises for what a disk or a network does: what
it cannot read is a miss, what it cannot write is dropped, and both are counted.
"""

import struct
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import xxhash

Payload = bytes | bytearray | memoryview  # a memoryview must be contiguous; nobody may change it once handed over
Item = tuple[bytes, Payload]  # page key, payload
T = TypeVar("T")

# How many keys a search asks a tier for at once: it ends where nothing more is found, so a cold prompt costs little.
SEARCH_STEP = 128
SEAL = struct.Struct("<QQ")  # payload length in bytes, XXH3-64 of key and payload


@dataclass(frozen=True)
class TierStats:
    """What a tier holds now, and counters since it was opened by this process."""

    name: str
    pages: int
    bytes: int  # occupied, the tier's own overhead included
    budget_bytes: int  # 0: no limit
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    evicted: int = 0
    corrupt: int = 0  # records that failed their checksum: each was a miss, and was removed
    dropped: int = 0  # pages that could not be written
    errors: int = 0  # failed operations of the disk or the network


class Tier(Protocol):
    """A place for pages. All methods may be called from any thread, and none raises for what lies below."""

    name: str
    budget_bytes: int

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are there. Does not count as a use."""

    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
        """As contains_many, but a use: of pages that were found further up. True where the tier cannot tell."""

    def get_many(self, keys: Sequence[bytes], into: Sequence[np.ndarray] | None = None) -> list[Payload | None]:
        """The payloads, None for a miss. A use, the first key the most recent one: so a chain loses its tail first.

        `into` has a slot for each key, [bytes] uint8, where its payload goes; one of another size is a miss.
        """

    def put_many(self, items: Sequence[Item]) -> None:
        """Store pages, evicting the least recently used to stay in the budget. A key that is there is only touched."""

    def delete(self, keys: Sequence[bytes]) -> None:
        """Forget the keys, where they are there."""

    def sync(self) -> None:
        """Make what was put so far survive a power cut, as far as the tier can."""

    def stats(self) -> TierStats:
        """Contents and counters."""

    def close(self) -> None:
        """Let go of files and threads; the tier is not used after this."""


def seal(key: bytes, payload: Payload) -> bytes:
    """Length and checksum of a page record: SEAL.size bytes. It covers the key, so that no page passes as another."""
    digest = xxhash.xxh3_64(key)
    digest.update(payload)
    return SEAL.pack(memoryview(payload).nbytes, digest.intdigest())


def placed(payload: Payload, slot: np.ndarray | None) -> Payload | None:
    """The payload, in its slot ([bytes] uint8) if there is one; None if it is of another size."""
    if slot is None:
        return payload
    if memoryview(payload).nbytes != slot.nbytes:
        return None
    # numpy lets other threads run meanwhile.
    np.copyto(slot, np.frombuffer(payload, np.uint8))
    return slot.data


class HostTier:
    """Pages in host memory: least recently used out first, under a budget in bytes of payload."""

    def __init__(self, budget_bytes: int) -> None:
        self.name = "host"
        self.budget_bytes = budget_bytes
        self.pages: OrderedDict[bytes, Payload] = OrderedDict()  # least recently used first
        self.bytes = 0
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See Tier."""
        with self.lock:
            return [key in self.pages for key in keys]

    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See Tier."""
        with self.lock:
            self._use(keys)
            return [key in self.pages for key in keys]

    def get_many(self, keys: Sequence[bytes], into: Sequence[np.ndarray] | None = None) -> list[Payload | None]:
        """See Tier."""
        with self.lock:
            found = [self.pages.get(key) for key in keys]
            self._use(keys)
        slots = [None] * len(keys) if into is None else into
        result = [p if p is None else placed(p, slot) for p, slot in zip(found, slots, strict=True)]
        hits = [memoryview(payload).nbytes for payload in result if payload is not None]
        with self.lock:
            self.counts.update(hits=len(hits), misses=len(keys) - len(hits), bytes_read=sum(hits))
        return result

    def put_many(self, items: Sequence[Item]) -> None:
        """See Tier. A page larger than the whole budget is dropped."""
        with self.lock:
            for key, payload in reversed(items):
                size = memoryview(payload).nbytes
                if size > self.budget_bytes:
                    self.counts["dropped"] += 1
                elif key in self.pages:
                    self.pages.move_to_end(key)
                else:
                    self._evict(self.budget_bytes - size)
                    self.pages[key] = payload
                    self.bytes += size
                    self.counts["bytes_written"] += size

    def delete(self, keys: Sequence[bytes]) -> None:
        """See Tier."""
        with self.lock:
            for key in keys:
                payload = self.pages.pop(key, None)
                self.bytes -= memoryview(payload).nbytes if payload is not None else 0

    def sync(self) -> None:
        """Nothing: memory does not outlive the process."""

    def stats(self) -> TierStats:
        """See Tier."""
        return TierStats(self.name, len(self.pages), self.bytes, self.budget_bytes, **self.counts)

    def close(self) -> None:
        """Forget everything."""
        self.delete(list(self.pages))

    def _use(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            if key in self.pages:
                self.pages.move_to_end(key)

    def _evict(self, budget_bytes: int) -> None:
        while self.bytes > budget_bytes:
            _, payload = self.pages.popitem(last=False)
            self.bytes -= memoryview(payload).nbytes
            self.counts["evicted"] += 1


@dataclass(frozen=True)
class Fetched:
    """What a fetch found, in the order of its keys."""

    sources: list[str | None]  # the tier that each page came from, None for a miss
    seconds: dict[str, float] = field(default_factory=dict)  # spent in each tier that was asked


class TieredPages:
    """Reads over several tiers, the fastest first. What a lower tier gave is kept in the first one too."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.tiers = tuple(tiers)
        # One thread: a second would only compete for the same disk, and a restore wants its first pages first.
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="restore")

    def locate(self, keys: Sequence[bytes]) -> list[str | None]:
        """The first tier that has each key of a chain, None for a miss; nothing is read, and nothing counts as used.

        It looks no further than SEARCH_STEP keys without a hit: what comes behind is None too.
        """
        names: list[str | None] = []
        for start in range(0, len(keys), SEARCH_STEP):
            step = self._locate(keys[start : start + SEARCH_STEP])
            names += step
            if not any(step):
                break
        return names + [None] * (len(keys) - len(names))

    def touch(self, keys: Sequence[bytes]) -> list[bool]:
        """Record a use of pages that are on the device anyway; returns which of them the lowest tier still has."""
        return [tier.touch_many(keys) for tier in self.tiers][-1]

    def fetch(self, keys: Sequence[bytes], pages: np.ndarray, then: Callable[[Fetched], T]) -> "Future[T]":
        """Read pages in the background, as `read`, and hand what was found to `then` on the same thread."""
        return self.reader.submit(lambda: then(self.read(keys, pages)))

    def read(
        self,
        keys: Sequence[bytes],
        pages: np.ndarray,  # [keys, bytes of a page] uint8
    ) -> Fetched:
        """Read each page to its row of `pages`; one that has meanwhile gone, or is corrupt, leaves anything there."""
        sources: list[str | None] = [None] * len(keys)
        seconds: dict[str, float] = {}
        for tier in self.tiers:
            missing = [i for i, source in enumerate(sources) if source is None]
            if not missing:
                break
            start = time.perf_counter()
            found = tier.get_many([keys[i] for i in missing], [pages[i] for i in missing])
            for i, payload in zip(missing, found, strict=True):
                sources[i] = tier.name if payload is not None else None
            seconds[tier.name] = time.perf_counter() - start
        top = self.tiers[0]
        below = [i for i, source in enumerate(sources) if source not in (None, top.name)]
        top.put_many([(keys[i], pages[i].tobytes()) for i in below])
        return Fetched(sources, seconds)

    def stats(self) -> list[TierStats]:
        """The stats of each tier, the fastest first."""
        return [tier.stats() for tier in self.tiers]

    def close(self) -> None:
        """Finish the fetch that is running, drop those that wait, and close all tiers."""
        self.reader.shutdown(cancel_futures=True)
        for tier in self.tiers:
            tier.close()

    def _locate(self, keys: Sequence[bytes]) -> list[str | None]:
        names: list[str | None] = [None] * len(keys)
        for tier in self.tiers:
            missing = [i for i, name in enumerate(names) if name is None]
            for i, there in zip(missing, tier.contains_many([keys[i] for i in missing]), strict=True):
                names[i] = tier.name if there else None
        return names
