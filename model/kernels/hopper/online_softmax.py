"""The running softmax of FlashAttention (Dao et al., 2022, algorithm 1) in registers, and the merging of its parts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from model.batch import MASKED

MOST_PARTS = 16  # of the keys, where fewer thread blocks than half a chip do not ask for more
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = 8  # of a row, each column apart from the next eight: what one thread of the layout holds of it adds up alone


class State(NamedTuple):
    """What has been seen so far by each query row."""

    total: Any  # [rows, head_dim] float32: values weighted by exp2(score - peak)
    peak: Any  # [rows] float32: the largest score, times scale and log2(e)
    weight: Any  # [rows, COLUMNS] float32: sums of the weights, of every eighth key; [rows] once they are `summed`


def nothing_seen(rows: int, head_dim: int) -> State:
    """The state before the first key. Its peak is finite, so that hidden scores, which are -inf, weigh nothing."""
    return State(
        plgpu.layout_cast(jnp.zeros((rows, head_dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((rows,), MASKED, jnp.float32), PER_ROW),
        plgpu.layout_cast(jnp.zeros((rows, COLUMNS), jnp.float32), plgpu.Layout.WGMMA),
    )


def weigh(scores: jax.Array, state: State, head_dim: int) -> tuple[State, jax.Array]:
    """Fold a block of scores [rows, keys] into the state, all but its values; returns the weights [rows, keys] in bf16.

    Powers of two with the scale folded in, so that a weight costs one multiply-add and one exponential. The weights are
    added up within each thread only: an exchange between threads would hold up every block.
    """
    scale = head_dim**-0.5 * math.log2(math.e)
    peak = jnp.maximum(state.peak, scores.max(axis=1) * scale)
    decay = jnp.exp2(state.peak - peak)
    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(peak, scores.shape, [0]))
    total, weight = (x * lax.broadcast_in_dim(decay, x.shape, [0]) for x in (state.total, state.weight))
    sums = [weights[:, i : i + COLUMNS] for i in range(0, weights.shape[1], COLUMNS)]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return State(total, peak, weight + sums[0]), weights.astype(jnp.bfloat16)


def summed(state: State) -> State:
    """The state with its weight [rows], as `normalised` and `merge` want it."""
    return state._replace(weight=state.weight.sum(axis=1))


def normalised(state: State) -> jax.Array:
    """The attention output [rows, head_dim] in bf16; zero for rows that saw no key."""
    weight = jnp.maximum(state.weight, jnp.finfo(jnp.float32).tiny)
    return (state.total / lax.broadcast_in_dim(weight, state.total.shape, [0])).astype(jnp.bfloat16)


def merge(totals: jax.Array, peaks: jax.Array, weights: jax.Array) -> jax.Array:
    """One output [..., head_dim] from the states of several parts of the keys [parts, ..., head_dim], in float32.

    A part that saw nothing has the peak MASKED and so no share. Rows that saw nothing in any part give zero.
    """
    share = jnp.exp2(peaks - peaks.max(axis=0))
    weight = jnp.maximum((share * weights).sum(axis=0), jnp.finfo(jnp.float32).tiny)
    return (share[..., None] * totals).sum(axis=0) / weight[..., None]


def parts_for(thread_blocks: int, key_blocks: int, waves: int = 1, multiprocessors: int = 132) -> int:
    """How many parts to split the keys into, none with less than four blocks of keys: the chip is to end in one go.

    `thread_blocks` is the size of the grid without parts, `key_blocks` how many blocks the longest sequence may have,
    `waves` how many thread blocks a multiprocessor is to be given. A grid that is large enough is not split. Of a
    smaller one, the last wave is to be full: 144 thread blocks on 132 multiprocessors would take as long as 264. Every
    part costs a little, its state written and merged: a hundredth of the whole.
    """
    room = waves * multiprocessors
    if thread_blocks >= 2 * room:
        return 1

    def time(parts: int) -> float:
        return -(-thread_blocks * parts // room) / parts * (1 + parts / 100)

    most = max(MOST_PARTS, room // thread_blocks)
    return min(range(1, max(1, min(most, key_blocks // 4)) + 1), key=time)
