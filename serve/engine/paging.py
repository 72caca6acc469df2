"""Pages on their way between the device pool and the tiers below it.

`Pager` belongs to the engine's thread. Other threads only ever see copies of pages that the device made between two
steps, never the pool, whose buffers end with each donation.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from cache.keys import page_keys, root_key, tail_key
from cache.pool import pages_for
from cache.prefix_cache import Lease, PrefixCache
from cache.tier import Fetched
from cache.tiers import StoredPage, Tiers
from cache.worker import Failures
from model.kv import KVPool, gather_pages, scatter_pages
from serve.engine.cost import CostModel
from serve.engine.restore import Loaded, Restore, Slice, end_of
from serve.engine.sequence import Sequence

log = logging.getLogger("tokenzero.paging")

T = TypeVar("T")

# Pages that one compiled copy moves; the largest is also the unit of a restore.
BATCHES = (16, 4, 1)
# Bytes: where XLA takes an array over as it is.
ALIGNMENT = 64
# Slices that are read before they are needed.
READ_AHEAD = 4
# A slice that is waited for so long, while nothing else comes either, is computed.
STALLED_SECONDS = 5.0
# A sequence waits to hear what the tiers have before it is computed, but not for long, and not if it is soon computed.
PATIENCE_SECONDS = 0.5
LOOK_UP_SECONDS = 0.01
# A tier that was not read for so long, because computing is faster, is read to see whether it still is.
MEASURE_AGAIN_SECONDS = 30.0


@dataclass(frozen=True)
class PageCopies:
    """Compiled copies by count of pages: `gather[n](pool, pages)` and `scatter[n](pool, pages, data)`."""

    gather: Mapping[int, Callable[..., jax.Array]]
    scatter: Mapping[int, Callable[..., KVPool]]
    page_shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return int(np.prod(self.page_shape)) * self.dtype.itemsize


def compile_page_copies(pool: KVPool) -> PageCopies:
    """Compile the copies for a pool of this shape. A scatter donates the pool: use the one it hands back."""
    layers, _, *tile = pool.k.shape
    shape = (2, layers, *tile)
    gather, scatter = {}, {}
    for count in BATCHES:
        pages = jax.ShapeDtypeStruct((count,), jnp.int32)
        data = jax.ShapeDtypeStruct((count, *shape), pool.k.dtype)
        gather[count] = jax.jit(gather_pages).lower(pool, pages).compile()
        scatter[count] = jax.jit(scatter_pages, donate_argnums=0).lower(pool, pages, data).compile()
    return PageCopies(gather, scatter, shape, np.dtype(pool.k.dtype))


def batches(count: int) -> list[int]:
    """`count` pages as compiled counts, the largest first."""
    sizes = []
    for size in BATCHES:
        sizes += [size] * (count // size)
        count %= size
    return sizes


def staging(count: int, page_bytes: int) -> np.ndarray:
    """Room for pages to be read to, [count, page_bytes] uint8; aligned, or a CPU would copy them once more."""
    room = np.empty(count * page_bytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + count * page_bytes].reshape(count, page_bytes)


@dataclass(frozen=True)
class PendingWrite:
    """Pages of a sequence that has ended, held by its lease until the writer takes them."""

    lease: Lease
    pages: list[tuple[bytes, int, int]]  # key, device page, stamp


class Pager:
    """Saves sealed pages to the tiers and brings stored ones back, for one engine.

    Both are optional: whatever fails here costs pages, never a request. What is read ahead, on the host and on the
    device, takes `restore_bytes` at most (or four pages, if these are more), half of that for sequences that wait; what
    is copied out takes what the writer's queue has room for.
    """

    def __init__(
        self,
        tiers: Tiers,
        pool: KVPool,
        fingerprint: bytes,
        cost: CostModel,
        wake: Callable[[], None],
        restore_bytes: int = 1 << 30,
    ) -> None:
        self.tiers, self.fingerprint, self.cost, self.wake = tiers, fingerprint, cost, wake
        self.page_size = pool.page_size
        self.moves = compile_page_copies(pool)
        self.restore_bytes = max(restore_bytes, 4 * self.moves.page_bytes)
        self.slice_pages = min(BATCHES[0], self.restore_bytes // (4 * self.moves.page_bytes))
        # Bytes of the slices that are being read, or were and are not copied in yet.
        self.staged: WeakKeyDictionary[Future[Loaded], int] = WeakKeyDictionary()
        self.came_at = 0.0  # when a slice was copied in last, by `time.monotonic`
        self.measuring: Future[Fetched] | None = None  # a read for the time that it takes alone
        self.measured_at: dict[str, float] = {}  # by tier, when it was read last, by `time.monotonic`
        self.failures = Failures()
        self.parked: deque[PendingWrite] = deque()
        self.restored_tokens: Counter[str] = Counter()  # by tier
        self.read_seconds: defaultdict[str, float] = defaultdict(float)  # by tier
        self.reads: Counter[str] = Counter()  # by tier
        self.recomputed_pages = 0  # that a tier had, but the model computes sooner

    # Coming back.

    def begin(self, sequence: Sequence, held: int) -> None:
        """Ask the tiers for a sequence of which the device holds the first `held` tokens."""
        known, page_size = sequence.known, self.page_size
        self.name(sequence, len(known) // page_size)
        keys = sequence.keys[: len(known) // page_size]
        root, first = self.parent(sequence, 0), held // page_size
        looking = attempted(
            lambda: self.tiers.look(root, keys, known.copy(), first, page_size, sequence.used),
        )
        self.forget(sequence)
        sequence.restore = Restore(looking, held, time.monotonic())
        looking.add_done_callback(lambda _: self.wake())

    def forget(self, sequence: Sequence) -> None:
        """Drop what a sequence has looked up and read ahead, and do not read what nobody will use."""
        restore, sequence.restore = sequence.restore, None
        if restore is not None:
            cancel(restore)

    def read_ahead(self, sequence: Sequence) -> None:
        """Plan the restore once the lookup is done, forget what is computed by now, and read the next few slices.

        As many of them as there is room for: a sequence with a lease uses up what it has read, so it may take all room,
        and one that waits takes half at most.
        """
        restore = sequence.restore
        if restore is None or not restore.looking.done():
            return
        if restore.slices is None:
            if (found := outcome(restore, restore.looking)) is None:
                return
            sequence.unsaved.extend(found.missing)
            restore.slices = self.plan(found.pages)
        while restore.slices and end_of(restore.slices[0], self.page_size) <= sequence.computed:
            restore.slices.popleft()
        for piece in list(restore.slices)[:READ_AHEAD]:
            if piece.loading is not None:
                continue
            size = len(piece.pages) * self.moves.page_bytes
            if self.staged_bytes + size > self.restore_bytes // (1 if sequence.lease else 2):
                return
            piece.loading = attempted(partial(self.fetch, piece.pages, self.load))
            piece.loading.add_done_callback(lambda _: self.wake())
            self.staged[piece.loading] = size

    @property
    def staged_bytes(self) -> int:
        """Bytes that are being read, or were read and are not copied in yet. Any thread may ask."""
        staged = list(self.staged.data.items())  # type: ignore[attr-defined]  # in one go: others may change it
        # A read that failed holds nothing, but the traceback of its exception may keep it until a collection.
        return sum(size for ref, size in staged if (read := ref()) is not None and not has_failed(read))

    def fetch(self, pages: list[StoredPage], then: Callable[[list[StoredPage], np.ndarray, Fetched], T]) -> Future[T]:
        """Read pages in the background, [pages, page_bytes] uint8, and hand them to `then` on the reader's thread."""
        data, stamps = staging(len(pages), self.moves.page_bytes), [page.stamp for page in pages]
        return self.tiers.pages.fetch([page.key for page in pages], data, partial(then, pages, data), stamps)

    def plan(self, pages: list[StoredPage]) -> deque[Slice]:
        """The pages that come sooner from their tier than from the model, in slices of consecutive ones."""
        if self.measuring and self.measuring.done():
            measuring, self.measuring = self.measuring, None
            if not measuring.cancelled() and measuring.exception() is None:
                self.measured(measuring.result())
        worth, computed = list[StoredPage](), list[StoredPage]()
        for page in pages:
            start = page.index * self.page_size
            read = self.cost.worth_restoring(page.tier, start, start + page.tokens, self.moves.page_bytes)
            (worth if read else computed).append(page)
        self.recomputed_pages += len(computed)
        self.measure_again(computed)
        return deque(slices_of(worth, self.page_size, self.slice_pages))

    def measure_again(self, pages: list[StoredPage]) -> None:
        """Read some of these pages, which are computed, if nobody has read their tier for long: it may be faster."""
        due = time.monotonic() - MEASURE_AGAIN_SECONDS
        stale = [page for page in pages if self.measured_at.get(page.tier, due) <= due]
        if stale and self.measuring is None:
            chosen = [page for page in stale if page.tier == stale[0].tier][: self.slice_pages]
            self.measuring = attempted(partial(self.fetch, chosen, lambda pages, data, fetched: fetched))

    def measured(self, fetched: Fetched) -> None:
        """Learn from a read what reading costs here."""
        for tier, seconds in fetched.seconds.items():
            size = self.moves.page_bytes * fetched.sources.count(tier)
            if size and seconds > 0:
                self.cost = self.cost.was_read(tier, size, seconds)
                self.read_seconds[tier] += seconds
                self.reads[tier] += 1
                self.measured_at[tier] = time.monotonic()

    def load(
        self,
        pages: list[StoredPage],
        data: np.ndarray,  # [pages, page_bytes] uint8
        fetched: Fetched,
    ) -> Loaded:
        """Move what was read towards the device, up to the first page that is gone. On the reader's thread."""
        count = fetched.sources.index(None) if None in fetched.sources else len(pages)
        shaped = data.view(self.moves.dtype).reshape(-1, *self.moves.page_shape)
        arrays, at = [], 0
        for batch in batches(count):
            arrays.append(jax.device_put(shaped[at : at + batch]))
            at += batch
        last = pages[count - 1]
        stop = last.index * self.page_size + last.tokens if count else 0
        return Loaded(pages[0].index, stop, arrays, fetched)

    def blocked(self, sequence: Sequence) -> bool:
        """Whether a sequence's next page is on its way from a tier, or may be."""
        restore = sequence.restore
        if restore is None:
            return False
        if restore.slices is None:
            quick = self.cost.prefill_s(sequence.computed, sequence.length) < LOOK_UP_SECONDS
            return not quick and time.monotonic() - restore.since < PATIENCE_SECONDS
        return self.until_restore(sequence) == 0 and not self.stalled(restore)

    def stalled(self, restore: Restore) -> bool:
        """Whether the first slice has been waited for too long while nothing came; then all are given up."""
        assert restore.slices
        now, first = time.monotonic(), restore.slices[0]
        if first.wanted is None:
            first.wanted = now
        if (first.loading and first.loading.done()) or now - max(first.wanted, self.came_at) < STALLED_SECONDS:
            return False
        log.warning("a prefix is computed, not read back: nothing was read for %g s", STALLED_SECONDS)
        cancel(restore)
        restore.slices.clear()
        return True

    def until_restore(self, sequence: Sequence) -> int:
        """Tokens to compute before the next stored page follows; a large number if none does."""
        slices = sequence.restore.slices if sequence.restore else None
        if not slices:
            return 1 << 30
        assert sequence.lease is not None
        first = slices[0].first * self.page_size
        # A page that the sequence itself has begun to fill is others' to read by now: it is not written again.
        own = sequence.computed % self.page_size and sequence.computed > sequence.lease.reused
        begun = sequence.computed // self.page_size * self.page_size
        if own and first <= begun:
            return begun + self.page_size - sequence.computed
        return max(0, first - sequence.computed)

    def ready(self, sequence: Sequence) -> Loaded | None:
        """The pages to copy in now, if they have been read."""
        if not self.blocked(sequence) or sequence.restore is None or not sequence.restore.slices:
            return None
        loading = sequence.restore.slices[0].loading
        return outcome(sequence.restore, loading) if loading is not None and loading.done() else None

    def copy_in(self, sequence: Sequence, loaded: Loaded, pool: KVPool) -> KVPool:
        """Copy pages into the sequence's lease, which has room for them; returns the pool to go on with.

        All tokens up to the last page's end count as computed from here on.
        """
        assert sequence.lease is not None
        assert sequence.restore is not None
        assert sequence.restore.slices is not None
        sequence.restore.slices.popleft()
        self.measured(loaded.fetched)
        self.came_at = time.monotonic()
        before, at = sequence.computed, loaded.first
        if loaded.stop <= before:  # others have brought all of it
            return pool
        assert at + sum(map(len, loaded.arrays)) == pages_for(loaded.stop, self.page_size), (
            "only the last loaded page may be partly filled: the tokens that another one lacks would count as computed"
        )
        # Pages that are full by now are not this lease's to write: they go to a page out of range.
        pages = sequence.lease.pages.astype(np.int32)
        pages[: before // self.page_size] = pool.num_pages
        for array in loaded.arrays:
            pool = self.moves.scatter[len(array)](pool, pages[at : at + len(array)], array)
            at += len(array)
        restored: Counter[str] = Counter()
        for index, source in zip(range(loaded.first, at), loaded.fetched.sources, strict=False):
            assert source is not None
            start, stop = max(before, index * self.page_size), min(loaded.stop, (index + 1) * self.page_size)
            restored[source] += max(0, stop - start)
        self.restored_tokens.update(restored)
        if not sequence.sampled:
            sequence.restored.update(restored)
        sequence.take_over(loaded.stop, self.page_size)
        return pool

    # Going down.

    def name(self, sequence: Sequence, count: int) -> None:
        """Make sure that the keys of a sequence's first `count` pages are known."""
        have, size = len(sequence.keys), self.page_size
        if have < count:
            sequence.keys += page_keys(self.parent(sequence, have), sequence.tokens[have * size : count * size], size)

    def parent(self, sequence: Sequence, index: int) -> bytes:
        """The key that stands in front of page `index` of a sequence, whose earlier pages have their names."""
        if index:
            return sequence.keys[index - 1]
        return root_key(self.fingerprint, self.page_size, sequence.request.salt)

    def seal(self, sequence: Sequence) -> list[int]:
        """Name the pages that a sequence has filled; the indices of those that still have to go to the tiers."""
        full = sequence.computed // self.page_size
        sequence.unsaved.extend(range(sequence.sealed, full))
        sequence.sealed = max(sequence.sealed, full)
        self.name(sequence, full)
        if full > sequence.stamped:
            # Those of others, too: none may be older than what this sequence writes behind it.
            uses = range(sequence.used - sequence.stamped, sequence.used - full, -1)
            self.tiers.writer.use(sequence.keys[sequence.stamped : full], uses)
            sequence.stamped = full
        return [i for i in sequence.unsaved if i < full]

    def save(self, sequence: Sequence, pool: KVPool) -> None:
        """Queue the pages that a running sequence has filled, as far as the writer's queue has room."""
        assert sequence.lease is not None
        ready = self.seal(sequence)
        pages = [(sequence.keys[i], int(sequence.lease.pages[i]), sequence.used - i) for i in ready]
        taken = self.submit(pages, pool)
        queued = set(ready[:taken])
        sequence.unsaved = [i for i in sequence.unsaved if i not in queued]

    def retire(self, sequence: Sequence, pool: KVPool, store: PrefixCache) -> None:
        """Queue what a sequence that ends has not saved, its partly filled page too, and end its lease when all is."""
        lease = sequence.lease
        assert lease is not None
        pages = [(sequence.keys[i], int(lease.pages[i]), sequence.used - i) for i in self.seal(sequence)]
        sequence.unsaved.clear()
        full = sequence.computed // self.page_size
        rest = sequence.tokens[full * self.page_size : sequence.computed]
        if len(rest) and sequence.computed > sequence.reused:
            pages.append((tail_key(self.parent(sequence, full), rest), int(lease.pages[full]), sequence.used - full))
        self.parked.append(PendingWrite(lease, pages))
        sequence.lease = None  # whatever fails from here on must not end it twice
        self.save_parked(pool, store)

    def save_parked(self, pool: KVPool, store: PrefixCache) -> bool:
        """Queue pages of sequences that have ended, and end the leases of those that are done. Whether any was."""
        before = len(self.parked)
        while self.parked:
            lease, pages = self.parked[0].lease, self.parked[0].pages
            rest = pages[self.submit(pages, pool) :]
            if rest:
                self.parked[0] = PendingWrite(lease, rest)
                break
            self.parked.popleft()
            store.release(lease)
        return len(self.parked) < before

    def drain(self, pool: KVPool, store: PrefixCache, seconds: float) -> None:
        """Wait until the writer has taken all pages of sequences that have ended, but no longer than `seconds`."""
        end = time.monotonic() + seconds
        self.save_parked(pool, store)
        writer = self.tiers.writer
        while self.parked and not writer.closing and writer.flush(max(0.0, end - time.monotonic())):
            self.save_parked(pool, store)
        while self.drop_parked(store):
            pass

    def drop_parked(self, store: PrefixCache) -> bool:
        """Give up the oldest pages that the writer was too slow for; False if there are none."""
        if not self.parked:
            return False
        unsaved = self.parked.popleft()
        self.tiers.writer.drop(len(unsaved.pages))
        store.release(unsaved.lease)
        return True

    def submit(self, pages: list[tuple[bytes, int, int]], pool: KVPool) -> int:
        """Copy pages and queue the copies, the first ones first; returns how many are done with.

        Those of which no copy can be made (a device may be short of memory) are lost to the tiers, and counted.
        """
        taken = 0
        for count in batches(len(pages)):
            if not self.tiers.writer.has_room(count * self.moves.page_bytes):
                break
            chosen = pages[taken : taken + count]
            if self.failures.guard(f"{count} pages are not saved", partial(self.queue, chosen, pool), None) is None:
                self.tiers.writer.drop(count)
            taken += count
        return taken

    def queue(self, pages: list[tuple[bytes, int, int]], pool: KVPool) -> bool:
        """Copy pages, as many as one compiled copy moves, and queue them; False if the writer has no room after all."""
        copy = self.moves.gather[len(pages)](pool, np.asarray([page for _, page, _ in pages], np.int32))
        keys, stamps = [key for key, _, _ in pages], [stamp for _, _, stamp in pages]
        return self.tiers.writer.submit(keys, len(pages) * self.moves.page_bytes, partial(payloads, copy), stamps)


def cancel(restore: Restore) -> None:
    """Do not look up and read what nobody will use."""
    restore.looking.cancel()
    for piece in restore.slices or ():
        if piece.loading is not None:
            piece.loading.cancel()


def has_failed(future: Future[T]) -> bool:
    """Whether a future has ended without a result."""
    return future.cancelled() or (future.done() and future.exception() is not None)


def attempted(start: Callable[[], Future[T]]) -> Future[T]:
    """The future that `start` returns; one that has failed, where it cannot."""
    try:
        return start()
    except Exception as error:
        failed: Future[T] = Future()
        failed.set_exception(error)
        return failed


def slices_of(pages: list[StoredPage], page_size: int, most: int) -> list[Slice]:
    """The pages, in order, as slices of up to `most` consecutive ones; a page that is not full ends its slice.

    A sequence that takes a slice over counts all tokens up to its end as computed, and those that a partly filled page
    lacks are not.
    """
    slices: list[Slice] = []
    for page in pages:
        last = slices[-1].pages if slices else []
        if last and len(last) < most and last[-1].index + 1 == page.index and last[-1].tokens == page_size:
            last.append(page)
        else:
            slices.append(Slice([page]))
    return slices


def outcome(restore: Restore, future: Future[T]) -> T | None:
    """What came of a lookup or a read; None if it failed: then nothing more is taken from the tiers."""
    try:
        return future.result()
    except Exception as error:
        log.warning("a prefix is computed, not read back: %s: %s", type(error).__name__, error)
        restore.slices = deque()
        return None


def payloads(copy: jax.Array) -> list[bytes]:
    """Copied pages, [count, *page_shape], as bytes; waits for the device."""
    return [page.tobytes() for page in np.asarray(copy)]
