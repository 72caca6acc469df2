"""Pages on their way up, from the tiers to the device pool: look up, plan, read ahead, copy in.

`Restorer` belongs to the engine's thread; reading runs on the tiers' threads, which never see the pool. Whatever fails
here costs the time to compute some pages, never a request.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import jax
import numpy as np

from cache.pool import pages_for
from cache.tier import Fetched
from cache.tiers import Found, StoredPage, Tiers
from model.kv import KVPool
from serve.cost.model import CostTracker
from serve.engine.page_copies import MANY_BYTES, PageCopies, batch_sizes
from serve.engine.page_names import PageNames
from serve.engine.programs import CompileError
from serve.engine.sequence import Sequence
from serve.engine.staging import Staging

log = logging.getLogger("tokenzero.restore")

T = TypeVar("T")

# Slices that are read before they are needed.
READ_AHEAD = 4
# A slice that has been waited for so long, while nothing else came either, is computed.
STALLED_SECONDS = 5.0
# A prefill waits so long for its lookup, and not at all if it is computed within the second time.
PATIENCE_SECONDS = 0.5
LOOK_UP_SECONDS = 0.01
# A tier that was not read for so long, because computing is faster, is read to measure it again.
MEASURE_AGAIN_SECONDS = 30.0


@dataclass(frozen=True)
class Loaded:
    """Consecutive pages that were read, in arrays that the device can copy in."""

    first: int  # index of the first page in its sequence
    stop: int  # tokens that are computed once the last page is in its place
    arrays: list[jax.Array]  # each [pages, *page_shape]
    fetched: Fetched


@dataclass(frozen=True)
class Restored:
    """What was copied in: with it, a sequence's first `stop` tokens are in its pages."""

    stop: int
    tokens: Counter[str]  # new ones, by the tier that they came from


@dataclass(eq=False)
class Slice:
    """Consecutive stored pages that are read together."""

    pages: list[StoredPage]
    loading: Future[Loaded] | None = None
    wanted: float | None = None  # since when its sequence has waited for it, seconds, monotonic

    @property
    def first(self) -> int:
        """Index of the first page."""
        return self.pages[0].index

    def stop(self, page_size: int) -> int:
        """Tokens that are computed once the slice is in its place."""
        return self.pages[-1].index * page_size + self.pages[-1].tokens

    def cancel(self) -> None:
        """Do not read it, if that has not begun."""
        if self.loading is not None:
            self.loading.cancel()


@dataclass(eq=False)
class Restore:
    """What one sequence takes from the tiers: looked up and read ahead while it waits, copied in once it runs."""

    looking: Future[Found]
    held: int  # tokens that the device had then: only what comes after them was looked up
    since: float  # seconds, monotonic
    slices: deque[Slice] | None = None  # None until the lookup is done

    def cancel(self) -> None:
        """Do not look up and read what will not be used."""
        self.looking.cancel()
        for piece in self.slices or ():
            piece.cancel()


class Restorer:
    """Brings stored pages back for one engine, where that is faster than computing them.

    What is being read, and what was read and is not copied in yet, takes at most `restore_bytes` (or four pages, if
    these are more), half of that for sequences that wait.
    """

    def __init__(
        self,
        tiers: Tiers,
        copies: PageCopies,
        names: PageNames,
        costs: CostTracker,
        wake: Callable[[], None],  # called on any thread when something has arrived
        restore_bytes: int = 1 << 30,
    ) -> None:
        self.tiers, self.copies, self.names, self.costs, self.wake = tiers, copies, names, costs, wake
        self.page_size, self.page_bytes = names.page_size, copies.page_bytes
        self.restore_bytes = max(restore_bytes, 4 * self.page_bytes)
        self.slice_pages = min(copies.slice_pages, self.restore_bytes // (4 * self.page_bytes))
        self.staging = Staging(self.slice_pages * self.page_bytes, READ_AHEAD)
        if self.staging.size <= MANY_BYTES:
            self.staging.prefault()
        self.restores: dict[int, Restore] = {}  # by the sequence's number
        # Bytes of each slice that is being read, or was and is not copied in yet.
        self.staged: WeakKeyDictionary[Future[Any], int] = WeakKeyDictionary()
        self.copied_at = 0.0  # when a slice was copied in last, seconds, monotonic
        self.measuring: Future[Fetched] | None = None  # a read that only measures a tier
        self.measured_at: dict[str, float] = {}  # by tier, when it was read last, seconds, monotonic
        self.restored_tokens: Counter[str] = Counter()  # by tier
        self.read_seconds: defaultdict[str, float] = defaultdict(float)  # by tier
        self.reads: Counter[str] = Counter()  # by tier
        self.recomputed_pages = 0  # that a tier had, and the model computes sooner
        self.is_preloaded: Callable[[bytes], bool] = lambda key: False  # whether the pool has a page of this key

    # Looking up.

    def looked_up(self, sequence: Sequence) -> bool:
        """Whether the tiers were asked for a sequence; not if it has fewer tokens now than the lookup began after."""
        restore = self.restores.get(sequence.number)
        return restore is not None and (sequence.lease is None or sequence.computed >= restore.held)

    def look_up(self, sequence: Sequence, held: int) -> None:
        """Ask the tiers for the pages of a sequence, of which the device has the first `held` tokens."""
        tokens, page_size = sequence.matchable_tokens, self.page_size
        full = len(tokens) // page_size
        self.names.extend(sequence, full)
        keys, parents = sequence.keys[:full], self.names.parents(sequence, full)
        first, used = held // page_size, sequence.used
        looking = attempted(lambda: self.tiers.look(parents, keys, tokens.copy(), first, page_size, used))
        self.cancel(sequence)
        self.restores[sequence.number] = Restore(looking, held, time.monotonic())
        looking.add_done_callback(lambda _: self.wake())

    def cancel(self, sequence: Sequence) -> None:
        """Drop what was looked up and read ahead for a sequence."""
        if restore := self.restores.pop(sequence.number, None):
            restore.cancel()

    # Reading.

    def read_ahead(self, sequence: Sequence) -> None:
        """Plan the restore once the lookup is done, skip what is computed by now, and read the next few slices."""
        restore = self.restores.get(sequence.number)
        if restore is None or not restore.looking.done():
            return
        if restore.slices is None:
            if (found := self._result(restore, restore.looking)) is None:
                return
            sequence.mark_unsaved(found.missing)
            sequence.note_stored(found.pages)
            restore.slices = self._plan(found.pages)
        while restore.slices and restore.slices[0].stop(self.page_size) <= sequence.computed:
            restore.slices.popleft().cancel()
        self._start_reads(restore, self.restore_bytes // (1 if sequence.lease else 2))
        if sequence.lease and restore.slices and not self.tokens_before_page(sequence):
            self._check_first(restore, restore.slices[0])

    def _plan(self, pages: list[StoredPage]) -> deque[Slice]:
        """The pages that come sooner from their tier than from the model, in slices of consecutive ones."""
        if self.measuring and self.measuring.done():
            measuring, self.measuring = self.measuring, None
            if not has_failed(measuring):
                self.measured(measuring.result())
        read, computed = list[StoredPage](), list[StoredPage]()
        for page in pages:
            start = page.index * self.page_size
            worth = self.costs.model.worth_restoring(page.tier, start, start + page.tokens, self.page_bytes)
            (read if worth or self.is_preloaded(page.key) else computed).append(page)
        self.recomputed_pages += len(computed)
        self._measure_again(computed)
        return deque(slices_of(read, self.page_size, self.slice_pages))

    def _start_reads(self, restore: Restore, budget: int) -> None:
        """Start to read the next few slices, as many as `budget` bytes of all staged ones leave room for."""
        for piece in list(restore.slices or ())[:READ_AHEAD]:
            if piece.loading is not None or all(self.is_preloaded(page.key) for page in piece.pages):
                continue
            size = self.staging.takes(len(piece.pages) * self.page_bytes)
            if self.staged_bytes + size > budget:
                return
            piece.loading = attempted(partial(self._fetch, piece.pages, self.load))
            piece.loading.add_done_callback(lambda _: self.wake())
            self.staged[piece.loading] = size

    def _check_first(self, restore: Restore, first: Slice) -> None:
        """Give the restore up if the slice that the sequence waits for failed, or nothing was read for too long."""
        now = time.monotonic()
        first.wanted = now if first.wanted is None else first.wanted
        if first.loading and first.loading.done():
            self._result(restore, first.loading)
        elif now - max(first.wanted, self.copied_at) >= STALLED_SECONDS:
            log.warning("a prefix is computed, not read back: nothing was read for %g s", STALLED_SECONDS)
            restore.cancel()
            restore.slices = deque()

    def _result(self, restore: Restore, future: Future[T]) -> T | None:
        """The result of a lookup or a read; None if it failed: then the restore is given up."""
        try:
            return future.result()
        except Exception as error:
            log.warning("a prefix is computed, not read back: %s: %s", type(error).__name__, error)
            restore.slices = deque()
            return None

    def _fetch(self, pages: list[StoredPage], then: Callable[[list[StoredPage], np.ndarray, Fetched], T]) -> Future[T]:
        """Read pages in the background, [pages, page_bytes] uint8, and hand them to `then` on the reader's thread."""
        data = self.staging.buffer(len(pages) * self.page_bytes).reshape(len(pages), self.page_bytes)
        stamps = [page.stamp for page in pages]
        return self.tiers.pages.fetch([page.key for page in pages], data, partial(then, pages, data), stamps)

    def load(
        self,
        pages: list[StoredPage],
        data: np.ndarray,  # [pages, page_bytes] uint8
        fetched: Fetched,
    ) -> Loaded:
        """Move what was read towards the device, up to the first page that is gone. On the reader's thread."""
        count = fetched.sources.index(None) if None in fetched.sources else len(pages)
        last = pages[count - 1]
        stop = last.index * self.page_size + last.tokens if count else 0
        return Loaded(pages[0].index, stop, self.to_device(data[:count]), fetched)

    def to_device(self, data: np.ndarray) -> list[jax.Array]:
        """Pages, [pages, page_bytes] uint8, as arrays that a scatter takes. On any thread."""
        shaped = data.view(self.copies.dtype).reshape(-1, *self.copies.page_shape)
        arrays, at = [], 0
        for size in batch_sizes(len(data), self.copies.scatter):
            arrays.append(jax.device_put(shaped[at : at + size], self.copies.sharding))
            at += size
        return arrays

    @property
    def staged_bytes(self) -> int:
        """Bytes that are being read, or were read and are not copied in yet. Any thread may ask."""
        staged = list(self.staged.data.items())  # type: ignore[attr-defined]  # in one go: others may change it
        # A read that failed holds nothing, but the traceback of its exception may keep it until a collection.
        return sum(size for ref, size in staged if (read := ref()) is not None and not has_failed(read))

    def _measure_again(self, pages: list[StoredPage]) -> None:
        """Read some of these pages, which are computed, if their tier was not read for long: it may be faster now."""
        due = time.monotonic() - MEASURE_AGAIN_SECONDS
        stale = [page for page in pages if self.measured_at.get(page.tier, due) <= due]
        if stale and self.measuring is None:
            chosen = [page for page in stale if page.tier == stale[0].tier][: self.slice_pages]
            self.measuring = attempted(partial(self._fetch, chosen, lambda pages, data, fetched: fetched))

    def measured(self, fetched: Fetched) -> None:
        """Learn from a read how long reading takes."""
        for tier, seconds in fetched.seconds.items():
            size = self.page_bytes * fetched.sources.count(tier)
            if size and seconds > 0:
                self.costs.was_read(tier, size, seconds)
                self.read_seconds[tier] += seconds
                self.reads[tier] += 1
                self.measured_at[tier] = time.monotonic()

    # Copying in.

    def waits(self, sequence: Sequence) -> bool:
        """Whether the next page of a sequence with a lease is being looked up, or read from a tier."""
        restore = self.restores.get(sequence.number)
        if restore is None:
            return False
        if restore.slices is None:
            quick = self.costs.model.prefill_s(sequence.computed, sequence.length) < LOOK_UP_SECONDS
            return not quick and time.monotonic() - restore.since < PATIENCE_SECONDS
        return self.tokens_before_page(sequence) == 0

    def tokens_before_page(self, sequence: Sequence) -> int:
        """Tokens to compute before the next page that a tier brings; a large number if none follows."""
        restore = self.restores.get(sequence.number)
        if restore is None or not restore.slices:
            return 1 << 30
        assert sequence.lease is not None
        page, inside = divmod(sequence.computed, self.page_size)
        first = restore.slices[0].first
        # A page that the sequence itself has begun to fill may be read by others already: it is not written again.
        if inside and sequence.computed > sequence.lease.reused and first <= page:
            return self.page_size - inside
        return max(0, first * self.page_size - sequence.computed)

    def next_page(self, sequence: Sequence, index: int) -> StoredPage | None:
        """What the lookup has found for page `index` of a sequence, if that is in the next slice."""
        restore = self.restores.get(sequence.number)
        pages = restore.slices[0].pages if restore and restore.slices else []
        return next((page for page in pages if page.index == index), None)

    def ready(self, sequence: Sequence) -> Loaded | None:
        """The pages to copy in now, if they have been read."""
        restore = self.restores.get(sequence.number)
        if restore is None or not restore.slices or self.tokens_before_page(sequence):
            return None
        loading = restore.slices[0].loading
        return loading.result() if loading and loading.done() and not has_failed(loading) else None

    def copy_in(self, sequence: Sequence, loaded: Loaded, pool: KVPool) -> tuple[KVPool, Restored | None]:
        """Copy pages into a sequence's lease, which has room for them.

        Returns the pool to go on with, and what is new; None if another sequence has brought all of it, or no copy can
        be compiled: then the restore is given up.
        """
        restore = self.restores[sequence.number]
        assert sequence.lease is not None
        assert restore.slices is not None
        restore.slices.popleft()
        self.measured(loaded.fetched)
        self.copied_at = time.monotonic()
        before, at = sequence.computed, loaded.first
        if loaded.stop <= before:
            return pool, None
        assert at + sum(map(len, loaded.arrays)) == pages_for(loaded.stop, self.page_size), (
            "only the last loaded page may be partly filled: the tokens that another one lacks would count as computed"
        )
        # Pages that are full by now are not this lease's to write: their copies go to a page out of range.
        pages = sequence.lease.pages.astype(np.int32)
        pages[: before // self.page_size] = pool.num_pages
        try:
            for array in loaded.arrays:
                pool = self.copies.scatter[len(array)](pool, pages[at : at + len(array)], array)
                at += len(array)
        except CompileError as error:
            log.warning("a prefix is computed, not read back: %s", error)
            restore.slices = deque()
            return pool, None
        tokens: Counter[str] = Counter()
        for index, source in zip(range(loaded.first, at), loaded.fetched.sources, strict=False):
            assert source is not None
            start, stop = max(before, index * self.page_size), min(loaded.stop, (index + 1) * self.page_size)
            tokens[source] += max(0, stop - start)
        self.restored_tokens.update(tokens)
        return pool, Restored(loaded.stop, tokens)


def slices_of(pages: list[StoredPage], page_size: int, most: int) -> list[Slice]:
    """The pages, in order, as slices of up to `most` consecutive ones; a page that is not full ends its slice.

    A sequence that copies a slice in counts all tokens up to its end as computed, and those that a partly filled page
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


def has_failed(future: Future[T]) -> bool:
    """Whether a future has ended without a result."""
    return future.cancelled() or (future.done() and future.exception() is not None)


def attempted(start: Callable[[], Future[T]]) -> Future[T]:
    """The future that `start` returns; one that has failed, where it raises."""
    try:
        return start()
    except Exception as error:
        failed: Future[T] = Future()
        failed.set_exception(error)
        return failed
