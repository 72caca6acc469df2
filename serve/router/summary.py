"""What a replica publishes of its cache: increments with sequence numbers, and a snapshot where one went missing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Increment:
    """Pages that a replica has gained and lost since its last increment."""

    sequence: int  # 1 more than the last one's, from 1 on
    added: np.ndarray  # [pages] uint64
    removed: np.ndarray  # [pages] uint64; a page that is both was lost after it was gained


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All pages of a replica after increment `sequence`."""

    sequence: int
    held: np.ndarray  # [pages] uint64
