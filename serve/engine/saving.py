"""Pages on their way down, from the device pool to the tiers.

`Saver` belongs to the engine's thread. The writer's thread only ever sees copies of pages, which the device makes
between two steps, never the pool, whose buffers end with each donation. Whatever fails here costs the tiers some pages,
and no request notices.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from cache.eviction import demotion_s
from cache.nodes import Use
from cache.pool import pages_for
from cache.prefix_cache import Lease
from cache.worker import Failures
from cache.writeback import WriteBack
from serve.engine.memory import Memory
from serve.engine.page_copies import PageCopies, batch_sizes
from serve.engine.page_names import PageNames
from serve.engine.sequence import Sequence

MOST_STAMPED = 1 << 17  # pages whose names are kept: about 15 MB


@dataclass(frozen=True)
class UnsavedPage:
    """A page on the device that the tiers lack."""

    key: bytes
    page: int  # of the pool
    stamp: int  # of its use, see cache.tier.Tier


@dataclass(frozen=True)
class PendingWrite:
    """Pages of a sequence that has ended, held by its lease until the writer takes them."""

    lease: Lease
    pages: list[UnsavedPage]


@dataclass(frozen=True)
class Stamped:
    """The pages of a request that has ended, as the tiers know them."""

    used: int  # ns since 1970: page i has the stamp `used - i`
    keys: list[bytes]
    stamps: list[int]


class Saver:
    """Queues full pages for the tiers' writer, as far as its queue has room.

    A running sequence tries again in later steps. One that ends leaves its lease in `pending_writes` until the writer
    has taken its pages, or the pool needs them.
    """

    def __init__(self, writer: WriteBack, memory: Memory, copies: PageCopies, names: PageNames) -> None:
        self.writer, self.memory, self.copies, self.names = writer, memory, copies, names
        self.failures = Failures()
        self.pending_writes: deque[PendingWrite] = deque()
        self.stamped: OrderedDict[Use, Stamped] = OrderedDict()  # of requests that may be demoted, the latest ones
        self.stamped_pages = 0

    def save(self, sequence: Sequence) -> None:
        """Queue the pages that a running sequence has filled."""
        if unsaved := self._full_pages(sequence):
            taken = self._submit([page for _, page in unsaved])
            sequence.mark_saved(index for index, _ in unsaved[:taken])

    def last_pages(self, sequence: Sequence) -> list[UnsavedPage]:
        """The unsaved pages of a sequence that is about to give its lease up, its partly filled page included."""
        pages = [page for _, page in self._full_pages(sequence)]
        sequence.mark_saved(list(sequence.unsaved))
        full = sequence.computed // sequence.page_size
        rest = sequence.tokens[full * sequence.page_size : sequence.computed]
        if len(rest) and sequence.computed > sequence.reused:
            pages += [self._tail(sequence, full, rest), *self._fork(sequence, full)]
        self._remember(sequence, full, pages)
        return pages

    def demote(self) -> None:
        """Let the tiers count uses as earlier whose agents are not expected back soon, once their pages are written."""
        cache = self.memory.prefix_cache
        while cache.demoted and not self.pending_writes:
            use = cache.demoted.popleft()
            if (pages := self.stamped.get(use)) is None:
                continue
            first = pages_for(cache.tree.own_start(use), cache.page_size)
            own = [(k, s) for k, s in zip(pages.keys, pages.stamps, strict=True) if pages.used - s >= first]
            self.writer.demote([key for key, _ in own], [stamp for _, stamp in own], demotion_s(use.state))

    def _remember(self, sequence: Sequence, full: int, pages: list[UnsavedPage]) -> None:
        """Keep the names of a sequence's pages for as long as they may be demoted."""
        if sequence.use is None:
            return
        known = dict(zip(sequence.keys[:full], range(sequence.used, sequence.used - full, -1), strict=True))
        known |= {page.key: page.stamp for page in pages}
        if (before := self.stamped.pop(sequence.use, None)) is not None:  # it was preempted
            self.stamped_pages -= len(before.keys)
        self.stamped[sequence.use] = Stamped(sequence.used, list(known), list(known.values()))
        self.stamped_pages += len(known)
        while self.stamped_pages > MOST_STAMPED:
            self.stamped_pages -= len(self.stamped.popitem(last=False)[1].keys)

    def finish(self, lease: Lease, pages: list[UnsavedPage]) -> None:
        """Queue the last pages of a sequence, and end its lease when the writer has taken all."""
        self.pending_writes.append(PendingWrite(lease, pages))
        self.save_pending()

    def save_pending(self) -> bool:
        """Queue pages of sequences that have ended, and end the leases of those that are done. Whether any was."""
        before = len(self.pending_writes)
        while self.pending_writes:
            first = self.pending_writes[0]
            rest = first.pages[self._submit(first.pages) :]
            if rest:
                self.pending_writes[0] = PendingWrite(first.lease, rest)
                break
            self.pending_writes.popleft()
            self.memory.release(first.lease)
        return len(self.pending_writes) < before

    def drop_oldest(self) -> bool:
        """Give up the oldest pages that the writer was too slow for; False if there are none."""
        if not self.pending_writes:
            return False
        oldest = self.pending_writes.popleft()
        self.writer.drop(len(oldest.pages))
        self.memory.release(oldest.lease)
        return True

    def drain(self, seconds: float) -> None:
        """Wait until the writer has taken all pages of sequences that have ended, but no longer than `seconds`."""
        end = time.monotonic() + seconds
        self.save_pending()
        while self.pending_writes and not self.writer.closing and self.writer.flush(max(0.0, end - time.monotonic())):
            self.save_pending()
        while self.drop_oldest():
            pass

    def _full_pages(self, sequence: Sequence) -> list[tuple[int, UnsavedPage]]:
        """The full pages of a sequence that still have to go to the tiers, each with its index; names them."""
        assert sequence.lease is not None
        full = sequence.seal()
        self.names.extend(sequence, full)
        if full > sequence.stamped:
            # Those of others, too: none may be older than what this sequence writes after it.
            stamps = range(sequence.used - sequence.stamped, sequence.used - full, -1)
            self.writer.use(sequence.keys[sequence.stamped : full], stamps)
            sequence.stamped = full
        unsaved = []
        for i in sequence.unsaved:
            if i < full:
                page = UnsavedPage(sequence.keys[i], int(sequence.lease.pages[i]), sequence.used - i)
                unsaved += [(i, each) for each in (page, *self._fork(sequence, i))]
        return unsaved

    def _fork(self, sequence: Sequence, index: int) -> list[UnsavedPage]:
        """The start of a sequence's page that it shares with another one, under a key of its own.

        No key of a full page finds it: a third sequence that shares as much would have to compute it after a restart.
        """
        first = index * sequence.page_size
        # After a preemption, less may be computed again than was reused before.
        shared = sequence.tokens[first : min(sequence.reused_until, sequence.computed)]
        return [self._tail(sequence, index, shared)] if 0 < len(shared) < sequence.page_size else []

    def _tail(self, sequence: Sequence, index: int, tokens: np.ndarray) -> UnsavedPage:
        """A page of a sequence under the key of the `tokens` that it begins with."""
        assert sequence.lease is not None
        key = self.names.tail(sequence, index, tokens)
        return UnsavedPage(key, int(sequence.lease.pages[index]), sequence.used - index)

    def _submit(self, pages: list[UnsavedPage]) -> int:
        """Copy pages and queue the copies, the first ones first. Returns how many are done with.

        Pages of which no copy can be made (a device may be short of memory) are lost to the tiers, and counted.
        """
        taken = 0
        for count in batch_sizes(len(pages)):
            if not self.writer.has_room(count * self.copies.page_bytes):
                break
            chosen = pages[taken : taken + count]
            if self.failures.guard(f"{count} pages are not saved", partial(self._queue, chosen), None) is None:
                self.writer.drop(count)
            taken += count
        return taken

    def _queue(self, pages: list[UnsavedPage]) -> bool:
        """Copy pages, as many as one compiled copy moves, and queue them; False if the writer has no room after all."""
        table = np.asarray([each.page for each in pages], np.int32)
        copy = self.copies.gather[len(pages)](self.memory.pool, table)
        size = len(pages) * self.copies.page_bytes
        keys, stamps = [each.key for each in pages], [each.stamp for each in pages]
        return self.writer.submit(keys, size, partial(payloads, copy), stamps)


def payloads(copy: jax.Array) -> list[bytes]:
    """Copied pages, [count, *page_shape], as bytes; waits for the device."""
    return [page.tobytes() for page in np.asarray(copy)]
