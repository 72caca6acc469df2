"""The tiers below the device pool, as an engine needs them: look up, prefetch, write back and forget pages.

Pages are named by their content (cache.keys); a page that a sequence left partly filled has a key of its own.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.host import HostTier
from cache.keys import PageChain, tail_key
from cache.radix_tree import common_prefix
from cache.tier import Tier, TieredPages
from cache.worker import Worker
from cache.writeback import WriteBack

log = logging.getLogger("tokenzero.cache.tiers")

# Forgetting waits so long for pages that are being written, and deletes so many keys at once: writers wait meanwhile.
FORGET_SECONDS = 5.0
FORGET_STEP = 512
FORGET_AGAIN_SECONDS = 10.0
# Tiers that are asked how much they have of a sequence only because somebody looks: no network, and nothing to pay.
LOCAL = ("host", "disk")


@dataclass(frozen=True)
class StoredPage:
    """A page of a sequence that a tier has."""

    index: int  # in the sequence
    key: bytes
    tokens: int  # filled, from the page's start on
    tier: str
    # See cache.tier.Tier; 0 after a hole, where no page counts as used until the hole is filled.
    stamp: int = 0


@dataclass(frozen=True)
class Found:
    """What the tiers have of a sequence whose first pages are on the device."""

    pages: list[StoredPage]  # after those on the device, in order; there may be holes
    missing: list[int]  # indices of pages on the device that the lowest tier has lost


class Tiers:
    """Host memory, and a disk or a remote KV store; opened together, closed together.

    `store` is a directory or a URL that TensorStore knows (`s3://`, `gs://`, `file://`), None for memory alone. Raises
    StoreError if the directory belongs to another program or version, ValueError if TensorStore refuses the URL.
    """

    def __init__(
        self,
        store: str | None,
        store_bytes: int,
        host_bytes: int,
        flush_seconds: float = 1.0,
        queue_bytes: int = 1 << 30,  # of pages that wait to be written
    ) -> None:
        tiers: list[Tier] = [HostTier(host_bytes)] if host_bytes or not store else []
        # Imported late: a machine that stores nothing does not need their libraries.
        if store and "://" in store:
            from cache.remote import RemoteTier

            tiers.append(RemoteTier(store))
        elif store:
            from cache.disk import DiskTier

            tiers.append(DiskTier(Path(store), store_bytes))
        self.pages = TieredPages(tiers)
        self.writer = WriteBack(tiers, flush_seconds, queue_bytes)
        # Its own thread, so that lookups do not wait for pages that are read for another request.
        self.searcher = Worker("look-up")
        # Another one, since it goes through a whole store: seconds, for a million pages.
        self.lister = Worker("list")

    def look(
        self,
        parents: Sequence[bytes],
        keys: Sequence[bytes],
        tokens: np.ndarray,  # [tokens] int32
        held: int,
        page_size: int,
        used: int,
    ) -> "Future[Found]":
        """Search for the pages of `tokens` after the first `held`; `keys` are those of its full pages.

        `parents` are the parent keys of these, and of the page after them. Pages that are found or held count as used
        at the time `used` (nanoseconds since 1970).
        """
        return self.searcher.submit(look, self.pages, parents, keys, tokens, held, page_size, used)

    def find(
        self,
        parents: Sequence[bytes],
        keys: Sequence[bytes],
        tokens: np.ndarray,  # [tokens] int32
        held: int,
        page_size: int,
    ) -> "Future[list[StoredPage]]":
        """The pages that `look` would find, without a use of any."""
        return self.searcher.submit(find, self.pages, parents, keys, tokens, held, page_size, 0)

    def recent(self, size: int, count: int) -> "Future[list[bytes]]":
        """Keys of up to `count` pages of `size` bytes, the most recently used first: what is likely to be asked for."""
        return self.lister.submit(self.pages.recent, size, count)

    def held(self, chains: Sequence[Sequence[bytes]]) -> "Future[list[dict[str, int]]]":
        """Of each chain of keys, how many pages from the first on each of the LOCAL tiers has; a use of none."""
        return self.lister.submit(held, self.pages, chains)

    def forget(
        self,
        chain: PageChain,
        sequences: Sequence[np.ndarray],  # each [tokens] int32
        start: int,
    ) -> "Future[int]":
        """Delete the sequences' pages from position `start` on, partly filled ones too; results in the number of keys.

        In the background, but before any later `look`: a later request does not find these pages, even while a slow or
        failing tier has yet to delete them.
        """
        return self.searcher.submit(self._forget, chain, sequences, start)

    def _forget(self, chain: PageChain, sequences: Sequence[np.ndarray], start: int) -> int:
        found, before = list[bytes](), np.zeros(0, np.int32)
        for tokens in sequences:  # neighbours share most of their tokens, whose keys are made once
            shared = common_prefix(before, tokens) // chain.page_size * chain.page_size
            found += chain.all_keys(tokens, max(start, shared))
            before = tokens
        keys = list(dict.fromkeys(found))
        self.pages.hidden |= frozenset(keys)
        self._delete(keys)
        return len(keys)

    def _delete(self, keys: Sequence[bytes]) -> None:
        """Delete pages from all tiers, repeatedly until they are gone; until then they stay hidden."""
        gone = self.writer.flush(FORGET_SECONDS)  # some pages may still wait to be written
        for at in range(0, len(keys), FORGET_STEP):
            with suppress(TimeoutError, CancelledError):
                if self.pages.forget(keys[at : at + FORGET_STEP]).result(FORGET_SECONDS):
                    continue
            gone = False
        if gone:
            self.pages.hidden -= frozenset(keys)
            return
        again = threading.Timer(FORGET_AGAIN_SECONDS, self.searcher.submit, (self._delete, keys))
        again.daemon = True
        again.start()

    def close(self, seconds: float = 60.0) -> None:
        """Write queued pages, then close all tiers, in at most so many seconds: a tier that takes longer is left alone.

        All threads are daemons, so none delays the end of the process.
        """
        end = time.monotonic() + seconds
        for worker in (self.searcher, self.lister):
            worker.stop()
        written = self.writer.close(seconds)
        closed = self.pages.close(max(0.0, end - time.monotonic()))
        for worker in (self.searcher, self.lister):
            worker.thread.join(max(0.0, end - time.monotonic()))
        if not (written and closed):
            lost = self.writer.queued_bytes
            log.warning("the tiers did not close in %.0f s: %d bytes of pages may not be written", seconds, lost)


def look(
    pages: TieredPages,
    parents: Sequence[bytes],
    keys: Sequence[bytes],
    tokens: np.ndarray,  # [tokens] int32
    held: int,
    page_size: int,
    used: int,
) -> Found:
    """See Tiers.look; in the calling thread."""
    there = pages.touch(keys[:held], range(used, used - held, -1)) if held else []
    found = find(pages, parents, keys, tokens, held, page_size, used)
    # All at once, before anything is read or computed, so that no page is ever recorded as newer than one before it.
    pages.touch([page.key for page in found], [page.stamp for page in found])
    return Found(found, [i for i, known in enumerate(there) if not known])


def find(
    pages: TieredPages,
    parents: Sequence[bytes],
    keys: Sequence[bytes],
    tokens: np.ndarray,  # [tokens] int32
    held: int,
    page_size: int,
    used: int,
) -> list[StoredPage]:
    """The pages that the tiers have of a sequence after the first `held`, in order, with the stamps of a use then.

    It is not a use of them.
    """
    names = pages.locate(keys[held:])
    first_missing = held + (names.index(None) if None in names else len(names))
    found = [
        StoredPage(i, keys[i], page_size, name, used - i if i < first_missing else 0)
        for i, name in enumerate(names, held)
        if name is not None
    ]
    start = first_missing * page_size
    # A sequence that ended in this page left it partly filled: find the longest filling that these tokens share.
    parent = parents[first_missing]
    lengths = range(min(page_size - 1, len(tokens) - start), 0, -1)
    tails = [tail_key(parent, tokens[start : start + length]) for length in lengths]
    for length, key, name in zip(lengths, tails, pages.locate(tails), strict=True):
        if name is not None:
            found.append(StoredPage(first_missing, key, length, name, used - first_missing))
            break
    return sorted(found, key=lambda page: page.index)


def held(pages: TieredPages, chains: Sequence[Sequence[bytes]]) -> list[dict[str, int]]:
    """See Tiers.held; in the calling thread."""
    found: list[dict[str, int]] = [{} for _ in chains]
    for tier in pages.tiers:
        if tier.name in LOCAL:
            for counts, length in zip(found, lengths(pages, tier, chains), strict=True):
                counts[tier.name] = length
    return found


def lengths(pages: TieredPages, tier: Tier, chains: Sequence[Sequence[bytes]]) -> list[int]:
    """How many pages of each chain a tier has, from the first on: by bisection, since a chain loses its end first."""
    least, most = [0] * len(chains), [len(chain) for chain in chains]
    while unsure := [i for i in range(len(chains)) if least[i] < most[i]]:
        middles = [(least[i] + most[i] + 1) // 2 for i in unsure]
        keys = [chains[i][middle - 1] for i, middle in zip(unsure, middles, strict=True)]
        there = pages.has(tier, keys)
        for i, middle, known in zip(unsure, middles, there, strict=True):
            if known:
                least[i] = middle
            else:
                most[i] = middle - 1
    return least
