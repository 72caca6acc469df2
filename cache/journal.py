"""What the radix tree lists and stops listing, in order, for a thread that tells others which prefixes are here.

The engine's thread appends; another thread takes. Pages are named by their content (`cache.keys`) only when they are
taken, so that the engine's thread never hashes for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache.keys import KEY_BYTES, PageChain, page_keys


@dataclass(frozen=True, eq=False)
class Listed:
    """Pages that the tree lists from now on; the last one may be filled partly."""

    salt: bytes
    tokens: np.ndarray  # [tokens] int32, the sequence up to the end of these pages; may grow, but does not change
    pages: np.ndarray  # [pages] int32, pages `first`, `first + 1`, ... of the sequence
    first: int
    before: int  # the page before them, -1 if there is none
    head: int = 0  # tokens that all salts share; none of these pages begins before them


class Journal:
    """Entries that were not taken yet. Whoever sets it on a tree takes them regularly, since nothing bounds them."""

    def __init__(self) -> None:
        # Listed pages, pages ([pages] int32) that are listed no longer, or None: no page is.
        self.entries: deque[Listed | np.ndarray | None] = deque()

    def listed(self, listed: Listed) -> None:
        """Pages are listed, in place of what they held before."""
        self.entries.append(listed)

    def unlisted(self, pages: np.ndarray) -> None:
        """Pages ([pages] int32) are listed no longer, or listed anew by the next entry."""
        self.entries.append(pages.copy())

    def cleared(self) -> None:
        """The tree starts anew, without pages."""
        self.entries.append(None)


class ListedPages:
    """The content keys of the full pages that a tree lists, as its journal tells; used by one thread."""

    def __init__(self, num_pages: int, page_size: int, fingerprint: bytes) -> None:
        self.page_size, self.fingerprint = page_size, fingerprint
        self.keys = np.zeros((num_pages, KEY_BYTES), np.uint8)  # [pages, 32] uint8
        self.full = np.zeros(num_pages, bool)  # [pages] bool, whether the page is listed, and all of it filled

    def take(self, journal: Journal) -> tuple[np.ndarray, np.ndarray]:
        """Take all entries; returns the first 8 bytes of keys that were gained and lost, [pages] uint64 each.

        A key that came and went in between is in neither.
        """
        entries = [journal.entries.popleft() for _ in range(len(journal.entries))]
        touched = self._touched(entries)
        had, before = self.full[touched], short(self.keys[touched])
        for entry in entries:
            self._take(entry)
        has, now = self.full[touched], short(self.keys[touched])
        changed = (had != has) | (before != now)
        lost, gained = before[had & changed], now[has & changed]
        # A page may have moved from one place of the pool to another.
        return np.setdiff1d(gained, lost), np.setdiff1d(lost, gained)

    def held(self) -> np.ndarray:
        """The first 8 bytes of the key of every page, [pages] uint64."""
        return short(self.keys)[self.full]

    def _touched(self, entries: Sequence[Listed | np.ndarray | None]) -> np.ndarray:
        """The pages that entries name, [pages] int32: a pool may have a million others."""
        if any(entry is None for entry in entries):
            return np.arange(len(self.full), dtype=np.int32)
        named = [entry.pages if isinstance(entry, Listed) else entry for entry in entries if entry is not None]
        return np.unique(np.concatenate([np.zeros(0, np.int32), *named]))

    def _take(self, entry: Listed | np.ndarray | None) -> None:
        if entry is None:
            self.full[:] = False
        elif isinstance(entry, Listed):
            chain = PageChain(self.fingerprint, self.page_size, entry.salt, entry.head)
            before = self.keys[entry.before].tobytes()
            parent = chain.after(before, entry.first) if entry.before >= 0 else chain.root
            keys = page_keys(parent, entry.tokens[entry.first * self.page_size :], self.page_size)
            full = entry.pages[: len(keys)]
            self.keys[full] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
            self.full[full] = True
        else:
            self.full[entry] = False


def short(keys: np.ndarray) -> np.ndarray:
    """The first 8 bytes of keys ([pages, 32] uint8) as little-endian numbers, [pages] uint64."""
    return np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0].astype(np.uint64)
