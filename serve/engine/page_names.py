"""The keys by which the tiers know a sequence's pages: each is a digest of the page's tokens and all before them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache.keys import PageChain, page_keys, tail_key
from serve.engine.sequence import Sequence


@dataclass(frozen=True)
class PageNames:
    """Names the pages of one model's sequences; `fingerprint` is the model's."""

    fingerprint: bytes
    page_size: int

    def extend(self, sequence: Sequence, count: int) -> None:
        """Compute `sequence.keys` up to its first `count` full pages; those that it has already are kept."""
        size = self.page_size
        for stop in (min(count, sequence.request.head // size), count):  # what comes after a head has another parent
            if (have := len(sequence.keys)) < stop:
                parent = self.parent(sequence, have)
                sequence.keys += page_keys(parent, sequence.tokens[have * size : stop * size], size)

    def parent(self, sequence: Sequence, index: int) -> bytes:
        """The parent key of page `index` of a sequence, which must have the keys of all pages before it."""
        request = sequence.request
        return PageChain(self.fingerprint, self.page_size, request.salt, request.head).parent(sequence.keys, index)

    def parents(self, sequence: Sequence, count: int) -> list[bytes]:
        """The parent keys of a sequence's first `count` pages, and of the page after them."""
        after = sequence.request.head // self.page_size
        parents = [self.parent(sequence, 0), *sequence.keys[:count]]
        if 0 < after <= count:
            parents[after] = self.parent(sequence, after)
        return parents

    def tail(self, sequence: Sequence, index: int, tokens: np.ndarray) -> bytes:
        """The key of page `index` of a sequence, partly filled with `tokens` ([tokens] int32)."""
        return tail_key(self.parent(sequence, index), tokens)
