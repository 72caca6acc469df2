"""What is reused where a cache knows prefixes only at some positions: block sizes, and states of recurrent layers.

A recurrent layer's state after a prefix cannot be cut, so that a prompt goes on from the last place where one was kept,
though the keys and values of the attention layers reach further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.wild.classify import by_time, ids_of, leading
from experiments.workloads.agentx import Trace

BLOCK_SIZES = (16, 64, 528, 1600, 2048)  # tokens


@dataclass(frozen=True)
class Placement:
    """Where states are kept, all of it together; 0 and False: not there."""

    name: str
    end: bool = False  # of each prompt
    head: bool = False  # of tools and system text
    every: int = 0  # computed tokens
    grid: int = 0  # tokens, from a prompt's start
    divergence: bool = False  # where a prompt stopped matching


PLACEMENTS = (
    Placement("end of each prompt", end=True),
    Placement("end and every 8,192 computed tokens", end=True, every=8192),
    Placement("grid of 528 tokens", grid=528),
    Placement("grid of 2,048 tokens", grid=2048),
    Placement("end, and end of tools and system text", end=True, head=True),
    Placement("the same and where prompts diverged", end=True, head=True, divergence=True),
)


def exact_tokens(rows: np.ndarray) -> np.ndarray:
    """Tokens of each prompt that a token-exact cache has at most, [requests] int64.

    Of a prompt that begins with all full blocks of the one before it, also that one's rest, which has no id.
    """
    blocks = rows["reused"].astype(np.int64)
    whole = (rows["before"] >= 0) & (rows["shared"] == rows["before"]) & (blocks == rows["before"])
    rest = np.minimum(rows["before_tokens"], rows["tokens"] - 1)
    return np.where(whole, np.maximum(rest, 64 * blocks), 64 * blocks)


def by_block_size(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens of each prompt that are reused in blocks of each size, [requests] int64 by name."""
    exact = exact_tokens(rows)
    return {"token-exact": exact} | {f"{size:,}": exact // size * size for size in BLOCK_SIZES}


def from_states(trace: Trace, placements: Sequence[Placement] = PLACEMENTS) -> np.ndarray:
    """Tokens that are reused and states that are kept in one session, [placements, 2] int64.

    One model's states are of no use to another. Keys and values are there without a limit.
    """
    size, found = ids_of(trace), np.zeros((len(placements), 2), np.int64)
    seen: dict[str, np.ndarray] = {}  # [ids] bool by model
    kept: dict[str, np.ndarray] = {}  # [placements, ids] bool by model: a state after this block
    for asked in by_time(trace):
        ids = asked.hash_ids
        known = seen.setdefault(asked.model, np.zeros(size, bool))
        states = kept.setdefault(asked.model, np.zeros((len(placements), size), bool))
        shared, head = leading(known, ids), min(asked.agent.head_tokens // trace.block_size, len(ids))
        for place, at, result in zip(placements, states, found, strict=True):
            if place.grid:
                reused = shared * trace.block_size // place.grid * place.grid
                result += reused, len(ids) * trace.block_size // place.grid - reused // place.grid
                continue
            start = deepest(at, ids[:shared])
            ends = new_states(place, start, shared, head, len(ids), trace.block_size)  # [states] in blocks
            new = ids[ends - 1]
            result += start * trace.block_size, int((~at[new]).sum())
            at[new] = True
        known[ids] = True
    return found


def deepest(flags: np.ndarray, ids: np.ndarray) -> int:
    """The number of ids ([blocks] int32) up to the last whose flag ([ids] bool) is set; 0 if there is none."""
    if not len(ids) or flags[ids[-1]]:  # nearly always: the end of the prompt before
        return len(ids)
    places = np.flatnonzero(flags[ids])
    return int(places[-1]) + 1 if len(places) else 0


def new_states(place: Placement, start: int, shared: int, head: int, end: int, block: int) -> np.ndarray:
    """Where states are kept while the blocks `start` to `end` of a prompt are computed, [states] int64 in blocks.

    The first `shared` blocks match an earlier prompt.
    """
    step = place.every // block
    every = np.arange(start + step, end + 1, step) if step else np.zeros(0, np.int64)
    more = [end] * place.end + [head] * (place.head and head > start) + [shared] * (place.divergence and shared > start)
    return np.unique(np.concatenate([every, np.array(more, np.int64)])).astype(np.int64)
