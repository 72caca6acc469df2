"""A replica's prefix cache in the simulation: the real one, with one number for a page's content.

`cache.prefix_cache.PrefixCache` with pages of one token, where a token is a page's number, is a prefix cache of whole
pages: the same matches, the same leases, the same order of eviction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

import numpy as np

from cache.nodes import Node
from cache.pool import PagePool, PoolExhausted
from cache.prefix_cache import Lease, PrefixCache
from cache.radix_tree import RadixTree

__all__ = ["Lease", "PoolExhausted", "ReplicaCache", "infinite_hits", "known_depth"]


class Ledger:
    """What a cache holds for others to find, and what it has gained and lost since the ledger was last read."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.gained: set[int] = set()
        self.lost: set[int] = set()

    def add(self, pages: np.ndarray) -> None:
        """A prompt's pages ([pages] int32) are cached; those before one that is held are held already."""
        for page in reversed(pages.tolist()):
            if page in self.held:
                break
            self.held.add(page)
            if page in self.lost:
                self.lost.discard(page)
            else:
                self.gained.add(page)

    def remove(self, pages: np.ndarray) -> None:
        """Pages ([pages] int32) were evicted."""
        for page in pages.tolist():
            self.held.discard(page)
            if page in self.gained:
                self.gained.discard(page)
            else:
                self.lost.add(page)

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """The pages gained and lost since the last call, [gained] and [lost] uint64."""
        gained, lost = (np.fromiter(pages, np.uint64, len(pages)) for pages in (self.gained, self.lost))
        self.gained.clear()
        self.lost.clear()
        return gained, lost


class ListedTree(RadixTree):
    """A radix tree that notes in a ledger what it evicts."""

    ledger: Ledger

    def _trim(self, leaf: Node, wanted: int) -> int:
        freed = super()._trim(leaf, wanted)
        if freed:
            self.ledger.remove(leaf.tokens[-freed:])
        return freed


class UniquePool(PagePool):
    """A page pool for leases that never list a page twice, which makes counting references faster."""

    def retain(self, pages: np.ndarray) -> None:
        """Add one reference to each of `pages` ([n] int32)."""
        self.ref_counts[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """Drop one reference from each of `pages` ([n] int32); pages without any reference become free."""
        left = self.ref_counts[pages] - 1  # [n] int32
        self.ref_counts[pages] = left
        freed = pages[left == 0]
        self.free_stack[self.free_pages : self.free_pages + len(freed)] = freed
        self.free_pages += len(freed)


class ReplicaCache(PrefixCache):
    """A prefix cache of `num_pages` pages whose contents are numbers ([pages] int32), with a ledger."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages, 1)
        self.ledger = Ledger()
        self.pool = UniquePool(num_pages)
        self.tree = tree = ListedTree(self.pool, 1)
        tree.ledger = self.ledger

    def insert(self, lease: Lease, tokens: np.ndarray) -> None:
        """Publish a prompt's pages ([pages] int32)."""
        super().insert(lease, tokens)
        self.ledger.add(tokens)


def known_depth(pages: Sequence[int] | np.ndarray, known: Set[int]) -> int:
    """How many of the first pages are in a set that holds every page with all pages before it."""
    low, high = 0, len(pages)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(pages[middle - 1]) in known else (low, middle - 1)
    return low


def infinite_hits(prompts: Iterable[tuple[np.ndarray, int]]) -> np.ndarray:
    """Pages of each prompt that one cache without a limit holds, [prompts] int64.

    A prompt is its pages ([pages] int32) and how many of them may be found.
    """
    known: set[int] = set()
    found = []
    for pages, most in prompts:
        depth = known_depth(pages, known)
        found.append(min(depth, most))
        known.update(pages[depth:].tolist())
    return np.array(found, np.int64)
