"""Attention of one query token per sequence, or a few, over the paged pool: limited by the bytes of keys and values.

A thread block is one sequence, one KV head and one split of its keys, so that a single long sequence fills the chip
(Flash-Decoding, Dao et al., 2023, https://pytorch.org/blog/flash-decoding/). One warpgroup loads pages; two compute,
each every other block, with all query rows of the KV head in one wgmma tile, and merge their states before they write.

The number of splits depends on shapes alone: the number of sequences and KV heads, and the width of the block table.
The same batch gets the same bits; a sequence in a batch of another shape may get different ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from model.batch import NO_WINDOW, Batch, Sinks, Window, by_token
from model.kernels import limits
from model.kernels.hopper import compat, ring
from model.kernels.hopper.launch import COMPUTE, kernel, key_splits, layer_array, output_types
from model.kernels.hopper.online_softmax import (
    PER_ROW,
    State,
    first_inside,
    hide_unseen,
    merge_splits,
    normalised,
    nothing_seen,
    sink_rows,
    sinks_seen,
    summed,
    weigh,
)
from model.kv import KVPool

QUERY_ROWS = limits.QUERY_ROWS  # query heads of the group times tokens, and padding


@dataclass(frozen=True)
class Tuning:
    """Sizes that affect speed only."""

    block_kv: int = 64  # keys of a stage; at least a page
    stages: int = 4  # even, so that a stage always feeds the same warpgroup
    waves: int = 1  # thread blocks that each multiprocessor should get from splitting the keys

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that the kernel cannot run with."""
        if self.stages % COMPUTE or self.block_kv % 64:
            raise ValueError(f"{self}: expected an even number of stages, and blocks of a multiple of 64")


def default(head_dim: int, page_size: int) -> Tuning:
    """A tuning with about 128 KiB of keys and values in flight."""
    block = max(64, page_size)
    return Tuning(block, stages=128 * 1024 // (block * head_dim * 2 * 2))


# (head_dim, group, page_size) to what `python -m experiments.gpu.tune` found best on a GPU: nothing yet.
TUNED: dict[tuple[int, int, int], Tuning] = {}


def tuning_for(head_dim: int, group: int, page_size: int) -> Tuning:
    """The tuning of a shape: measured where there is one, else the default."""
    return TUNED.get((head_dim, group, page_size)) or default(head_dim, page_size)


@dataclass(frozen=True)
class Launch:
    """What a launch knows at trace time."""

    tuning: Tuning
    group: int
    chunk: int  # query tokens that a sequence has at most
    splits: int  # of the keys of a sequence
    windowed: bool
    sinks: bool
    interpreted: bool


def attend(
    launch: Launch,
    starts: Any,  # [seqs + 1] int32
    seen: Any,  # [seqs, 2] int32: the last and the first key that a sequence's first new token sees
    table: Any,  # [seqs, pages] int32
    layer: Any,  # [1] int32
    q: Any,  # [tokens, kv_heads, group, head_dim]
    k: Any,  # [layers, pages, kv_heads, page_size, head_dim]
    v: Any,
    *rest: Any,  # where there are sinks, their rows; then the outputs, like q, or the State of every split
    pages: ring.Ring,
    q_tile: Any,  # [QUERY_ROWS, head_dim] as wgmma reads it
    staging: Any,  # [QUERY_ROWS, head_dim] bf16 without a swizzle
    second: State,  # the second warpgroup's state in shared memory
    q_full: Any,
    q_ready: Any,
    second_ready: Any,
) -> None:
    """The kernel: one thread block."""
    tuning, head_dim = launch.tuning, q_tile.shape[-1]
    split, kv_head, seq, warpgroup = (lax.axis_index(name) for name in ("split", "kv_head", "seq", "warpgroup"))
    first, count, position = starts[seq], starts[seq + 1] - starts[seq], seen[seq, 0]
    keys = jnp.where(count > 0, position + count, 0)
    oldest = jnp.where(count > 0, jnp.maximum(seen[seq, 1], 0), 0) if launch.windowed else 0
    start, stop = ring.blocks_of_split(oldest, keys, tuning.block_kv, split, launch.splits)
    outputs = rest[launch.sinks :]

    @pl.when(warpgroup == COMPUTE)
    def load_pages() -> None:
        plgpu.set_max_registers(40, action="decrease")
        ring.fill(pages, k, v, table, seq, layer[0], kv_head, start, stop, oldest, keys)

    @pl.when(warpgroup < COMPUTE)
    def compute() -> None:
        plgpu.set_max_registers(232, action="increase")

        @pl.when(warpgroup == 0)
        def load_queries() -> None:
            for t in range(launch.chunk):
                of_token = pl.ds(t * launch.group, launch.group)
                plgpu.copy_gmem_to_smem(q.at[first + t, kv_head], staging.at[of_token], q_full)
            # A swizzled TMA box has a multiple of eight rows, a group any number: so they are staged unswizzled first.
            plgpu.barrier_wait(q_full)
            q_tile[...] = compat.load(staging, plgpu.Layout.WGMMA)
            plgpu.commit_smem()
            plgpu.barrier_arrive(q_ready)

        plgpu.barrier_wait(q_ready)

        def step(masked: bool, turn: jax.Array, state: State) -> State:
            i = start + turn * COMPUTE + warpgroup
            stage = lax.rem(i - start, jnp.int32(tuning.stages))
            plgpu.barrier_wait(pages.k_full.at[stage])
            scores = compat.queries_by_keys(q_tile, pages.k.at[stage], launch.interpreted)
            plgpu.barrier_arrive(pages.k_free.at[stage])
            if masked:
                window_start = seen[seq, 1] - i * tuning.block_kv if launch.windowed else None
                token = partial(lax.div, y=jnp.int32(launch.group))
                scores = hide_unseen(scores, token, position - i * tuning.block_kv, window_start)
            state, weights = weigh(scores, state, head_dim)
            plgpu.barrier_wait(pages.v_full.at[stage])
            if masked:

                @pl.when((i + 1) * tuning.block_kv > keys)
                def zero_values() -> None:
                    ring.zero_unseen(pages.v.at[stage], i * tuning.block_kv, keys)

            total = compat.plus_probs_by_values(state.total, weights, pages.v.at[stage], launch.interpreted)
            plgpu.barrier_arrive(pages.v_free.at[stage])
            return state._replace(total=total)

        def turns(end: jax.Array) -> jax.Array:
            """How many of the blocks before `end` are this warpgroup's."""
            return lax.div(jnp.maximum(end - start - warpgroup, 0) + (COMPUTE - 1), jnp.int32(COMPUTE))

        if launch.sinks:
            state = sinks_seen(rest[0].at[kv_head], (split == 0) & (warpgroup == 0), head_dim)
        else:
            state = nothing_seen(QUERY_ROWS, head_dim)
        # Blocks that every query row sees whole need no mask.
        inside = jnp.int32(0)
        if launch.windowed:
            first_whole = first_inside(seen[seq, 1] + launch.chunk - 1, tuning.block_kv)
            inside = turns(jnp.clip(first_whole, start, stop))
            state = lax.fori_loop(0, inside, partial(step, True), state)
        whole = turns(jnp.clip(lax.div(position + 1, jnp.int32(tuning.block_kv)), start, stop))
        whole = jnp.maximum(whole, inside)
        state = lax.fori_loop(inside, whole, partial(step, False), state)
        state = summed(lax.fori_loop(whole, turns(stop), partial(step, True), state))

        @pl.when(warpgroup == 1)
        def hand_over() -> None:
            for ref, value in zip(second, state, strict=True):
                ref[...] = value
            plgpu.commit_smem()
            plgpu.barrier_arrive(second_ready)

        @pl.when(warpgroup == 0)
        def merge_and_write() -> None:
            plgpu.barrier_wait(second_ready)
            write(launch, merged(state, second), second.total, staging, outputs, first, count, split, seq, kv_head)


def merged(state: State, other: State) -> State:
    """The state over the keys of both; `other` is in shared memory."""
    total = compat.load(other.total, plgpu.Layout.WGMMA)
    other_peak, other_weight = compat.load(other.peak, PER_ROW), compat.load(other.weight, PER_ROW)
    peak = jnp.maximum(state.peak, other_peak)
    mine, theirs = jnp.exp2(state.peak - peak), jnp.exp2(other_peak - peak)
    wide = partial(lax.broadcast_in_dim, shape=total.shape, broadcast_dimensions=[0])
    return State(state.total * wide(mine) + total * wide(theirs), peak, state.weight * mine + other_weight * theirs)


def write(
    launch: Launch,
    state: State,
    total: Any,  # [QUERY_ROWS, head_dim] float32, shared memory to stage the totals in
    staging: Any,
    outputs: tuple[Any, ...],
    first: jax.Array,
    count: jax.Array,
    split: jax.Array,
    seq: jax.Array,
    kv_head: jax.Array,
) -> None:
    """Write the output of the sequence's tokens, or the state of this split."""
    if launch.splits == 1:
        staging[...] = normalised(state)
        plgpu.commit_smem()
        for t in range(launch.chunk):

            @pl.when(t < count)
            def write_token(t: int = t) -> None:
                of_token = pl.ds(t * launch.group, launch.group)
                plgpu.copy_smem_to_gmem(staging.at[of_token], outputs[0].at[first + t, kv_head])
    else:
        totals, peaks, weights = outputs
        total[...] = state.total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(total.at[pl.ds(0, totals.shape[-2])], totals.at[split, seq, kv_head])
        peaks[split, seq, kv_head] = state.peak
        weights[split, seq, kv_head] = state.weight
    plgpu.wait_smem_to_gmem(0)


# Jitted on its own, so that a model of many unrolled layers traces and lowers it once.
@partial(jax.jit, static_argnames=("tuning", "interpret"))
def paged_decode(
    q: Float[jax.Array, "tokens kv_heads group head_dim"],
    pool: KVPool,
    layer: jax.Array | int,
    batch: Batch,
    window: Window = None,
    sinks: Sinks = None,
    *,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> Float[jax.Array, "tokens kv_heads group head_dim"]:
    """What `model.attention.paged_attention` computes, where no sequence has more than 64 // group new tokens.

    Padding tokens give zero. Pages outside the table and slots after a sequence's last key may hold anything, even NaN.
    Raises ValueError for longer chunks and for what `limits.SUPPORTED` does not list.
    """
    limits.refuse_unsupported(q, pool)
    tokens, kv_heads, group, head_dim = q.shape
    if batch.max_chunk * group > QUERY_ROWS:
        raise ValueError(
            f"chunks are up to {batch.max_chunk} tokens, paged_decode takes {QUERY_ROWS // group} in groups of {group}"
        )
    tuning = tuning or tuning_for(head_dim, group, pool.page_size)
    seqs = batch.prefix.shape[0]
    query_rows = batch.max_chunk * group
    splits = key_splits(batch, pool, tuning.block_kv, seqs * kv_heads, tuning.waves)
    windowed, has_sinks = window is not None, sinks is not None
    launch = Launch(tuning, group, batch.max_chunk, splits, windowed, has_sinks, interpret is not None)

    heads = (splits, seqs, kv_heads)
    states = State((*heads, query_rows, head_dim), (*heads, QUERY_ROWS), (*heads, QUERY_ROWS))
    per_row = plgpu.SMEM((QUERY_ROWS,), jnp.float32)
    attention = kernel(
        partial(attend, launch),
        name="paged_decode",
        grid={"split": splits, "kv_head": kv_heads, "seq": seqs},
        out_type=output_types(q, splits, states),
        scratch_types={
            "pages": ring.ring_types(tuning.stages, tuning.block_kv, head_dim, pool.page_size, readers=1),
            "q_tile": plgpu.SMEM((QUERY_ROWS, head_dim), jnp.bfloat16, transforms=ring.TILED),
            "staging": plgpu.SMEM((QUERY_ROWS, head_dim), jnp.bfloat16),
            "second": State(plgpu.SMEM((QUERY_ROWS, head_dim), jnp.float32), per_row, per_row),
            "q_full": plgpu.Barrier(num_arrivals=batch.max_chunk),
            "q_ready": plgpu.Barrier(),
            "second_ready": plgpu.Barrier(),
        },
        interpret=interpret,
    )
    rows = [] if sinks is None else [sink_rows(sinks, batch.max_chunk, False, QUERY_ROWS)]
    starts, prefix = jnp.asarray(batch.starts, jnp.int32), jnp.asarray(batch.prefix, jnp.int32)
    seen = jnp.stack([prefix, prefix - (NO_WINDOW if window is None else window) + 1], axis=1)
    outputs = attention(starts, seen, batch.block_table, layer_array(layer), q, pool.k, pool.v, *rows)
    if splits == 1:
        out = outputs[0]
    else:
        totals, peaks, weights = outputs
        out = merge_splits(totals, peaks[..., :query_rows], weights[..., :query_rows]).astype(q.dtype)
        out = jnp.einsum("skcgd->sckgd", out.reshape(seqs, kv_heads, batch.max_chunk, group, head_dim))
        out = by_token(out, batch, tokens)
    return jnp.where(jnp.arange(tokens)[:, None, None, None] < starts[-1], out, 0)
