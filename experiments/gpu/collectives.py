"""What a compiled program sends between devices."""

from __future__ import annotations

import re

NAMES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
COLLECTIVE = re.compile(rf"= (\S.*?) ({'|'.join(NAMES)})(?:-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def collectives(program: str) -> list[tuple[str, list[int]]]:
    """The collectives in the text of a compiled program, sorted: name, without `-start`, and shape of the result."""
    found = (match.groups() for line in program.splitlines() if (match := COLLECTIVE.search(line)))
    # What `-start` returns are its operand and its result.
    return sorted((name, [int(n) for n in SHAPE.findall(made)[-1].split(",") if n]) for made, name in found)
