"""The tiers below the device pool: one small protocol, the host memory tier, and reads over several tiers at once.

A tier maps 32-byte page keys (cache.keys) to opaque payloads. It never raises for what a disk or a network does: what
it cannot read is a miss, what it cannot write is dropped, and both are counted.
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

Payload = bytes | bytearray | memoryview  # a memoryview must be contiguous; nobody may change it once handed over
Item = tuple[bytes, Payload]  # page key, payload
T = TypeVar("T")

# How many keys a search asks a tier for at once: it ends where nothing more is found, so a cold prompt costs little.
SEARCH_STEP = 128
CLOCK_SLACK_NS = 60 * 10**9  # how far a clock may be set back, or differ from another process's, without notice
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
    open: bool = True  # whether it can be used now


class Tier(Protocol):
    """A place for pages. All methods may be called from any thread, and none raises for what lies below.

    A stamp is a page's last use in nanoseconds since 1970. Of two stamps the newer one stays on record, and the page
    with the oldest goes first. `stamps` has one for each key; None stands for now, the first key the most recent.
    A request stamps page i of its chain with the request's own time less i, whenever it reads or writes the page: so no
    page is newer than the one in front of it, and a chain loses its tail first. The stamp 0 is no use.
    """

    name: str
    budget_bytes: int

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are there. Does not count as a use."""

    def touch_many(self, keys: Sequence[bytes], stamps: Sequence[int] | None = None) -> list[bool]:
        """As contains_many, but a use. True where the tier cannot tell."""

    def get_many(
        self,
        keys: Sequence[bytes],
        into: Sequence[np.ndarray] | None = None,
        stamps: Sequence[int] | None = None,
    ) -> list[Payload | None]:
        """The payloads, None for a miss. A use.

        `into` has a slot for each key, [bytes] uint8, where its payload goes; one of another size is a miss.
        """

    def put_many(self, items: Sequence[Item], stamps: Sequence[int] | None = None) -> None:
        """Store pages, evicting the least recently used to stay in the budget; these may be among them.

        A key that is there is only touched.
        """

    def delete(self, keys: Sequence[bytes]) -> bool:
        """Forget the keys, where they are there; False if some of them may still be."""

    def sync(self) -> None:
        """Make what was put so far survive a power cut, as far as the tier can."""

    def stats(self) -> TierStats:
        """Contents and counters; at once, whatever the tier is busy with."""

    def close(self) -> None:
        """Let go of files and threads; the tier is not used after this."""


def stamps_now(count: int) -> Sequence[int]:
    """Stamps of a use at this moment, the first of `count` pages the most recent."""
    now = time.time_ns()
    return range(now, now - count, -1)


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


@dataclass(frozen=True)
class Fetched:
    """What a fetch found, in the order of its keys."""

    sources: list[str | None]  # the tier that each page came from, None for a miss
    # Spent reading in each tier that was asked; a tier that cannot be read yet answers at once.
    seconds: dict[str, float] = field(default_factory=dict)


class TieredPages:
    """Reads over several tiers, the fastest first. What a lower tier gave is kept in the first one too.

    A tier that raises is one that has nothing.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.tiers = tuple(tiers)
        # One thread: a second would only compete for the same disk, and a restore wants its first pages first.
        self.reader = Worker("restore")
        self.failures = Failures()
        self.hidden: frozenset[bytes] = frozenset()  # keys that are being deleted: nobody finds them meanwhile

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

    def touch(self, keys: Sequence[bytes], stamps: Sequence[int] | None = None) -> list[bool]:
        """Record a use of pages without reading them; returns which of them the lowest tier still has."""
        unknown = [True] * len(keys)
        there = unknown
        for tier in self.tiers:
            there = self.failures.guard(f"{tier.name}: uses are lost", partial(tier.touch_many, keys, stamps), unknown)
        return there

    def fetch(
        self,
        keys: Sequence[bytes],
        pages: np.ndarray,  # [keys, bytes of a page] uint8
        then: Callable[[Fetched], T],
        stamps: Sequence[int] | None = None,
    ) -> "Future[T]":
        """Read pages in the background, as `read`, and hand what was found to `then` on the same thread."""
        return self.reader.submit(lambda: then(self.read(keys, pages, stamps)))

    def read(
        self,
        keys: Sequence[bytes],
        pages: np.ndarray,  # [keys, bytes of a page] uint8
        stamps: Sequence[int] | None = None,
    ) -> Fetched:
        """Read each page to its row of `pages`; one that has meanwhile gone, or is corrupt, leaves anything there."""
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
        """What each tier has under the keys, by its name; in the background, no use, nothing is kept higher."""
        return self.reader.submit(lambda: {tier.name: self._copies(tier, keys) for tier in self.tiers})

    def _copies(self, tier: Tier, keys: Sequence[bytes]) -> list[Payload | None]:
        never = [0] * len(keys)
        nothing: list[Payload | None] = [None] * len(keys)
        return self.failures.guard(f"{tier.name}: no audit", lambda: tier.get_many(keys, stamps=never), nothing)

    def forget(self, keys: Sequence[bytes]) -> "Future[bool]":
        """Delete pages from every tier, once the reads under way have ended; False where some may still be there."""
        return self.reader.submit(self._forget, keys)

    def _forget(self, keys: Sequence[bytes]) -> bool:
        gone = True
        for tier in self.tiers:
            deleted = partial(tier.delete, keys)
            gone = self.failures.guard(f"{tier.name}: pages are not deleted", deleted, False) and gone
        return gone

    def stats(self) -> list[TierStats]:
        """The stats of each tier, the fastest first; at once."""
        return [tier.stats() for tier in self.tiers]

    def close(self, seconds: float = 60.0) -> bool:
        """Drop the fetches that wait, and close all tiers at once; False if that takes longer than `seconds`.

        What takes longer goes on in daemon threads.
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

    def _locate(self, keys: Sequence[bytes]) -> list[str | None]:
        names: list[str | None] = [None] * len(keys)
        for tier in self.tiers:
            missing = [i for i, name in enumerate(names) if name is None]
            wanted, nothing = [keys[i] for i in missing], [False] * len(missing)
            search = partial(tier.contains_many, wanted)
            found = self.failures.guard(f"{tier.name}: pages are missed", search, nothing)
            for i, there in zip(missing, found, strict=True):
                names[i] = tier.name if there and keys[i] not in self.hidden else None
        return names
