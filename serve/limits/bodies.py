"""Limits on the JSON in a body, checked before it is decoded: decoding too much would hold the interpreter too long."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np

# Brackets and commas outside of strings. A request that fills a context of a million tokens has about this many;
# decoding them takes about 50 ms, in which no other Python thread runs.
MOST_PARTS = 2**18
# Escaped characters; each takes as long to decode as four plain ones. 4 MiB exceed a context of a million tokens.
MOST_ESCAPES = 2**22
SLICE = 2**20  # bytes that are examined at once
COMMA, BRACKET, BRACE, QUOTE, BACKSLASH = b',[{"\\'
OTHERS = bytes(byte for byte in range(256) if byte not in b',"[]{}')
STEPS = np.zeros(256, np.int8)  # by which a byte changes the depth
STEPS[list(b"[{")], STEPS[list(b"]}")] = 1, -1


def outside_strings(body: bytes | bytearray) -> Iterator[np.ndarray]:
    """The commas and brackets of a body that are not in its strings, [marks] uint8, slice by slice."""
    start, within = 0, False  # whether a slice begins within a string
    while start < len(body):
        piece = bytes(body[start : start + SLICE])
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # a slice takes the byte that its last one escapes
            piece = bytes(body[start : start + SLICE + 1])
        start += len(piece)
        plain = piece.replace(b"\\\\", b"").replace(b'\\"', b"")  # as escapes are read from the left
        marks = np.frombuffer(plain.translate(None, OTHERS), np.uint8)
        quotes = marks == QUOTE
        inside = np.logical_xor.accumulate(quotes) ^ within
        within = bool(inside[-1]) if len(inside) else within
        yield marks[~(inside | quotes)]


def parts(body: bytes | bytearray) -> int:
    """The number of opening brackets and commas in a body outside of its strings; 0 if clearly within the limit."""
    if len(body) <= MOST_PARTS or counted(body, lambda piece: opens(piece) | (piece == COMMA)) <= MOST_PARTS:
        return 0
    return sum(int(np.count_nonzero((marks == COMMA) | (STEPS[marks] > 0))) for marks in outside_strings(body))


def depth(body: bytes | bytearray, most: int) -> int:
    """The most brackets within each other in a body, outside of its strings; 0 if clearly no more than `most`."""
    if counted(body, opens) <= most:
        return 0
    deepest = level = 0
    for marks in outside_strings(body):
        levels = level + np.cumsum(STEPS[marks], dtype=np.int32)
        if len(levels):
            deepest, level = max(deepest, int(levels.max())), int(levels[-1])
    return deepest


def excess(body: bytes | bytearray) -> str | None:
    """The limit that a body exceeds, with the number that was found; None if the body may be decoded."""
    if (found := parts(body)) > MOST_PARTS:
        return f"expected at most {MOST_PARTS} brackets and commas, got {found}"
    if (found := escapes(body)) > MOST_ESCAPES:
        return f"expected at most {MOST_ESCAPES} escaped characters, got about {found}"
    return None


class Lists(msgspec.Struct, frozen=True, gc=False):
    """The longest lists of a request, of whose items none is decoded."""

    tools: tuple[msgspec.Raw, ...] = ()
    messages: tuple[msgspec.Raw, ...] = ()


def lists_in(body: bytes | bytearray, most: int) -> Lists:
    """The lists of a body; empty ones if there are clearly no more than `most` items, or if it cannot be read."""
    if counted(body, opens) > most:
        try:
            return _LISTS.decode(body)
        except (ValueError, RecursionError):  # what is wrong, its own decoder says
            pass
    return Lists()


_LISTS = msgspec.json.Decoder(Lists)


def escapes(body: bytes | bytearray) -> int:
    """The number of backslashes in a body; 0 if clearly within the limit."""
    return 0 if len(body) <= MOST_ESCAPES else counted(body, lambda piece: piece == BACKSLASH)


def counted(body: bytes | bytearray, wanted: Callable[[np.ndarray], np.ndarray]) -> int:
    """How many bytes of a body are `wanted`, a mask [bytes] bool of [bytes] uint8; other threads run meanwhile."""
    data = np.frombuffer(body, np.uint8)
    slices = (data[start : start + SLICE] for start in range(0, len(data), SLICE))
    return sum(int(np.count_nonzero(wanted(piece))) for piece in slices)


def opens(piece: np.ndarray) -> np.ndarray:
    """A mask [bytes] bool of the opening brackets in [bytes] uint8."""
    found: np.ndarray = (piece == BRACKET) | (piece == BRACE)
    return found
