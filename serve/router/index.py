"""Which replica holds which pages, by the first 8 bytes of their chain keys."""

from __future__ import annotations

import numpy as np


class PrefixIndex:
    """The pages of each replica. A replica that holds a page holds the pages before it, too."""

    def __init__(self) -> None:
        self.held: dict[str, set[int]] = {}

    def add(self, replica: str, pages: int) -> None:
        """A new replica, with nothing cached and room for `pages`."""
        self.held[replica] = set()

    def drop(self, replica: str) -> None:
        """Forget a replica."""
        self.held.pop(replica, None)

    def insert(self, replica: str, keys: np.ndarray) -> None:
        """A replica holds `keys` ([pages] uint64)."""
        self.held[replica].update(keys.tolist())

    def remove(self, replica: str, keys: np.ndarray) -> None:
        """A replica holds `keys` ([pages] uint64) no longer."""
        self.held[replica].difference_update(keys.tolist())

    def overlap(self, keys: np.ndarray) -> dict[str, int]:
        """How many of `keys` ([pages] uint64, a prompt's in order) each replica holds, from the first one on."""
        listed = keys.tolist()
        return {
            name: next((i for i, key in enumerate(listed) if key not in held), len(listed))
            for name, held in self.held.items()
        }
