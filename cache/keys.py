"""The hash chain that names pages by their content: the same keys on every machine and after every restart.

A key covers the model, page size, cache salt and token prefix of a page's KV. No page numbers, no storage here. Keys
are BLAKE2b (https://www.rfc-editor.org/rfc/rfc7693).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KEY_BYTES = 32
HEAD_SALT = b"\0head\0"  # of heads that all salts share; no header of a request can name it, as it has zero bytes


def root_key(fingerprint: bytes, page_size: int, salt: bytes) -> bytes:
    """The parent key of every first page: 32 bytes over the model, the page size in tokens and the cache salt."""
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}, expected at least 1 token: pass the pool's page size")
    root = hashlib.blake2b(digest_size=KEY_BYTES, person=b"tokenzero root")
    for part in (fingerprint, page_size.to_bytes(8, "little"), salt):
        # Lengths go first, so that no two triples give the same bytes.
        root.update(len(part).to_bytes(8, "little"))
        root.update(part)
    return root.digest()


def page_keys(root: bytes, tokens: np.ndarray, page_size: int) -> list[bytes]:
    """The keys of all full pages of `tokens` ([tokens] int32), in order; for a partly filled last page see `tail_key`.

    `root` comes from `root_key` with the same page size, or is the key of the page before `tokens`. A page's key covers
    every token before it, through its parent.
    """
    if len(root) != KEY_BYTES:
        raise ValueError(f"root key has {len(root)} bytes, expected {KEY_BYTES}: make it with root_key()")
    page_bytes = 4 * page_size
    data = token_bytes(tokens)
    keys, parent = [], root
    for at in range(0, len(data) - page_bytes + 1, page_bytes):
        parent = chained(parent, data[at : at + page_bytes])
        keys.append(parent)
    return keys


def tail_key(parent: bytes, tokens: np.ndarray) -> bytes:
    """The key of the page after `parent` of which only `tokens` ([tokens] int32, fewer than a page) are filled."""
    return chained(parent, token_bytes(tokens))


def border_key(parent: bytes, salt: bytes) -> bytes:
    """The parent key of the first page after a shared head, whose last page has the key `parent`: from here on, pages
    belong to the salt."""
    return hashlib.blake2b(parent + salt, digest_size=KEY_BYTES, person=b"tokenzero scope").digest()


@dataclass(frozen=True)
class PageChain:
    """The keys of one model's sequences under a salt. Their first `head` tokens, whole pages, all salts share."""

    fingerprint: bytes
    page_size: int
    salt: bytes
    head: int = 0

    @property
    def root(self) -> bytes:
        """The parent key of the first page."""
        return root_key(self.fingerprint, self.page_size, HEAD_SALT if self.head else self.salt)

    def parent(self, keys: Sequence[bytes], index: int) -> bytes:
        """The parent key of page `index`; `keys` are those of the pages before it."""
        return self.after(keys[index - 1], index) if index else self.root

    def after(self, key: bytes, index: int) -> bytes:
        """The parent key of page `index`, at least 1, where the page before it has this key."""
        return border_key(key, self.salt) if index * self.page_size == self.head else key

    def keys(self, tokens: np.ndarray) -> list[bytes]:
        """The keys of all full pages of `tokens` ([tokens] int32), in order."""
        keys = page_keys(self.root, tokens[: self.head or None], self.page_size)
        if 0 < self.head < len(tokens):
            keys += page_keys(self.parent(keys, len(keys)), tokens[self.head :], self.page_size)
        return keys

    def all_keys(self, tokens: np.ndarray, start: int = 0) -> list[bytes]:
        """Every key under which a page of `tokens` ([tokens] int32) may be stored, see the function `all_keys`."""
        shared, own = tokens[: self.head or None], tokens[self.head :]
        found = all_keys(self.root, shared, self.page_size, start) if start < len(shared) else []
        if self.head and len(own):
            border = self.parent(page_keys(self.root, shared, self.page_size), self.head // self.page_size)
            found += all_keys(border, own, self.page_size, max(0, start - self.head))
        return found


def all_keys(root: bytes, tokens: np.ndarray, page_size: int, start: int = 0) -> list[bytes]:
    """Every key under which a page of `tokens` ([tokens] int32) may be stored, from the page at position `start` on.

    That is the keys of full pages, and for each page those of all partial fillings that a shorter sequence may have
    left.
    """
    keys = page_keys(root, tokens, page_size)
    found = keys[start // page_size :]
    for first in range(start, len(tokens), page_size):
        parent = keys[first // page_size - 1] if first else root
        longest = min(first + page_size - 1, len(tokens))
        found += [tail_key(parent, tokens[first:stop]) for stop in range(first + 1, longest + 1)]
    return found


def chained(parent: bytes, data: memoryview) -> bytes:
    """The key of the page with token bytes `data` after page `parent`."""
    # The parent's length is fixed, so the concatenation is unambiguous.
    page = hashlib.blake2b(parent, digest_size=KEY_BYTES, person=b"tokenzero page")
    page.update(data)
    return page.digest()


def token_bytes(tokens: np.ndarray) -> memoryview:
    """Tokens as they are hashed: 4 bytes each, little-endian."""
    return memoryview(np.asarray(tokens).astype("<i4").tobytes())
