"""The content hash chain of pages: what a page is called on every machine and after every restart.

A key says which model, page size, cache salt and token prefix a page's KV belongs to. No page numbers, no storage here.
"""

import hashlib

import numpy as np

KEY_BYTES = 32


def root_key(fingerprint: bytes, page_size: int, salt: bytes) -> bytes:
    """The parent of every first page: 32 bytes that bind the model, the page size in tokens and the cache salt."""
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}, expected at least 1 token: pass the pool's page size")
    root = hashlib.blake2b(digest_size=KEY_BYTES, person=b"tokenzero root")
    for part in (fingerprint, page_size.to_bytes(8, "little"), salt):
        # Lengths go first, so that no two triples spell the same bytes.
        root.update(len(part).to_bytes(8, "little"))
        root.update(part)
    return root.digest()


def page_keys(root: bytes, tokens: np.ndarray, page_size: int) -> list[bytes]:
    """The keys of all full pages of `tokens` ([tokens] int32), in order; a partial last page has no key.

    `root` comes from `root_key` with the same page size. A page's key covers every token before it, through its parent.
    """
    if len(root) != KEY_BYTES:
        raise ValueError(f"root key has {len(root)} bytes, expected {KEY_BYTES}: make it with root_key()")
    page_bytes = 4 * page_size
    data = memoryview(np.asarray(tokens).astype("<i4").tobytes())
    keys, parent = [], root
    for at in range(0, len(data) - page_bytes + 1, page_bytes):
        # Both parts have a fixed length under one root, so that joining them is unambiguous.
        page = hashlib.blake2b(parent, digest_size=KEY_BYTES, person=b"tokenzero page")
        page.update(data[at : at + page_bytes])
        parent = page.digest()
        keys.append(parent)
    return keys
