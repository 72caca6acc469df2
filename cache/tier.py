"""The protocol of a tier below the device pool, and reads over several tiers.

A tier maps 32-byte page keys (cache.keys) to opaque payloads. It never raises for a failing disk or network: what it
cannot read is a miss, what it cannot write is dropped, and both are counted.
"""

import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import xxhash

from cache.worker import Failures, Worker

Payload = bytes | bytearray | memoryview  # a memoryview must be contiguous, and must not change once handed over
Item = tuple[bytes, Payload]  # page key, payload
T = TypeVar("T")

# Keys that a search asks a tier for at once: it stops after a step without a hit, so a cold prompt costs little.
SEARCH_STEP = 128
CLOCK_SLACK_NS = 60 * 10**9  # tolerated when a clock is set back or differs from another process's
SEAL = struct.Struct("<QQ")  # payload length in bytes, XXH3-64 of key and payload


@dataclass(frozen=True)
class TierStats:
    """What a tier holds now, and counters since it was opened by this process."""

    name: str
    pages: int
    bytes: int  # occupied, including the tier's own overhead
    budget_bytes: int  # 0: no limit
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    evicted: int = 0
    corrupt: int = 0  # records that failed their checksum; each was a miss and was removed
    dropped: int = 0  # pages that could not be written
    errors: int = 0  # failed operations of the disk or the network
    open: bool = True  # whether it can be used now


class Tier(Protocol):
    """A place for pages. All methods may be called from any thread, and none raises for a failing disk or network.

    A stamp is a page's last use in nanoseconds since 1970. The newer of two stamps is kept, and the page with the
    oldest is evicted first. `stamps` has one for each key; None means now, the first key the most recent. A request
    stamps page i of its chain with the request's own time minus i, whenever it reads or writes the page: so no page is
    newer than the one before it, and a chain loses its end first. The stamp 0 does not count as a use.
    """

    name: str
    budget_bytes: int

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each key is there. Does not count as a use."""

    def touch_many(self, keys: Sequence[bytes], stamps: Sequence[int] | None = None) -> list[bool]:
        """As contains_many, but counts as a use. True where the tier cannot know."""

    def demote_many(self, keys: Sequence[bytes], stamps: Sequence[int], seconds: float) -> None:
        """Count these uses of pages as if they had been so much earlier: who made them is not expected back soon.

        A page that was used since, by anybody, keeps its stamp, and so does every page of a tier without stamps. Of
        several calls about one use, the one with the most seconds counts.
        """

    def recent(self, size: int, count: int) -> list[bytes]:
        """Keys of up to `count` pages of `size` bytes, the most recently used first; none where uses are unknown."""

    def get_many(
        self,
        keys: Sequence[bytes],
        into: Sequence[np.ndarray] | None = None,
        stamps: Sequence[int] | None = None,
    ) -> list[Payload | None]:
        """The payloads, None for a miss. Counts as a use.

        `into` has a buffer for each key, [bytes] uint8, to copy its payload to; a payload of another size is a miss.
        """

    def put_many(self, items: Sequence[Item], stamps: Sequence[int] | None = None) -> None:
        """Store pages, evicting the least recently used, perhaps some of these, to stay within the budget.

        A key that is there already is only touched.
        """

    def delete(self, keys: Sequence[bytes]) -> bool:
        """Delete the keys that are there; return False if some may still be there."""

    def sync(self) -> None:
        """Make what was put so far survive a power cut, if the tier can."""

    def stats(self) -> TierStats:
        """Contents and counters; returns at once, even while the tier is busy."""

    def close(self) -> None:
        """Release files and threads; the tier is not used after this."""


def stamps_now(count: int) -> Sequence[int]:
    """Stamps of a use at this moment, the first of `count` pages the most recent."""
    now = time.time_ns()
    return range(now, now - count, -1)


def earlier(stamp: int, seconds: float) -> int:
    """The stamp of a use so many seconds earlier; above 0, which is no use."""
    return max(1, stamp - round(1e9 * seconds))


def seal(key: bytes, payload: Payload) -> bytes:
    """Length and checksum of a page record, SEAL.size bytes. It covers the key, so no page can pass for another.

    The checksum is XXH3-64 (https://xxhash.com).
    """
    digest = xxhash.xxh3_64(key)
    digest.update(payload)
    return SEAL.pack(memoryview(payload).nbytes, digest.intdigest())


def placed(payload: Payload, buffer: np.ndarray | None) -> Payload | None:
    """The payload, copied to `buffer` ([bytes] uint8) if there is one; None if the sizes differ."""
    if buffer is None:
        return payload
    if memoryview(payload).nbytes != buffer.nbytes:
        return None
    # numpy releases the interpreter lock meanwhile.
    np.copyto(buffer, np.frombuffer(payload, np.uint8))
    return buffer.data


@dataclass(frozen=True)
class Fetched:
    """The result of a fetch, in the order of its keys."""

    sources: list[str | None]  # the tier that each page came from, None for a miss
    # Spent reading in each tier that was asked.
    seconds: dict[str, float] = field(default_factory=dict)


class TieredPages:
    """Reads over several tiers, the fastest first. What a lower tier returned is also kept in the first one.

    A tier that raises counts as empty.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.tiers = tuple(tiers)
        # One thread: a second would compete for the same disk, and a restore needs its first pages first.
        self.reader = Worker("restore")
        self.failures = Failures()
        self.hidden: frozenset[bytes] = frozenset()  # keys that are being deleted, and are not found meanwhile

    def locate(self, keys: Sequence[bytes]) -> list[str | None]:
        """The first tier that has each key of a chain, None for a miss; reads nothing and does not count as a use.

        It stops after SEARCH_STEP keys without a hit: later keys are None too.
        """
        names: list[str | None] = []
        for start in range(0, len(keys), SEARCH_STEP):
            step = self._locate(keys[start : start + SEARCH_STEP])
            names += step
            if not any(step):
                break
        return names + [None] * (len(keys) - len(names))

    def touch(self, keys: Sequence[bytes], stamps: Sequence[int] | None = None) -> list[bool]:
        """Record a use of pages without reading them; return whether the lowest tier still has each."""
        unknown = [True] * len(keys)
        there = unknown
        for tier in self.tiers:
            there = self.failures.guard(f"{tier.name}: uses are lost", partial(tier.touch_many, keys, stamps), unknown)
        return there

    def recent(self, size: int, count: int) -> list[bytes]:
        """Keys of up to `count` pages of `size` bytes in any tier, of each tier the most recently used first."""
        keys, nothing = list[bytes](), list[bytes]()
        for tier in self.tiers:
            listed = partial(tier.recent, size, count)
            keys += self.failures.guard(f"{tier.name}: nothing is preloaded", listed, nothing)
        return [key for key in dict.fromkeys(keys) if key not in self.hidden][:count]

    def fetch(
        self,
        keys: Sequence[bytes],
        pages: np.ndarray,  # [keys, bytes of a page] uint8
        then: Callable[[Fetched], T],
        stamps: Sequence[int] | None = None,
    ) -> "Future[T]":
        """Read pages in the background, as `read` does, and call `then` with the result on the same thread."""
        return self.reader.submit(lambda: then(self.read(keys, pages, stamps)))

    def read(
        self,
        keys: Sequence[bytes],
        pages: np.ndarray,  # [keys, bytes of a page] uint8
        stamps: Sequence[int] | None = None,
    ) -> Fetched:
        """Read each page to its row of `pages`; the row of a page that is gone or corrupt may hold anything."""
        used = stamps_now(len(keys)) if stamps is None else stamps
        sources: list[str | None] = [None] * len(keys)
        seconds: dict[str, float] = {}
        for tier in self.tiers:
            missing = [i for i, source in enumerate(sources) if source is None]
            if not missing:
                break
            wanted = [keys[i] for i in missing], [pages[i] for i in missing], [used[i] for i in missing]
            nothing: list[Payload | None] = [None] * len(missing)
            start = time.perf_counter()
            found = self.failures.guard(f"{tier.name}: pages are missed", partial(tier.get_many, *wanted), nothing)
            seconds[tier.name] = time.perf_counter() - start
            for i, payload in zip(missing, found, strict=True):
                sources[i] = tier.name if payload is not None else None
        top = self.tiers[0]
        below = [i for i, source in enumerate(sources) if source not in (None, top.name) and used[i]]
        if below:
            self.failures.guard(
                f"{top.name}: pages are not kept",
                lambda: top.put_many([(keys[i], pages[i].tobytes()) for i in below], [used[i] for i in below]),
                None,
            )
        return Fetched(sources, seconds)

    def copies(self, keys: Sequence[bytes]) -> "Future[dict[str, list[Payload | None]]]":
        """What each tier has under the keys, by the tier's name; read in the background, without a use."""
        return self.reader.submit(lambda: {tier.name: self._copies(tier, keys) for tier in self.tiers})

    def _copies(self, tier: Tier, keys: Sequence[bytes]) -> list[Payload | None]:
        never = [0] * len(keys)
        nothing: list[Payload | None] = [None] * len(keys)
        return self.failures.guard(f"{tier.name}: no audit", lambda: tier.get_many(keys, stamps=never), nothing)

    def forget(self, keys: Sequence[bytes]) -> "Future[bool]":
        """Delete pages from every tier, after the reads under way; False if some may still be there."""
        return self.reader.submit(self._forget, keys)

    def _forget(self, keys: Sequence[bytes]) -> bool:
        gone = True
        for tier in self.tiers:
            deleted = partial(tier.delete, keys)
            gone = self.failures.guard(f"{tier.name}: pages are not deleted", deleted, False) and gone
        return gone

    def stats(self) -> list[TierStats]:
        """The stats of each tier, the fastest first; returns at once."""
        return [tier.stats() for tier in self.tiers]

    def close(self, seconds: float = 60.0) -> bool:
        """Drop the fetches that wait, and close all tiers in parallel; False if that takes longer than `seconds`.

        Tiers that take longer continue to close in daemon threads.
        """
        end = time.monotonic() + seconds
        self.reader.stop()
        closers = [self.reader.thread]
        for tier in self.tiers:
            close = partial(self.failures.guard, f"{tier.name}: not closed", tier.close, None)
            closers.append(threading.Thread(target=close, daemon=True))
            closers[-1].start()
        for closer in closers:
            closer.join(max(0.0, end - time.monotonic()))
        return not any(closer.is_alive() for closer in closers)

    def has(self, tier: Tier, keys: Sequence[bytes]) -> list[bool]:
        """Whether one of the tiers has each key; not a use of it."""
        search = partial(tier.contains_many, keys)
        found = self.failures.guard(f"{tier.name}: pages are missed", search, [False] * len(keys))
        return [there and key not in self.hidden for key, there in zip(keys, found, strict=True)]

    def _locate(self, keys: Sequence[bytes]) -> list[str | None]:
        names: list[str | None] = [None] * len(keys)
        for tier in self.tiers:
            missing = [i for i, name in enumerate(names) if name is None]
            for i, there in zip(missing, self.has(tier, [keys[i] for i in missing]), strict=True):
                names[i] = tier.name if there else None
        return names
