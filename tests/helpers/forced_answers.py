"""Answers forced on any model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Script:
    """A constraint that allows the given tokens, one after the other; the last one ends the turn."""

    def __init__(self, tokens: Sequence[int], vocab: int) -> None:
        self.tokens, self.at, self.words = tokens, 0, -(-vocab // 32)

    def mask(self) -> np.ndarray:
        """The one token that may come next, [words] uint32: bit t of word w stands for token 32w + t."""
        word, bit = divmod(self.tokens[self.at], 32)
        mask = np.zeros(self.words, np.uint32)
        mask[word] = 1 << bit
        return mask

    def accept(self, token: int) -> None:
        """Take the token that was sampled."""
        assert token == self.tokens[self.at], f"expected token {self.tokens[self.at]}, got {token}"
        self.at += 1
