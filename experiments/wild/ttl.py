"""What is reused where entries live for a time after their last use."""

from __future__ import annotations

import numpy as np

from experiments.wild.classify import by_time, ids_of
from experiments.workloads.agentx import Trace

LIFETIMES_S = (5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 21_600, 86_400)


def kept(trace: Trace) -> np.ndarray:
    """Tokens of one session that are reused by lifetime, [lifetimes + 1] int64; the last is without a limit.

    A block is used until the answer to a prompt with it is complete, and by every model apart.
    """
    size, limits = ids_of(trace), np.array([*LIFETIMES_S, np.inf])
    found = np.zeros(len(limits), np.int64)
    used: dict[str, np.ndarray] = {}  # [ids] float64 by model: seconds, when a block was last in use
    for asked in by_time(trace):
        ids = asked.hash_ids
        last = used.setdefault(asked.model, np.full(size, -np.inf))
        idle = asked.t_s - last[ids]  # [blocks]: never less than that of the block before
        found += np.searchsorted(idle[np.isfinite(idle)], limits, side="right")
        last[ids] = np.maximum(last[ids], asked.t_s + (asked.api_time_s or 0.0))
    return found * trace.block_size
