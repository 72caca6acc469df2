"""Pages on their way up before any request asks for them: the store's most recently used ones, read in idle moments.

After a restart the next request most likely goes on with a conversation that the store has. Its pages are read into
free pages of the pool, where they are known by their key alone. A sequence whose chain has the key takes the page over,
with no read and no copy. A store does not say which model a page is of: one of another model is never asked for.

`Preloader` belongs to the engine's thread; reading runs on the tiers' thread, and only while no request is in the
engine.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice

import jax
import numpy as np

from cache.preloaded import PreloadedPages
from cache.tier import Fetched
from cache.tiers import StoredPage
from serve.engine.memory import Memory, usable
from serve.engine.page_copies import MANY_BYTES
from serve.engine.restore import Restorer, attempted, has_failed
from serve.engine.sequence import Sequence

log = logging.getLogger("tokenzero.preload")

# Reads under way at a time: one is copied in while the next one is read. A request that comes waits for one at most.
READS = 2
# Of the pool's pages, at most one in so many is preloaded.
SHARE_OF_PAGES = 2


@dataclass(frozen=True)
class Preloading:
    """Pages that are being read, each on its own: of a chain, some may be gone."""

    keys: list[bytes]
    loading: Future[tuple[list[jax.Array], Fetched]]  # arrays, each [n, *page_shape], of all keys in order


class Preloader:
    """Reads up to `preload_bytes` of pages, and up to half of the pool, from the tiers of one engine.

    What was promised to be kept comes first, then what was used last. What was read is `PrefixCache.preloaded`: it goes
    with the pool, and is the first to be evicted, but for what is kept.
    """

    def __init__(
        self,
        restorer: Restorer,
        memory: Memory,
        wake: Callable[[], None],
        preload_bytes: int,
        first: Iterable[bytes] = (),  # keys of pages that are read before all others
    ) -> None:
        self.restorer, self.memory, self.wake = restorer, memory, wake
        most = min(preload_bytes // restorer.page_bytes, memory.prefix_cache.pool.num_pages // SHARE_OF_PAGES)
        fitting = [count for count in restorer.copies.scatter if count * restorer.page_bytes <= MANY_BYTES]
        self.read_pages = min(restorer.slice_pages, max(fitting, default=1))
        restorer.is_preloaded = lambda key: key in memory.prefix_cache.preloaded
        self.most = max(0, most)  # pages that are still read at most
        self.left: dict[bytes, None] = dict.fromkeys(islice(first, self.most))  # keys of pages to read, in this order
        self.reads: deque[Preloading] = deque()
        self.listing = attempted(partial(restorer.tiers.recent, restorer.page_bytes, most)) if most > 0 else None
        if self.listing:
            self.listing.add_done_callback(lambda _: wake())

    @property
    def preloaded(self) -> PreloadedPages:
        """The pages that are in the pool now."""
        return self.memory.prefix_cache.preloaded

    @property
    def ahead(self) -> bool:
        """Whether more is to come."""
        return bool(self.listing or self.reads or (self.left and self.memory.prefix_cache.pool.free_pages))

    # Reading.

    def step(self, quiet: bool) -> bool:
        """Copy in what has been read; read on if the engine is `quiet`, else see that no request waits for it.

        Returns whether anything is being listed or read. Raises what a copy raises that has lost the pool. After any
        copy that failed, nothing more is preloaded.
        """
        self._list()
        while self.reads and self.reads[0].loading.done():
            self._copy_in(self.reads.popleft())
        if quiet:
            self._read_on()
        elif self.reads and self.reads[-1].loading.cancel():
            self.left = dict.fromkeys(self.reads.pop().keys) | self.left
        return bool(self.listing or self.reads)

    def stop(self) -> None:
        """Read nothing more, and use nothing of what is being read."""
        for read in self.reads:
            read.loading.cancel()
        self.listing, self.left = None, {}
        self.reads.clear()

    def forget(self) -> None:
        """Stop, and give back what was read and not taken over: something in the tiers is wrong."""
        self.stop()
        self.preloaded.drop(list(self.preloaded.by_key))

    def _list(self) -> None:
        """Note what is to be read, once the tiers have listed it."""
        if self.listing and self.listing.done():
            listed, self.listing = self.listing, None
            every = [*self.left, *([] if has_failed(listed) else listed.result())]
            self.left = dict.fromkeys(islice(dict.fromkeys(every), max(0, self.most)))

    def _skip(self, keys: list[bytes]) -> None:
        """Do not read what a sequence restores itself."""
        self._list()
        for key in keys if self.left else ():
            self.left.pop(key, None)

    def _read_on(self) -> None:
        """Start to read the next pages, as far as the pool has free ones."""
        restorer, free = self.restorer, self.memory.prefix_cache.pool.free_pages
        free -= sum(len(read.keys) for read in self.reads)
        while self.left and free > 0 and len(self.reads) < READS:
            keys = list(islice(self.left, min(free, self.read_pages)))
            for key in keys:
                del self.left[key]
            free, self.most = free - len(keys), self.most - len(keys)
            size = len(keys) * restorer.page_bytes
            data = restorer.staging.buffer(size).reshape(len(keys), restorer.page_bytes)
            # Stamped with zeros: nobody has used them yet.
            start = partial(restorer.tiers.pages.fetch, keys, data, partial(self._load, data), [0] * len(keys))
            self.reads.append(Preloading(keys, attempted(start)))
            restorer.staged[self.reads[-1].loading] = restorer.staging.takes(size)
            self.reads[-1].loading.add_done_callback(lambda _: self.wake())

    def _load(self, data: np.ndarray, fetched: Fetched) -> tuple[list[jax.Array], Fetched]:
        return self.restorer.to_device(data), fetched

    def _copy_in(self, read: Preloading) -> None:
        """Copy what was read to free pages of the pool, if there are still enough."""
        cache, nowhere = self.memory.prefix_cache, self.memory.pool.num_pages
        if has_failed(read.loading):
            return
        arrays, fetched = read.loading.result()
        self.restorer.measured(fetched)
        found = {
            key: tier
            for key, tier in zip(read.keys, fetched.sources, strict=True)
            if tier is not None and key not in self.preloaded
        }
        if not found or len(found) > cache.pool.free_pages:
            return
        taken = dict(zip(found, self.preloaded.add(found), strict=True))
        # The rows of pages that are gone hold anything, and go to a page out of range.
        pages = np.asarray([taken.get(key, nowhere) for key in read.keys], np.int32)
        at = 0
        try:
            for array in arrays:
                copy = self.restorer.copies.scatter[len(array)]
                self.memory.pool = copy(self.memory.pool, pages[at : at + len(array)], array)
                at += len(array)
        except Exception as error:
            self.preloaded.drop(list(found))
            self.stop()
            if not usable(self.memory.pool):
                raise
            log.warning("nothing more is preloaded: %s: %s", type(error).__name__, error)

    # Taking over.

    def restore(self, sequence: Sequence, make_room: Callable[[Sequence, int], bool]) -> bool:
        """Read ahead for a running sequence, and copy in its next pages if they have come. Whether they have.

        `make_room` extends its lease to a number of tokens, and returns False where it has none any more.
        """
        restorer, memory = self.restorer, self.memory
        if sequence.lease is None:
            return False
        taken = self.look_up(sequence)
        if (loaded := restorer.ready(sequence)) is None:
            return taken
        memory.refresh_match(sequence)  # another may have brought the same pages meanwhile
        restorer.read_ahead(sequence)
        if restorer.ready(sequence) is not loaded:
            return taken
        if make_room(sequence, max(loaded.stop, sequence.computed)):
            memory.pool, restored = restorer.copy_in(sequence, loaded, memory.pool)
            if restored:
                sequence.mark_restored(restored.stop, restored.tokens)
            memory.publish(sequence)
        return True

    def look_up(self, sequence: Sequence) -> bool:
        """Take over what is preloaded of a running sequence, look up and read ahead the rest. Whether any was."""
        restorer, taken = self.restorer, False
        if not restorer.looked_up(sequence):
            self.memory.refresh_match(sequence)  # a sequence before this one may have taken the same pages over
            taken = self.take(sequence)
            restorer.look_up(sequence, sequence.computed)
            self._skip(sequence.keys)
        restorer.read_ahead(sequence)
        if self.take(sequence):
            restorer.read_ahead(sequence)  # without what was taken over: no chunk ends where it would be copied in
            taken = True
        return taken

    def take(self, sequence: Sequence) -> bool:
        """Give a sequence with a lease the preloaded pages that come next in it. Whether there were any."""
        cache, page_size = self.memory.prefix_cache, self.restorer.page_size
        if not self.preloaded or sequence.lease is None:
            return False
        first, inside = divmod(sequence.computed, page_size)
        if inside and sequence.computed > sequence.lease.reused:
            return False  # others may read what it has computed in this page: it is not replaced
        full = len(sequence.matchable_tokens) // page_size
        self.restorer.names.extend(sequence, full)
        keys, stop = self.preloaded.run(sequence.keys[first:full]), sequence.computed
        if keys:
            stop = (first + len(keys)) * page_size
        elif (tail := self._tail(sequence, first)) and first * page_size + tail.tokens > stop:
            keys, stop = [tail.key], first * page_size + tail.tokens
        if not keys:
            return False
        lease, tiers = cache.adopt(sequence.lease, first, keys)
        sequence.hold(lease)
        tokens: Counter[str] = Counter()
        for index, tier in enumerate(tiers, first):
            tokens[tier] += min(stop, (index + 1) * page_size) - max(sequence.computed, index * page_size)
        self.restorer.restored_tokens.update(tokens)
        sequence.mark_restored(stop, tokens)
        self.memory.publish(sequence)
        return True

    def _tail(self, sequence: Sequence, index: int) -> StoredPage | None:
        """The partly filled page that a lookup has found for page `index`, the longest there is, if it is preloaded."""
        page = self.restorer.next_page(sequence, index)
        return page if page and page.key in self.preloaded else None
