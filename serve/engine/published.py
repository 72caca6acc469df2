"""Which pages the prefix cache holds, by key, told to a listener: what a router of several engines needs to know."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cache.prefix_cache import PrefixCache
from serve.engine.page_names import PageNames
from serve.engine.sequence import Sequence


class PageListener(Protocol):
    """Is told of full pages by the first 8 bytes of their keys, on the engine's thread; such as a router's PageLog."""

    def added(self, keys: np.ndarray) -> None:
        """Pages ([pages] uint64) are cached, in the order of their prompt."""

    def removed(self, keys: np.ndarray) -> None:
        """Pages ([pages] uint64) are cached no longer."""

    def cleared(self) -> None:
        """Nothing is cached any more."""


class PublishedPages:
    """The keys of one prefix cache's full pages. Belongs to the engine's thread."""

    def __init__(self, cache: PrefixCache, listener: PageListener) -> None:
        self.listener = listener
        self.listen_to(cache)

    def listen_to(self, cache: PrefixCache) -> None:
        """Begin with a cache that is empty, or whose pages are left out until they are inserted again."""
        self.names = PageNames(cache.fingerprint, cache.page_size)
        self.held = cache.tree.held
        self.keys = np.zeros(cache.pool.num_pages, np.uint64)  # [pages] by number, 0 where none is known
        self.listener.cleared()
        cache.tree.on_release = self.released

    def inserted(self, sequence: Sequence) -> None:
        """What a sequence has computed so far was inserted."""
        assert sequence.lease is not None
        full = sequence.computed // self.names.page_size
        pages = sequence.lease.pages[:full]
        # The tree keeps the page that had the same tokens before, whose key is known by then.
        fresh = np.flatnonzero(self.held[pages] & (self.keys[pages] == 0))
        if len(fresh):
            self.names.extend(sequence, full)
            keys = np.frombuffer(b"".join(sequence.keys[i][:8] for i in fresh.tolist()), "<u8")
            self.keys[pages[fresh]] = keys
            self.listener.added(keys)

    def released(self, pages: np.ndarray) -> None:
        """The cache holds `pages` ([pages] int32, numbers) no longer."""
        keys = self.keys[pages]
        self.keys[pages] = 0
        if keys.any():
            self.listener.removed(keys[keys > 0])
