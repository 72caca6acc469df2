"""Limits on the JSON in a body, checked before it is decoded: decoding too much would hold the interpreter too long."""

from __future__ import annotations

import numpy as np

# Brackets and commas outside of strings. A request that fills a context of a million tokens has about this many;
# decoding them takes about 50 ms, in which no other Python thread runs.
MOST_PARTS = 2**18
# Escaped characters; each takes as long to decode as four plain ones. 4 MiB exceed a context of a million tokens.
MOST_ESCAPES = 2**22
SLICE = 2**20  # bytes that are examined at once
COMMA, BRACKET, BRACE, QUOTE, BACKSLASH = b',[{"\\'


def parts(body: bytes | bytearray) -> int:
    """The number of opening brackets and commas in a body outside of its strings; 0 if clearly within the limit."""
    if len(body) <= MOST_PARTS:
        return 0
    data = np.frombuffer(body, np.uint8)
    slices = [data[start : start + SLICE] for start in range(0, len(data), SLICE)]
    if sum(int(np.count_nonzero(structure(piece))) for piece in slices) <= MOST_PARTS:
        return 0
    count, within, run = 0, False, 0  # whether a slice ends within a string, and with how many backslashes
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
    """The limit that a body exceeds, with the number that was found; None if the body may be decoded."""
    if (found := parts(body)) > MOST_PARTS:
        return f"expected at most {MOST_PARTS} brackets and commas, got {found}"
    if (found := escapes(body)) > MOST_ESCAPES:
        return f"expected at most {MOST_ESCAPES} escaped characters, got about {found}"
    return None


def escapes(body: bytes | bytearray) -> int:
    """The number of backslashes in a body; 0 if clearly within the limit."""
    if len(body) <= MOST_ESCAPES:
        return 0
    data = np.frombuffer(body, np.uint8)
    slices = (data[start : start + SLICE] for start in range(0, len(data), SLICE))
    return sum(int(np.count_nonzero(piece == BACKSLASH)) for piece in slices)


def structure(piece: np.ndarray) -> np.ndarray:
    """A mask [bytes] bool of the commas and opening brackets in [bytes] uint8."""
    found: np.ndarray = (piece == COMMA) | (piece == BRACKET) | (piece == BRACE)
    return found
