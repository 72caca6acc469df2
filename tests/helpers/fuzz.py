"""Bytes that are almost a valid body."""

from __future__ import annotations

import random
from collections.abc import Callable

Edit = Callable[[random.Random, bytes], bytes]
TOKENS = (
    b"null",
    b"1e999",
    b"-0",
    b"1" * 400,
    b'"\\ud800"',
    b'"\\u0000"',
    b"[" * 600,
    b'{"a":',
    b"\xff\xfe",
    b"NaN",
    b",",
)


def broken(source: random.Random, body: bytes) -> bytes:
    """A body after one to three random edits."""
    for _ in range(source.randint(1, 3)):
        body = source.choice(EDITS)(source, body)
    return body


def cut(source: random.Random, body: bytes) -> bytes:
    """Without a piece."""
    start = source.randrange(len(body) + 1)
    return body[:start] + body[start + source.randrange(1, 20) :]


def ended(source: random.Random, body: bytes) -> bytes:
    """Only its beginning."""
    return body[: source.randrange(len(body) + 1)]


def inserted(source: random.Random, body: bytes) -> bytes:
    """With a token somewhere."""
    at = source.randrange(len(body) + 1)
    return body[:at] + source.choice(TOKENS) + body[at:]


def flipped(source: random.Random, body: bytes) -> bytes:
    """With another byte somewhere."""
    at = source.randrange(len(body) + 1)
    return body[:at] + bytes([source.randrange(256)]) + body[at + 1 :]


def repeated(source: random.Random, body: bytes) -> bytes:
    """With a piece twice."""
    start = source.randrange(len(body) + 1)
    return body[: start + 30] + body[start:]


EDITS: tuple[Edit, ...] = (cut, ended, inserted, flipped, repeated)
