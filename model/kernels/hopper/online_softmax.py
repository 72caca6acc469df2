"""The online softmax in registers, and the merging of the states of several splits of the keys.

The online softmax is Milakov and Gimelshein's (2018, https://arxiv.org/abs/1805.02867), as in FlashAttention's
algorithm 1 (Dao et al., 2022, https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float32

from model.batch import MASKED
from model.kernels.hopper import compat

PER_ROW = plgpu.Layout.WGMMA.reduce(1)
# Sums of weights that are kept for a row, of every eighth key each: each thread of the layout adds up its own keys.
PARTIAL_SUMS = 8


class State(NamedTuple):
    """The online softmax over the keys seen so far, by query row."""

    total: Any  # [query_rows, head_dim] float32: values weighted by exp2(score - peak)
    peak: Any  # [query_rows] float32: the largest score, times scale and log2(e)
    weight: Any  # [query_rows, PARTIAL_SUMS] float32: sums of the weights; [query_rows] once they are `summed`


def nothing_seen(query_rows: int, head_dim: int) -> State:
    """The state before the first key. Its peak is finite, so that masked scores, which are -inf, weigh nothing."""
    return State(
        plgpu.layout_cast(jnp.zeros((query_rows, head_dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((query_rows,), MASKED, jnp.float32), PER_ROW),
        plgpu.layout_cast(jnp.zeros((query_rows, PARTIAL_SUMS), jnp.float32), plgpu.Layout.WGMMA),
    )


def sinks_seen(
    sinks: Any,  # [query_rows] float32 in device memory, times log2(e)
    counted: jax.Array,  # whether this state is the one that counts them, of several that are merged
    head_dim: int,
) -> State:
    """The state that has seen the sinks: logits without values. One that does not count them weighs nothing."""
    state = nothing_seen(sinks.shape[0], head_dim)
    peak = compat.load(sinks, PER_ROW) + jnp.where(counted, jnp.float32(0), jnp.float32(MASKED))
    return state._replace(peak=peak, weight=state.weight + 1 / PARTIAL_SUMS)


def sink_rows(
    sinks: Float32[jax.Array, "kv_heads group"], tokens: int, by_head: bool, query_rows: int
) -> Float32[jax.Array, "kv_heads query_rows"]:
    """The sink of each query row, as `sinks_seen` takes them: rows of `tokens` tokens in order of head, or of token."""
    rows = jnp.repeat(sinks, tokens, axis=1) if by_head else jnp.tile(sinks, (1, tokens))
    padding = ((0, 0), (0, query_rows - rows.shape[1]))
    return jnp.pad(rows.astype(jnp.float32) * math.log2(math.e), padding, constant_values=MASKED)


def weigh(scores: jax.Array, state: State, head_dim: int) -> tuple[State, jax.Array]:
    """Fold a block of scores [query_rows, keys] into the state, all but its values; also return the weights, in bf16.

    Powers of two with the scale folded in, so that a weight costs one multiply-add and one exponential. The weights are
    added up within each thread only: an exchange between threads would delay every block.
    """
    scale = head_dim**-0.5 * math.log2(math.e)
    peak = jnp.maximum(state.peak, scores.max(axis=1) * scale)
    decay = jnp.exp2(state.peak - peak)
    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(peak, scores.shape, [0]))
    total, weight = (x * lax.broadcast_in_dim(decay, x.shape, [0]) for x in (state.total, state.weight))
    sums = [weights[:, i : i + PARTIAL_SUMS] for i in range(0, weights.shape[1], PARTIAL_SUMS)]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return State(total, peak, weight + sums[0]), weights.astype(jnp.bfloat16)


def hide_unseen(
    scores: jax.Array,
    token: Callable[[jax.Array], jax.Array],
    position: jax.Array,
    window_start: jax.Array | None,
) -> jax.Array:
    """Scores [query_rows, keys] with -inf for the keys after each row's position and before its window.

    `token` gives the tokens of rows; `position` and `window_start` are the last and the first key that token 0 sees,
    counted from the block's first. Without a window, `window_start` is None.
    """
    tokens = token(plgpu.broadcasted_iota(jnp.int32, scores.shape[:1], 0, layout=PER_ROW))
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
    seen = key <= lax.broadcast_in_dim(tokens + position, scores.shape, [0])
    if window_start is not None:
        seen &= key >= lax.broadcast_in_dim(tokens + window_start, scores.shape, [0])
    return jnp.where(seen, scores, -jnp.inf)


def first_inside(window_start: jax.Array, block: int) -> jax.Array:
    """The first block of keys from `window_start` on that is whole."""
    return lax.div(jnp.maximum(window_start, 0) + (block - 1), jnp.int32(block))


def summed(state: State) -> State:
    """The state with the sum of its weights, as `normalised` and `merge_splits` need it."""
    return state._replace(weight=state.weight.sum(axis=1))


def normalised(state: State) -> jax.Array:
    """The attention output [query_rows, head_dim] in bf16; zero for rows that saw no key."""
    weight = jnp.maximum(state.weight, jnp.finfo(jnp.float32).tiny)
    return (state.total / lax.broadcast_in_dim(weight, state.total.shape, [0])).astype(jnp.bfloat16)


def merge_splits(
    totals: Float32[jax.Array, "splits *rows head_dim"],
    peaks: Float32[jax.Array, "splits *rows"],
    weights: Float32[jax.Array, "splits *rows"],
) -> Float32[jax.Array, "*rows head_dim"]:
    """The output from the states of several splits of the keys.

    A split that saw no key has the peak MASKED and so no share. Query rows that saw no key in any split give zero.
    """
    share = jnp.exp2(peaks - peaks.max(axis=0))
    weight = jnp.maximum((share * weights).sum(axis=0), jnp.finfo(jnp.float32).tiny)
    return (share[..., None] * totals).sum(axis=0) / weight[..., None]
