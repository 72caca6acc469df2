"""The disk tier: pages in LMDB, shared by any number of processes on one machine.

`pages` maps a key to its payload; `entries` maps it to seal (length and XXH3-64) and last use. Listing, counting and
eviction read `entries` alone. The seal is checked on every read, since LMDB (http://www.lmdb.tech/doc/) has no
checksums.
"""

import heapq
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TypeVar

import lmdb
import numpy as np

from cache.lmdb_env import FORMAT, Databases, SharedEnvironment, full, old_stores
from cache.records import STAMP, Entry, Read, delete, last_used, lower_stamps, read, room_for, size_of, stamp_uses
from cache.tier import Item, Payload, TierStats, earlier, seal, stamps_now
from cache.worker import Worker

log = logging.getLogger("tokenzero.cache.disk")
T = TypeVar("T")

# Written in one transaction. LMDB reuses small buffers; large ones are new each time and cost a page fault per 4 KiB.
TRANSACTION_BYTES = 1 << 20
SPLIT_BYTES = 8 * 4096  # growth of both trees when leaves split up to the root
READ_TOGETHER = 64  # pages that are read in one transaction, or in two at once
HALVED_BYTES = 1 << 20  # so many are read by two threads: copying them takes longer than waking one
EVICTED_SHARE = 16  # an eviction frees 1/16 of the budget more than it must, so that evictions are rare
MOST_LOWERED = 1 << 18  # pages that wait to be recorded as used earlier
EVICTION_BYTES = 256 << 20  # freed in one transaction, while all other writers wait

Write = tuple[bytes, Payload, int]  # key, payload, stamp


class DiskTier:
    """Pages on a local disk under a budget in bytes that all processes share, the least recently used evicted first.

    A killed process loses no page for which put_many returned. A power cut loses what was put since the last sync(),
    and may damage the tree: the next open detects that and starts empty. The file never shrinks; it grows to about the
    budget and its pages are reused. A full disk, a read-only or a vanished directory only cost hits: reads miss, while
    writes and sync() try to open the store again.

    Raises StoreError if `directory` is another program's or version's, and with `repair` off if its tree is damaged.
    """

    def __init__(self, directory: str | Path, budget_bytes: int, *, name: str = FORMAT, repair: bool = True) -> None:
        self.name = "disk"
        self.budget_bytes = budget_bytes
        self.counts: Counter[str] = Counter()
        self.touched: dict[bytes, int] = {}  # uses that the next write records, nanoseconds since 1970
        self.lowered: dict[bytes, tuple[int, int]] = {}  # uses that the next write records as earlier ones
        self.evicted_stamp = 0  # the latest use of any evicted page: an older page would be evicted next
        self.pages = self.bytes = 0  # at the last look
        self.puts = False  # whether this process puts pages, and so keeps the store within its budget
        self.unsynced = False
        self.lock = threading.Lock()  # of counts, touched
        self.store = SharedEnvironment(Path(directory), budget_bytes + budget_bytes // 4, repair, name)
        self.helper = Worker("disk")
        self.store.attempt("open", self._measure, None)
        if name == FORMAT and (old := old_stores(Path(directory))):
            log.warning(
                "%s: found pages of an earlier version (%s), which are not used: `python -m cache prune --old --store "
                "%s` removes them", directory, ", ".join(path.name for path in old), directory,
            )  # fmt: skip

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """See Tier."""

        def look(dbs: Databases) -> list[bool]:
            with dbs.env.begin() as txn, txn.cursor(dbs.entries) as cursor:
                return [cursor.set_key(key) for key in keys]

        return self.store.attempt("read", look, [False] * len(keys))

    def touch_many(self, keys: Sequence[bytes], stamps: Sequence[int] | None = None) -> list[bool]:
        """See Tier."""
        used = stamps_now(len(keys)) if stamps is None else stamps

        def look(dbs: Databases) -> list[bool]:
            with dbs.env.begin() as txn:
                entries = [txn.get(key, db=dbs.entries) for key in keys]
            return [self._touch(*use) for use in zip(keys, entries, used, strict=True)]

        return self.store.attempt("read", look, [True] * len(keys))

    def demote_many(self, keys: Sequence[bytes], stamps: Sequence[int], seconds: float) -> None:
        """See Tier."""
        with self.lock:
            if len(self.lowered) < MOST_LOWERED:
                self.lowered |= {key: (at, earlier(at, seconds)) for key, at in zip(keys, stamps, strict=True)}

    def recent(self, size: int, count: int) -> list[bytes]:
        """See Tier."""

        def scan(dbs: Databases) -> list[tuple[int, bytes]]:
            with dbs.env.begin() as txn, txn.cursor(dbs.entries) as cursor:
                uses = ((last_used(entry), key) for key, entry in cursor if size_of(entry) == size)
                return heapq.nlargest(count, uses)

        nothing: list[tuple[int, bytes]] = []
        return [key for _, key in self.store.attempt("read", scan, nothing)]

    def get_many(
        self,
        keys: Sequence[bytes],
        into: Sequence[np.ndarray] | None = None,
        stamps: Sequence[int] | None = None,
    ) -> list[Payload | None]:
        """See Tier. A record that does not match its seal is a miss, counted and removed."""
        used = stamps_now(len(keys)) if stamps is None else stamps
        buffers = [None] * len(keys) if into is None else into
        found: list[Payload | None] = []
        for at in range(0, len(keys), READ_TOGETHER):
            stop = at + READ_TOGETHER
            found += self._get_halves(keys[at:stop], used[at:stop], buffers[at:stop])
        return found

    def put_many(self, items: Sequence[Item], stamps: Sequence[int] | None = None) -> None:
        """See Tier. Pages beyond the whole budget, and pages that the disk has no room for, are dropped."""
        used = stamps_now(len(items)) if stamps is None else stamps
        batch_bytes, batch, total = 0, list[Write](), 0
        self.puts = True
        for i, ((key, payload), stamp) in enumerate(zip(items, used, strict=True)):
            size = memoryview(payload).nbytes
            total += room_for(size)
            if total > self.budget_bytes:
                self._count(dropped=len(items) - i)
                break
            if batch and batch_bytes + size > min(TRANSACTION_BYTES, self.budget_bytes // 4):
                self._put(batch)
                batch_bytes, batch = 0, []
            batch_bytes += size
            batch.append((key, payload, stamp))
        self._put(batch)

    def delete(self, keys: Sequence[bytes]) -> bool:
        """See Tier."""

        def remove(dbs: Databases) -> bool:
            with dbs.env.begin(write=True) as txn:
                for key in keys:
                    delete(dbs, txn, key)
            return True

        return self._change(remove, False)

    def sync(self) -> None:
        """Record the latest uses and write everything through to the disk, which bounds the loss in a power cut.

        It also opens a failed store again, and a process that puts pages brings the store back within its own budget.
        """
        self.store.attempt("open", self._measure, None)
        if (self.touched or self.lowered) and not self._change(self._record_uses, False):
            with self.lock:
                self.touched = {}  # they must not pile up while nothing can be written
        if self.puts and self.bytes > self.budget_bytes:
            self.prune(self.budget_bytes)
        if self.unsynced:
            self.unsynced = False
            self.store.attempt("write", lambda dbs: dbs.env.sync(True), None)

    def stats(self) -> TierStats:
        """See Tier. Contents as of the last write or sync, since the disk may be busy now."""
        with self.lock:
            counts = dict(self.counts)
        is_open = self.store.opened is not None
        return TierStats(
            self.name, self.pages, self.bytes, self.budget_bytes, errors=self.store.errors, open=is_open, **counts
        )

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self.helper.stop()
        self.store.close()

    def entries(self) -> list[Entry]:
        """All stored pages, in order of their keys."""

        def scan(dbs: Databases) -> list[Entry]:
            with dbs.env.begin() as txn, txn.cursor(dbs.entries) as cursor:
                return [Entry(key, size_of(entry), last_used(entry) / 1e9) for key, entry in cursor]

        return self.store.attempt("read", scan, [])

    def check(self, remove: bool) -> Iterator[bool]:
        """Read every page and yield whether it is sound; with `remove`, remove those that are not."""

        def scan(dbs: Databases) -> list[bytes]:
            with dbs.env.begin() as txn, txn.cursor(dbs.entries) as a, txn.cursor(dbs.pages) as b:
                return sorted({*a.iternext(values=False), *b.iternext(values=False)})

        no_keys: list[bytes] = []
        for key in self.store.attempt("read", scan, no_keys):
            (got,) = self._load([key], [None])
            gone = got.entry is None and got.payload is None  # evicted by another process since the scan
            if not (gone or got.sound) and remove:
                self._remove_damaged(key, got.entry)
            yield gone or got.sound

    def prune(self, budget_bytes: int) -> int:
        """Evict the least recently used pages until they occupy at most `budget_bytes`; return how many those were."""
        before = self.counts["evicted"]
        self._change(lambda dbs: self._evict(dbs, budget_bytes), None)
        return self.counts["evicted"] - before

    def _get_halves(
        self, keys: Sequence[bytes], used: Sequence[int], buffers: Sequence[np.ndarray | None]
    ) -> list[Payload | None]:
        """As `_get`; of many bytes, the second half is read by another thread."""
        if sum(buffer.nbytes for buffer in buffers if buffer is not None) < HALVED_BYTES:
            return self._get(keys, used, buffers)
        half = len(keys) // 2
        later = self.helper.submit(self._get, keys[half:], used[half:], buffers[half:])
        found = self._get(keys[:half], used[:half], buffers[:half])
        try:
            return found + later.result()
        except CancelledError:  # the tier is closing
            return found + [None] * (len(keys) - half)

    def _get(
        self, keys: Sequence[bytes], used: Sequence[int], buffers: Sequence[np.ndarray | None]
    ) -> list[Payload | None]:
        found: list[Payload | None] = []
        sizes, corrupt = [], 0
        for key, stamp, buffer, got in zip(keys, used, buffers, self._load(keys, buffers), strict=True):
            fits = got.sound and (buffer is None or size_of(got.entry) == buffer.nbytes)
            found.append(got.payload if fits else None)
            if fits:
                self._touch(key, got.entry, stamp)
                sizes.append(size_of(got.entry))
            elif got.entry is not None and not got.sound:
                self._remove_damaged(key, got.entry)
                corrupt += 1
        self._count(hits=len(sizes), misses=len(keys) - len(sizes), corrupt=corrupt, bytes_read=sum(sizes))
        return found

    def _load(self, keys: Sequence[bytes], buffers: Sequence[np.ndarray | None]) -> list[Read]:
        """What is under the keys, in one transaction; each payload is in its buffer if it fits there."""

        def load(dbs: Databases) -> list[Read]:
            # Views of the file, which are valid as long as the transaction.
            with dbs.env.begin(buffers=True) as txn, txn.cursor(dbs.entries) as a, txn.cursor(dbs.pages) as b:
                return [read(a, b, key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

        return self.store.attempt("read", load, [Read(None, None, False)] * len(keys))

    def _put(self, batch: Sequence[Write]) -> None:
        if batch and not self._change(lambda dbs: self._write(dbs, batch), False):
            self._count(dropped=len(batch))

    def _change(self, action: Callable[[Databases], T], fallback: T) -> T:
        """The result of a writing action, after which the store is measured again."""

        def run(dbs: Databases) -> T:
            result = action(dbs)
            self._measure(dbs)
            return result

        return self.store.attempt("write", run, fallback)

    def _measure(self, dbs: Databases) -> None:
        with dbs.env.begin() as txn:
            self.pages, self.bytes = txn.stat(dbs.entries)["entries"], dbs.occupied(txn)

    def _write(self, dbs: Databases, batch: Sequence[Write]) -> bool:
        with dbs.env.begin() as txn:
            occupied = dbs.occupied(txn)
            new = [write for write in batch if not self._touch(write[0], txn.get(write[0], db=dbs.entries), write[2])]
        needed = sum(room_for(memoryview(payload).nbytes) for _, payload, _ in new) + SPLIT_BYTES
        if new and occupied + needed > self.budget_bytes:
            self._evict(dbs, self.budget_bytes - self.budget_bytes // EVICTED_SHARE - needed)
        kept = self._worth_keeping(new)
        try:
            self._write_new(dbs, kept)
        except lmdb.Error as error:
            if not full(error):
                raise
            dbs.env.reader_check()
            # Space that one transaction frees is usable two transactions later: LMDB keeps the latest two states.
            self._evict(dbs, occupied - occupied // EVICTED_SHARE - 2 * needed)
            self._evict(dbs, occupied - occupied // EVICTED_SHARE - 2 * needed - room_for(1))
            self._write_new(dbs, self._worth_keeping(kept))
        return True

    def _worth_keeping(self, new: Sequence[Write]) -> list[Write]:
        """The writes newer than the latest evicted page: older ones would be evicted next, and lack earlier pages."""
        if self.evicted_stamp > time.time_ns():  # the clock was set back since
            self.evicted_stamp = 0
        kept = [write for write in new if write[2] > self.evicted_stamp]
        self._count(evicted=len(new) - len(kept))
        return kept

    def _write_new(self, dbs: Databases, new: Sequence[Write]) -> None:
        if not new:
            return
        # Before the transaction, since other processes wait for it.
        records = [(key, payload, seal(key, payload) + STAMP.pack(stamp)) for key, payload, stamp in new]
        self.unsynced = True
        # With the uses so far, so that no page is ever recorded as newer than one before it.
        self._record_uses(dbs, records)
        self._count(bytes_written=sum(memoryview(payload).nbytes for _, payload, _ in new))

    def _evict(self, dbs: Databases, target_bytes: int) -> None:
        self._record_uses(dbs)
        while oldest := deque(self._oldest(dbs, target_bytes)):
            before = self.counts["evicted"]
            while oldest and self._evict_some(dbs, target_bytes, oldest):
                pass
            if self.counts["evicted"] == before:
                return  # other processes were faster, or the tree is damaged and a scan lists keys that no search finds

    def _evict_some(self, dbs: Databases, target_bytes: int, oldest: deque[tuple[int, bytes, bytes]]) -> bool:
        """Evict pages from `oldest` in one transaction; False once the target is reached."""
        evicted = freed = 0
        with dbs.env.begin(write=True) as txn:
            while more := dbs.occupied(txn) > target_bytes:
                if not oldest or freed > EVICTION_BYTES:
                    break
                stamp, key, entry = oldest.popleft()
                # Another process may have used or removed it meanwhile.
                if txn.get(key, db=dbs.entries) == entry:
                    delete(dbs, txn, key)
                    freed += room_for(size_of(entry))
                    evicted += 1
                    self.evicted_stamp = max(self.evicted_stamp, min(stamp, time.time_ns()))
        self.unsynced = True
        self._count(evicted=evicted)
        return more

    def _oldest(self, dbs: Databases, target_bytes: int) -> list[tuple[int, bytes, bytes]]:
        """Stamp, key and entry of the pages to evict so that `target_bytes` are left, the least recently used first."""
        with dbs.env.begin() as txn, txn.cursor(dbs.entries) as cursor:
            count, occupied = txn.stat(dbs.entries)["entries"], dbs.occupied(txn)
            if not count or occupied <= target_bytes:
                return []
            uses = ((last_used(entry), key, entry) for key, entry in cursor)
            return heapq.nsmallest(1 + (occupied - target_bytes) * count // occupied, uses)

    def _record_uses(self, dbs: Databases, new: Sequence[tuple[bytes, Payload, bytes]] = ()) -> bool:
        """Write the uses so far and `new` pages (key, payload, entry) in one transaction."""
        with self.lock:
            touched, self.touched = self.touched, {}
            lowered, self.lowered = self.lowered, {}
        if not touched and not new and not lowered:
            return True
        try:
            with dbs.env.begin(write=True) as txn:
                stamp_uses(dbs, txn, touched)
                for key, payload, entry in new:
                    txn.put(key, payload, db=dbs.pages)
                    txn.put(key, entry, db=dbs.entries)
                lower_stamps(dbs, txn, lowered)
        except lmdb.Error:
            with self.lock:
                for key, stamp in touched.items():
                    self.touched[key] = max(stamp, self.touched.get(key, 0))
            raise
        self.unsynced = True
        return True

    def _touch(self, key: bytes, entry: bytes | None, stamp: int) -> bool:
        """Note a use of a page for the next write to record; False if the page is not there."""
        if entry is None:
            return False
        if stamp > last_used(entry):
            with self.lock:
                self.touched[key] = max(stamp, self.touched.get(key, 0))
        return True

    def _remove_damaged(self, key: bytes, entry: bytes | None) -> None:
        def remove(dbs: Databases) -> None:
            with dbs.env.begin(write=True) as txn:
                # Another process may have removed and rewritten it meanwhile.
                if txn.get(key, db=dbs.entries) == entry:
                    delete(dbs, txn, key)
            self._measure(dbs)

        self.store.attempt("removal", remove, None)

    def _count(self, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)
