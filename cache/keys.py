"""The hash chain that names pages by their content: the same keys on every machine and after every restart.

A key covers the model, page size, cache salt and token prefix of a page's KV. No page numbers, no storage here. Keys
are BLAKE2b (https://www.rfc-editor.org/rfc/rfc7693).
"""

import hashlib

import numpy as np

KEY_BYTES = 32


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
