"""What a replica publishes of its cache: increments with sequence numbers, and a snapshot where one went missing.

A page is 8 bytes. An increment holds at most `MOST_PAGES` of them, and what is left comes with the next. A router that
has only a part knows a shorter prefix, not a wrong one: what follows a page that it lacks does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_PAGES = 1 << 16  # of an increment: half a megabyte


@dataclass(frozen=True, eq=False)
class Increment:
    """Pages that a replica has gained and lost since its last increment; no page is both."""

    sequence: int  # 1 more than the last one's, from 1 on
    added: np.ndarray  # [pages] uint64
    removed: np.ndarray  # [pages] uint64


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All pages of a replica after increment `sequence`."""

    sequence: int
    held: np.ndarray  # [pages] uint64


@dataclass(frozen=True)
class Load:
    """All work of a replica, whoever sent it: for several routers that share replicas."""

    prefills: tuple[tuple[str, int, int], ...]  # (request, start, stop) in tokens, without a first token
    decodes: int  # requests that are being answered


def increments(sequence: int, added: np.ndarray, removed: np.ndarray) -> list[Increment]:
    """What was gained and lost ([pages] uint64, no page is both) as increments after number `sequence`."""
    keys, count = np.concatenate([removed, added]), len(removed)
    parts = [(at, keys[at : at + MOST_PAGES]) for at in range(0, len(keys), MOST_PAGES)]
    return [
        Increment(sequence + number, part[max(0, count - at) :], part[: max(0, count - at)])
        for number, (at, part) in enumerate(parts, 1)
    ]
