"""Device pages that were read from a tier before any request asked for them.

They are known by their key alone: of which tokens, only a request that makes the same key can tell. Each holds one
reference to its page, which a lease takes over (`PrefixCache.adopt`). They are the first to be evicted, but those whose
keys are in `kept` stay: an earlier server has promised that (`cache.retention`).
"""

from collections.abc import Container, Mapping, Sequence
from itertools import islice, takewhile

import numpy as np

from cache.nodes import NO_PAGES
from cache.pool import PagePool


class PreloadedPages:
    """Pages of one pool by their key, in the order in which they were read: the last are evicted first."""

    def __init__(self, pool: PagePool, kept: Container[bytes] = ()) -> None:
        self.pool, self.kept = pool, kept
        self.by_key: dict[bytes, tuple[int, str]] = {}  # page, and the tier that it came from
        self.read = self.taken = self.evicted = 0  # pages, since the start

    def __len__(self) -> int:
        """How many pages are held."""
        return len(self.by_key)

    def __contains__(self, key: bytes) -> bool:
        """Whether the page of a key is held."""
        return key in self.by_key

    @property
    def evictable(self) -> int:
        """How many may be evicted."""
        return sum(key not in self.kept for key in list(self.by_key)) if self.kept else len(self.by_key)

    @property
    def pages(self) -> np.ndarray:
        """The pages that are held, [pages] int32."""
        return np.asarray([page for page, _ in self.by_key.values()], np.int32) if self.by_key else NO_PAGES

    def add(self, found: Mapping[bytes, str]) -> np.ndarray:
        """Take a free page for each key, whose tier is given, and return them, [keys] int32.

        Their contents are the caller's to write, before anything else is enqueued on the device. Raises PoolExhausted.
        """
        assert not any(key in self.by_key for key in found), "a page is read twice"
        pages = self.pool.allocate(len(found))
        self.by_key |= {key: (int(page), tier) for (key, tier), page in zip(found.items(), pages, strict=True)}
        self.read += len(found)
        return pages

    def run(self, keys: Sequence[bytes]) -> list[bytes]:
        """The first of `keys` that are here, up to one that is not."""
        return list(takewhile(self.by_key.__contains__, keys))

    def take(self, keys: Sequence[bytes]) -> tuple[np.ndarray, list[str]]:
        """Hand over the pages of `keys`, which are here, with their references: [keys] int32, and their tiers."""
        taken = [self.by_key.pop(key) for key in keys]
        self.taken += len(taken)
        return np.asarray([page for page, _ in taken], np.int32), [tier for _, tier in taken]

    def evict(self, wanted: int) -> int:
        """Free up to `wanted` pages, those that were read last first; returns how many it freed."""
        last_first = (key for key in reversed(self.by_key) if key not in self.kept)
        return self.drop(list(islice(last_first, wanted)))

    def drop(self, keys: Sequence[bytes]) -> int:
        """Free the pages of `keys`, which are here; returns how many these are."""
        gone = [self.by_key.pop(key)[0] for key in keys]
        self.pool.release(np.asarray(gone, np.int32))
        self.evicted += len(gone)
        return len(gone)
