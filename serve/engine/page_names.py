"""The keys by which the tiers know a sequence's pages: each is a digest of the page's tokens and all before them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache.keys import page_keys, root_key, tail_key
from serve.engine.sequence import Sequence


@dataclass(frozen=True)
class PageNames:
    """Names the pages of one model's sequences; `fingerprint` is the model's."""

    fingerprint: bytes
    page_size: int

    def extend(self, sequence: Sequence, count: int) -> None:
        """Compute `sequence.keys` up to its first `count` full pages; those that it has already are kept."""
        have, size = len(sequence.keys), self.page_size
        if have < count:
            sequence.keys += page_keys(self.parent(sequence, have), sequence.tokens[have * size : count * size], size)

    def parent(self, sequence: Sequence, index: int) -> bytes:
        """The key of the page before page `index` of a sequence, which must have its key; the root key for page 0."""
        if index:
            return sequence.keys[index - 1]
        return root_key(self.fingerprint, self.page_size, sequence.request.salt)

    def tail(self, sequence: Sequence, index: int, tokens: np.ndarray) -> bytes:
        """The key of page `index` of a sequence, partly filled with `tokens` ([tokens] int32)."""
        return tail_key(self.parent(sequence, index), tokens)
