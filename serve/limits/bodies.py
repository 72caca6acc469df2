"""How much JSON a body holds, counted before it is read: to read too much of it would hold the interpreter too long."""

from __future__ import annotations

import numpy as np

# Brackets and commas outside of strings. A request that fills a context of a million tokens has about as many; to read
# them takes the interpreter some 50 ms, in which no other thread runs.
MOST_PARTS = 2**18
# Escaped characters, one by one as slow to read as four plain ones: 4 MiB are more than a context of a million tokens.
MOST_ESCAPES = 2**22
SLICE = 2**20  # bytes that are looked at together
COMMA, BRACKET, BRACE, QUOTE, BACKSLASH = b',[{"\\'


def parts(body: bytes | bytearray) -> int:
    """How many brackets open and how many commas stand in a body outside of its strings; 0 if clearly few enough."""
    if len(body) <= MOST_PARTS:
        return 0
    data = np.frombuffer(body, np.uint8)
    slices = [data[start : start + SLICE] for start in range(0, len(data), SLICE)]
    if sum(int(np.count_nonzero(structure(piece))) for piece in slices) <= MOST_PARTS:
        return 0
    count, within, run = 0, False, 0  # whether a string goes on, and how many backslashes a slice ends with
    for piece in slices:
        places = np.arange(len(piece), dtype=np.int32)
        # Backslashes in a row up to each byte.
        rows = places - np.maximum.accumulate(np.where(piece == BACKSLASH, np.int32(-1 - run), places))
        escaped = np.concatenate([[run % 2 == 1], rows[:-1] % 2 == 1])
        quotes = (piece == QUOTE) & ~escaped
        inside = np.logical_xor.accumulate(quotes) ^ within
        count += int(np.count_nonzero(structure(piece) & ~inside))
        within, run = bool(inside[-1]), int(rows[-1])
    return count


def excess(body: bytes | bytearray) -> str | None:
    """What a body has too much of, with the number expected and found; None if it can be read."""
    if (found := parts(body)) > MOST_PARTS:
        return f"expected at most {MOST_PARTS} brackets and commas, got {found}"
    if (found := escapes(body)) > MOST_ESCAPES:
        return f"expected at most {MOST_ESCAPES} escaped characters, got about {found}"
    return None


def escapes(body: bytes | bytearray) -> int:
    """How many backslashes stand in a body; 0 if clearly few enough."""
    if len(body) <= MOST_ESCAPES:
        return 0
    data = np.frombuffer(body, np.uint8)
    slices = (data[start : start + SLICE] for start in range(0, len(data), SLICE))
    return sum(int(np.count_nonzero(piece == BACKSLASH)) for piece in slices)


def structure(piece: np.ndarray) -> np.ndarray:
    """Which bytes of [n] uint8 are commas or opening brackets, [n] bool."""
    found: np.ndarray = (piece == COMMA) | (piece == BRACKET) | (piece == BRACE)
    return found
