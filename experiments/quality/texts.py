"""Texts that every machine has: the standard library's sources, and the prose of the language's reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import numpy as np

from experiments.workloads.demo_model import source_files, source_text

SOURCES, PROSE = "sources", "prose"
KINDS = (SOURCES, PROSE)
CHARS_PER_TOKEN = 6  # more than any text here has, so that a piece is long enough

Encode = Callable[[str], np.ndarray]  # text -> [tokens] int32


def documents(kind: str, encode: Encode, tokens: int, count: int) -> list[np.ndarray]:
    """`count` pieces of `tokens` tokens each, [tokens] int32, spread evenly over the texts of a kind.

    The same Python has the same texts. Raises ValueError for an unknown kind and for more tokens than there are.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    pieces = _source_pieces if kind == SOURCES else _prose_pieces
    found = [encode(text)[:tokens].astype(np.int32) for text in pieces(CHARS_PER_TOKEN * tokens, count)]
    if (short := min(map(len, found))) < tokens:
        raise ValueError(f"{kind}: a piece has {short} tokens, expected {tokens}: ask for fewer, or shorter ones")
    return found


def _prose_pieces(chars: int, count: int) -> list[str]:
    """Pieces of the language's reference, which comes with Python as the pages of `help()`."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    starts = np.linspace(0, max(0, len(text) - chars), count, dtype=int)
    return [text[start : start + chars] for start in starts]


def _source_pieces(chars: int, count: int) -> list[str]:
    """Pieces of the sources in the order of their paths, each from the start of a file."""
    files = source_files()
    ends = [*accumulate(path.stat().st_size for path in files)]
    starts = np.searchsorted(ends, np.linspace(0, max(0, ends[-1] - 2 * chars), count), side="right")

    def from_file(first: int) -> str:
        text, number = "", first
        while len(text) < chars and number < len(files):
            text, number = text + source_text(files[number]), number + 1
        return text[:chars]

    return [from_file(int(start)) for start in starts]
