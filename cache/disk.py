"""The disk tier: pages in LMDB, shared by any number of processes on one machine.

`pages` maps a key to its payload; `entries` maps it to seal (length and XXH3-64) and last use. What lists, counts or
evicts reads `entries` alone. The seal is checked on every read, since LMDB has no checksums of its own.
"""

import heapq
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np

from cache.environment import Databases, SharedEnvironment, full
from cache.tiers import SEAL, Item, Payload, TierStats, placed, seal

STAMP = struct.Struct("<Q")  # last use, nanoseconds since 1970
ENTRY_BYTES = SEAL.size + STAMP.size
# Written at once. LMDB uses small buffers again; large ones are new each time and cost a page fault every 4 KiB.
TRANSACTION_BYTES = 1 << 20
EVICTED_SHARE = 16  # an eviction frees 1/16 of the budget more than it must, so that few are needed
OVERHEAD_BYTES = 64 << 20  # of the map, for the trees and for pages that are being replaced

Write = tuple[bytes, Payload, int]  # key, payload, stamp


@dataclass(frozen=True)
class Entry:
    """One stored page, without its payload."""

    key: bytes
    size: int  # bytes
    last_used: float  # seconds since 1970


def room_for(size: int) -> int:
    """Bytes that a payload of `size` bytes takes in LMDB: whole pages, a header, and its share of a tree."""
    return -(-(size + 16) // 4096) * 4096 + 512


class DiskTier:
    """Pages on a local disk, least recently used out first, under a budget in bytes that all processes share.

    A killed process loses nothing that put_many returned for. A power cut loses what was put since the last sync(), and
    may tear the tree: then the next open finds that out and starts empty. The file never shrinks; it grows to about the
    budget and its pages are used again. A full disk, a read-only or a vanished directory cost hits, nothing else.

    Raises StoreError if `directory` is another program's or version's, and with `repair` off if its tree is damaged.
    """

    def __init__(
        self, directory: str | Path, budget_bytes: int, *, touch_seconds: float = 60.0, repair: bool = True
    ) -> None:
        self.name = "disk"
        self.budget_bytes = budget_bytes
        self.touch_seconds = touch_seconds  # a use is recorded only if the one on record is older than this
        self.counts: Counter[str] = Counter()
        self.touched: dict[bytes, int] = {}  # uses that the next write records, nanoseconds since 1970
        self.latest = 0  # the newest stamp given out
        self.unsynced = False
        self.lock = threading.Lock()  # of counts, touched, latest
        self.store = SharedEnvironment(Path(directory), budget_bytes + budget_bytes // 4 + OVERHEAD_BYTES, repair)

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See Tier."""

        def look(dbs: Databases) -> list[bool]:
            with dbs.env.begin() as txn, txn.cursor(dbs.entries) as cursor:
                return [cursor.set_key(key) for key in keys]

        return self.store.attempt("read", look, [False] * len(keys))

    def touch_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See Tier."""
        first = self._stamps(len(keys))

        def look(dbs: Databases) -> list[bool]:
            with dbs.env.begin() as txn:
                entries = [txn.get(key, db=dbs.entries) for key in keys]
            for i, (key, entry) in enumerate(zip(keys, entries, strict=True)):
                if entry is not None:
                    self._touch(key, entry, first - i)
            return [entry is not None for entry in entries]

        return self.store.attempt("read", look, [True] * len(keys))

    def get_many(self, keys: Sequence[bytes], into: Sequence[np.ndarray] | None = None) -> list[Payload | None]:
        """See Tier. A record that its seal does not fit is a miss, counted and removed."""
        first = self._stamps(len(keys))
        slots = [None] * len(keys) if into is None else into
        return [self._get(key, first - i, slot) for i, (key, slot) in enumerate(zip(keys, slots, strict=True))]

    def put_many(self, items: Sequence[Item]) -> None:
        """See Tier. Dropped are pages beyond what the whole budget holds, and what the disk has no room for."""
        first = self._stamps(len(items))
        sizes = [memoryview(payload).nbytes for _, payload in items]
        batch_bytes, batch, total = 0, list[Write](), 0
        for i, ((key, payload), size) in enumerate(zip(items, sizes, strict=True)):
            total += room_for(size)
            if total > self.budget_bytes:
                self._count(dropped=len(items) - i)
                break
            if batch and batch_bytes + size > min(TRANSACTION_BYTES, self.budget_bytes // 4):
                self._put(batch)
                batch_bytes, batch = 0, []
            batch_bytes += size
            batch.append((key, payload, first - i))
        self._put(batch)

    def delete(self, keys: Sequence[bytes]) -> None:
        """See Tier."""

        def remove(dbs: Databases) -> None:
            with dbs.env.begin(write=True) as txn:
                for key in keys:
                    _delete(dbs, txn, key)

        self.store.attempt("write", remove, None)

    def sync(self) -> None:
        """Record the latest uses and write everything through to the disk: bounds what a power cut can take."""
        if self.touched:
            self.store.attempt("write", self._record_uses, None)
        if self.unsynced:
            self.unsynced = False
            self.store.attempt("write", lambda dbs: dbs.env.sync(True), None)

    def stats(self) -> TierStats:
        """See Tier."""

        def measure(dbs: Databases) -> tuple[int, int]:
            with dbs.env.begin() as txn:
                return txn.stat(dbs.entries)["entries"], dbs.occupied(txn)

        pages, occupied = self.store.attempt("read", measure, (0, 0))
        return TierStats(self.name, pages, occupied, self.budget_bytes, errors=self.store.errors, **self.counts)

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self.store.close()

    def entries(self) -> list[Entry]:
        """All pages that are stored, by key."""

        def scan(dbs: Databases) -> list[Entry]:
            with dbs.env.begin() as txn, txn.cursor(dbs.entries) as cursor:
                return [Entry(key, _size(entry), _last_used(entry) / 1e9) for key, entry in cursor]

        return self.store.attempt("read", scan, [])

    def check(self, remove: bool) -> Iterator[bool]:
        """Read every page there is and say whether it is sound; with `remove`, remove those that are not."""

        def scan(dbs: Databases) -> list[bytes]:
            with dbs.env.begin() as txn, txn.cursor(dbs.entries) as a, txn.cursor(dbs.pages) as b:
                return sorted({*a.iternext(values=False), *b.iternext(values=False)})

        no_keys: list[bytes] = []
        for key in self.store.attempt("read", scan, no_keys):
            entry, payload = self._load(key)
            gone = entry is None and payload is None  # evicted by another process since the scan
            sound = gone or _is_sound(key, entry, payload)
            if not sound and remove:
                self._remove_damaged(key, entry)
            yield sound

    def prune(self, budget_bytes: int) -> int:
        """Evict the least recently used pages until they occupy at most `budget_bytes`; returns how many went."""
        before = self.counts["evicted"]
        self.store.attempt("write", lambda dbs: self._evict(dbs, budget_bytes), None)
        return self.counts["evicted"] - before

    def _get(self, key: bytes, stamp: int, slot: np.ndarray | None) -> Payload | None:
        entry, payload = self._load(key, slot)
        if entry is None:
            self._count(misses=1)
            return None
        if not _is_sound(key, entry, payload):
            self._remove_damaged(key, entry)
            self._count(misses=1, corrupt=1)
            return None
        assert payload is not None
        if slot is not None and _size(entry) != slot.nbytes:
            self._count(misses=1)
            return None
        self._touch(key, entry, stamp)
        self._count(hits=1, bytes_read=_size(entry))
        return payload

    def _load(self, key: bytes, slot: np.ndarray | None = None) -> tuple[bytes | None, Payload | None]:
        """What is stored under the key, entry and payload, unchecked; the payload in `slot` if it fits there."""

        def load(dbs: Databases) -> tuple[bytes | None, Payload | None]:
            # Views of the file, which are good as long as the transaction.
            with dbs.env.begin(buffers=True) as txn:
                entry, view = txn.get(key, db=dbs.entries), txn.get(key, db=dbs.pages)
                return None if entry is None else bytes(entry), None if view is None else _copied(view, slot)

        nothing: tuple[bytes | None, Payload | None] = (None, None)
        return self.store.attempt("read", load, nothing)

    def _put(self, batch: Sequence[Write]) -> None:
        if batch and not self.store.attempt("write", lambda dbs: self._write(dbs, batch), False):
            self._count(dropped=len(batch))

    def _write(self, dbs: Databases, batch: Sequence[Write]) -> bool:
        new = []
        with dbs.env.begin() as txn:
            occupied = dbs.occupied(txn)
            for key, payload, stamp in batch:
                entry = txn.get(key, db=dbs.entries)
                if entry is None:
                    new.append((key, payload, stamp))
                else:
                    self._touch(key, entry, stamp)
        needed = sum(room_for(memoryview(payload).nbytes) for _, payload, _ in new)
        if new and occupied + needed > self.budget_bytes:
            self._evict(dbs, self.budget_bytes - self.budget_bytes // EVICTED_SHARE - needed)
        try:
            self._write_new(dbs, new)
        except lmdb.Error as error:
            if not full(error):
                raise
            dbs.env.reader_check()
            # What one transaction frees, the next but one can use: LMDB keeps the latest two states whole.
            self._evict(dbs, occupied - occupied // EVICTED_SHARE - 2 * needed)
            self._evict(dbs, occupied - occupied // EVICTED_SHARE - 2 * needed - room_for(1))
            self._write_new(dbs, new)
        return True

    def _write_new(self, dbs: Databases, new: Sequence[Write]) -> None:
        if not new:
            return
        # Outside the transaction: other processes wait for it.
        records = [(key, payload, seal(key, payload) + STAMP.pack(stamp)) for key, payload, stamp in new]
        with dbs.env.begin(write=True) as txn:
            for key, payload, entry in records:
                txn.put(key, payload, db=dbs.pages)
                txn.put(key, entry, db=dbs.entries)
        self.unsynced = True
        self._count(bytes_written=sum(memoryview(payload).nbytes for _, payload, _ in new))

    def _evict(self, dbs: Databases, target_bytes: int) -> None:
        self._record_uses(dbs)
        evicted, latest = 0, time.time_ns() + 60 * 10**9  # a clock may be set back a little
        with dbs.env.begin(write=True) as txn:
            while (excess := (occupied := dbs.occupied(txn)) - target_bytes) > 0:
                count = txn.stat(dbs.entries)["entries"]
                if not count:
                    break
                with txn.cursor(dbs.entries) as cursor:
                    # A stamp from the future, of a clock or a bit that was wrong, counts as the oldest.
                    uses = ((stamp if (stamp := _last_used(e)) <= latest else 0, key, e) for key, e in cursor)
                    oldest = heapq.nsmallest(1 + excess * count // occupied, uses)
                for _, key, entry in oldest:
                    if excess <= 0:
                        break
                    excess -= room_for(_size(entry))
                    _delete(dbs, txn, key)
                    evicted += 1
        self._count(evicted=evicted)

    def _record_uses(self, dbs: Databases) -> None:
        with self.lock:
            touched, self.touched = self.touched, {}
        if not touched:
            return
        with dbs.env.begin(write=True) as txn:
            for key, stamp in touched.items():
                entry = txn.get(key, db=dbs.entries)
                # Another process may have used it since.
                if entry is not None and _last_used(entry) < stamp:
                    txn.put(key, entry[: SEAL.size] + STAMP.pack(stamp), db=dbs.entries)
        self.unsynced = True

    def _touch(self, key: bytes, entry: bytes, stamp: int) -> None:
        if stamp - _last_used(entry) > self.touch_seconds * 1e9:
            with self.lock:
                self.touched[key] = stamp

    def _remove_damaged(self, key: bytes, entry: bytes | None) -> None:
        def remove(dbs: Databases) -> None:
            with dbs.env.begin(write=True) as txn:
                # Another process may have removed and written it again meanwhile.
                if txn.get(key, db=dbs.entries) == entry:
                    _delete(dbs, txn, key)

        self.store.attempt("write", remove, None)

    def _stamps(self, count: int) -> int:
        """The newest of `count` stamps, each 1 ns apart, all newer than those before: a chain loses its tail first."""
        with self.lock:
            self.latest = max(time.time_ns(), self.latest + count)
            return self.latest

    def _count(self, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)


def _delete(dbs: Databases, txn: "lmdb.Transaction[bytes]", key: bytes) -> None:
    txn.delete(key, db=dbs.entries)
    txn.delete(key, db=dbs.pages)


def _copied(view: memoryview, slot: np.ndarray | None) -> Payload:
    """The bytes of a view, in the slot if they fit there."""
    payload = placed(view, slot) if slot is not None else None
    return bytes(view) if payload is None else payload


def _is_sound(key: bytes, entry: bytes | None, payload: Payload | None) -> bool:
    return entry is not None and payload is not None and seal(key, payload) == entry[: SEAL.size]


def _size(entry: bytes) -> int:
    # An entry of another length is damaged: it must not stop an eviction.
    return int(SEAL.unpack_from(entry)[0]) if len(entry) == ENTRY_BYTES else 0


def _last_used(entry: bytes) -> int:
    return int(STAMP.unpack_from(entry, SEAL.size)[0]) if len(entry) == ENTRY_BYTES else 0
