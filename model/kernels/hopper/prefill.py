"""Attention of prompt chunks over the paged pool: FlashAttention-3 (Shah et al., 2024) through page tables.

FlashAttention-3 is https://arxiv.org/abs/2407.08608. A thread block is one tile of query rows, one KV head and one
split of the keys. One warpgroup loads pages; two compute and take turns on the tensor cores, so that one's softmax
overlaps the other's products. The two products of a turn, a block's values and the next block's scores, are issued back
to back. A warpgroup's query rows are the query heads of the group times consecutive tokens, so a group of any size
fills them and shares what is loaded.

The number of splits depends on shapes alone: the number of sequences and KV heads, the longest chunk, and the width of
the block table. The same batch gets the same bits; a sequence in a batch of another shape may get different ones.
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
from jaxtyping import Float, Int32

from model.batch import NO_WINDOW, Batch, Sinks, Window
from model.kernels import limits
from model.kernels.hopper import compat, ring
from model.kernels.hopper.launch import COMPUTE, kernel, key_splits, layer_array, output_types
from model.kernels.hopper.online_softmax import (
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


@dataclass(frozen=True)
class Tuning:
    """Sizes that affect speed only."""

    block_q: int = 64  # query rows of each compute warpgroup
    block_kv: int = 128  # keys of a stage
    stages: int = 2

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that the kernel cannot run with."""
        if self.stages < 2 or self.block_q % 64 or self.block_kv % 64:
            raise ValueError(f"{self}: expected at least 2 stages, and blocks of a multiple of 64")


DEFAULT = {64: Tuning(stages=4), 128: Tuning(stages=2)}  # by head_dim
# (head_dim, group, page_size) to what `python -m experiments.gpu.tune` found best on a GPU, an H200.
TUNED: dict[tuple[int, int, int], Tuning] = {
    (128, 4, 64): Tuning(block_q=64, block_kv=128, stages=2),
    (128, 7, 64): Tuning(block_q=64, block_kv=128, stages=2),
}


def tuning_for(head_dim: int, group: int, page_size: int) -> Tuning:
    """The tuning of a shape: measured where there is one, else the default of its head size."""
    return TUNED.get((head_dim, group, page_size), DEFAULT[head_dim])


@dataclass(frozen=True)
class Launch:
    """What a launch knows at trace time."""

    tuning: Tuning
    group: int
    warpgroup_tokens: int  # tokens of each compute warpgroup
    tiles: int
    splits: int  # of the keys of a tile
    windowed: bool
    sinks: bool
    interpreted: bool


def attend(
    launch: Launch,
    tiles: Any,  # [tiles, 6] int32, as `plan` makes them
    table: Any,  # [seqs, pages] int32
    layer: Any,  # [1] int32
    q: Any,  # [tokens, kv_heads, group, head_dim]
    k: Any,  # [layers, pages, kv_heads, page_size, head_dim]
    v: Any,
    *rest: Any,  # where there are sinks, their rows; then the outputs, like q, or the State of every split
    pages: ring.Ring,
    q_tile: Any,  # [COMPUTE, block_q, head_dim] as wgmma reads it
    o_tile: Any,  # [COMPUTE, block_q, head_dim] without a swizzle, as ragged copies need it
    q_full: Any,
    turn: Any,
) -> None:
    """The kernel: one thread block."""
    tuning = launch.tuning
    # The longest tiles of a prompt first, so that short ones finish last.
    tile = launch.tiles - 1 - lax.axis_index("tile")
    kv_head, split, warpgroup = (lax.axis_index(name) for name in ("kv_head", "split", "warpgroup"))
    seq, keys = tiles[tile, 0], tiles[tile, 4]
    oldest = jnp.maximum(tiles[tile, 5], 0) if launch.windowed else 0
    start, stop = ring.blocks_of_split(oldest, keys, tuning.block_kv, split, launch.splits)
    outputs = rest[launch.sinks :]

    @pl.when(warpgroup == COMPUTE)
    def load_pages() -> None:
        plgpu.set_max_registers(40, action="decrease")
        ring.fill(pages, k, v, table, seq, layer[0], kv_head, start, stop, oldest, keys)

    @pl.when(warpgroup < COMPUTE)
    def compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        first, end, position = (tiles[tile, i] for i in (1, 2, 3))
        token = first + warpgroup * launch.warpgroup_tokens
        load_queries(launch, q.at[:, kv_head], token, q_tile.at[warpgroup], o_tile.at[warpgroup], q_full.at[warpgroup])

        head_dim = q_tile.shape[-1]

        def stage_of(i: jax.Array) -> jax.Array:
            return lax.rem(i - start, jnp.int32(tuning.stages))

        # The warpgroup's index is read again here and at the end: to hold it all along would spill registers.
        def pass_turn() -> None:
            plgpu.barrier_arrive(turn.at[1 - lax.axis_index("warpgroup")])

        def weigh_scores(masked: bool, i: jax.Array, state: State, scores: jax.Array) -> tuple[State, jax.Array]:
            """The softmax of block `i`, while the other warpgroup has the tensor cores; then wait for its values."""
            stage = stage_of(i)
            if masked:
                plgpu.barrier_wait(pages.v_full.at[stage])

                # The first warpgroup does this for both: the second's turn at these values comes later.
                @pl.when((warpgroup == 0) & ((i + 1) * tuning.block_kv > keys))
                def zero_values() -> None:
                    ring.zero_unseen(pages.v.at[stage], i * tuning.block_kv, keys)

                before = warpgroup * launch.warpgroup_tokens - i * tuning.block_kv
                window_start = tiles[tile, 5] + before if launch.windowed else None
                token = partial(lax.rem, y=jnp.int32(launch.warpgroup_tokens))
                scores = hide_unseen(scores, token, position + before, window_start)
            state, weights = weigh(scores, state, head_dim)
            if not masked:
                plgpu.barrier_wait(pages.v_full.at[stage])
            return state, weights

        def step(masked: bool, i: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            """Fold in block `i`, whose scores are in the carry, and compute the next scores: one turn."""
            state, weights = weigh_scores(masked, i, *carry)
            stage, next_stage = stage_of(i), stage_of(i + 1)
            plgpu.barrier_wait(pages.k_full.at[next_stage])
            plgpu.barrier_wait(turn.at[warpgroup])
            operands = weights, pages.v.at[stage], q_tile.at[warpgroup], pages.k.at[next_stage]
            total, scores = compat.values_then_scores(state.total, *operands, pass_turn, launch.interpreted)
            plgpu.barrier_arrive(pages.v_free.at[stage])
            plgpu.barrier_arrive(pages.k_free.at[next_stage])
            return state._replace(total=total), scores

        def all_blocks(state: State) -> State:
            last = stop - 1
            plgpu.barrier_wait(pages.k_full.at[0])
            scores = compat.queries_by_keys(q_tile.at[warpgroup], pages.k.at[0], launch.interpreted)
            plgpu.barrier_arrive(pages.k_free.at[0])
            pl.when(warpgroup == 1)(pass_turn)
            # Blocks that every query row sees whole need no mask.
            carry, inside = (state, scores), start
            if launch.windowed:
                # The first block that lies in the windows of all rows.
                inside = first_inside(tiles[tile, 5] + COMPUTE * launch.warpgroup_tokens - 1, tuning.block_kv)
                inside = jnp.clip(inside, start, last)
                carry = lax.fori_loop(start, inside, partial(step, True), carry)
            whole = jnp.clip(lax.div(position + 1, jnp.int32(tuning.block_kv)), inside, last)
            carry = lax.fori_loop(inside, whole, partial(step, False), carry)
            carry = lax.fori_loop(whole, last, partial(step, True), carry)
            state, weights = weigh_scores(True, last, *carry)
            plgpu.barrier_wait(turn.at[warpgroup])
            pl.when(warpgroup == 0)(pass_turn)
            stage = stage_of(last)
            total = compat.plus_probs_by_values(state.total, weights, pages.v.at[stage], launch.interpreted)
            plgpu.barrier_arrive(pages.v_free.at[stage])
            return state._replace(total=total)

        if launch.sinks:
            state = sinks_seen(rest[0].at[kv_head], split == 0, head_dim)
        else:
            state = nothing_seen(tuning.block_q, head_dim)
        state = summed(lax.cond(start < stop, all_blocks, lambda state: state, state))

        if launch.splits == 1:
            o_tile[warpgroup] = normalised(state)
            plgpu.commit_smem()
            own_tile = o_tile.at[lax.axis_index("warpgroup")]
            store_outputs(launch, own_tile, outputs[0].at[:, kv_head], token, end)
        else:
            for output, value in zip(outputs, state, strict=True):
                output[split, tile, kv_head, warpgroup] = value


def load_queries(launch: Launch, q: Any, token: jax.Array, tile: Any, staging: Any, full: Any) -> None:
    """Load a warpgroup's queries into `tile`: row g * warpgroup_tokens + i is head g of token `token` + i.

    Swizzled TMA boxes begin at multiples of eight rows, but a sequence begins anywhere: so the rows are staged
    unswizzled first.
    """
    count = launch.warpgroup_tokens
    for g in range(launch.group):
        plgpu.copy_gmem_to_smem(q.at[pl.ds(token, count), g], staging.at[pl.ds(g * count, count)], full)
    plgpu.barrier_wait(full)
    tile[...] = compat.load(staging, plgpu.Layout.WGMMA)
    plgpu.commit_smem()


def store_outputs(launch: Launch, tile: Any, out: Any, token: jax.Array, end: jax.Array) -> None:
    """Write a warpgroup's outputs up to token `end`, where the next sequence begins.

    A TMA box has a fixed size, so the tokens are written in boxes of powers of two.
    """
    count = jnp.clip(end - token, 0, launch.warpgroup_tokens)
    done = jnp.int32(0)
    for size in (1 << bit for bit in reversed(range(launch.warpgroup_tokens.bit_length()))):

        @pl.when((count & size) != 0)
        def store_box(size: int = size, done: jax.Array = done) -> None:
            for g in range(launch.group):
                box = pl.ds(g * launch.warpgroup_tokens + done, size)
                plgpu.copy_smem_to_gmem(tile.at[box], out.at[pl.ds(token + done, size), g])

        done = done + (count & size)
    plgpu.wait_smem_to_gmem(0)


# Jitted on its own, so that a model of many unrolled layers traces and lowers it once.
@partial(jax.jit, static_argnames=("tuning", "interpret"))
def paged_prefill(
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
    """What `model.attention.paged_attention` computes, for a ragged batch of chunks, each after its prefix.

    Padding tokens give zero. Pages outside the table and slots after a sequence's last key may hold anything, even NaN.
    If the batch has too few tiles to occupy the chip, the keys are split and XLA merges the splits.
    Raises ValueError for head sizes, groups, dtypes and page sizes that `limits.SUPPORTED` does not list.
    """
    limits.refuse_unsupported(q, pool)
    tokens, kv_heads, group, head_dim = q.shape
    tuning = tuning or tuning_for(head_dim, group, pool.page_size)
    seqs = batch.prefix.shape[0]
    warpgroup_tokens = min(tuning.block_q // group, tokens)
    tile_tokens = COMPUTE * warpgroup_tokens
    tiles = -(-tokens // tile_tokens) + seqs  # each sequence, and the padding, may end in a partial tile
    splits = key_splits(batch, pool, tuning.block_kv, -(-batch.max_chunk // tile_tokens) * seqs * kv_heads)
    windowed, has_sinks = window is not None, sinks is not None
    launch = Launch(tuning, group, warpgroup_tokens, tiles, splits, windowed, has_sinks, interpret is not None)

    query_rows = (splits, tiles, kv_heads, COMPUTE, tuning.block_q)
    tile = plgpu.SMEM((COMPUTE, tuning.block_q, head_dim), jnp.bfloat16, transforms=ring.TILED)
    attention = kernel(
        partial(attend, launch),
        name="paged_prefill",
        # Head by head, so that the keys and values in use at a time are one head's and stay in the cache.
        grid={"kv_head": kv_heads, "tile": tiles, "split": splits},
        out_type=output_types(q, splits, State((*query_rows, head_dim), query_rows, query_rows)),
        scratch_types={
            "pages": ring.ring_types(tuning.stages, tuning.block_kv, head_dim, pool.page_size, readers=COMPUTE),
            "q_tile": tile,
            "o_tile": plgpu.SMEM((COMPUTE, tuning.block_q, head_dim), jnp.bfloat16),
            "q_full": plgpu.Barrier(num_arrivals=group, num_barriers=COMPUTE),
            "turn": plgpu.Barrier(num_barriers=COMPUTE),
        },
        interpret=interpret,
    )
    rows = [] if sinks is None else [sink_rows(sinks, warpgroup_tokens, True, tuning.block_q)]
    tile_plan = plan(batch, tokens, tile_tokens, tiles, NO_WINDOW if window is None else window)
    outputs = attention(tile_plan, batch.block_table, layer_array(layer), q, pool.k, pool.v, *rows)
    if splits == 1:
        return outputs[0]
    merged = merge_splits(*outputs)[:, :, :, : group * warpgroup_tokens]
    merged = merged.reshape(tiles, kv_heads, COMPUTE, group, warpgroup_tokens, head_dim)
    by_tile = jnp.einsum("tkwgrd->twrkgd", merged).reshape(-1, kv_heads, group, head_dim)
    return by_tile[places_in_tiles(batch, tokens, tile_tokens)].astype(q.dtype)


def segments(
    batch: Batch, tokens: int, tile_tokens: int
) -> tuple[Int32[jax.Array, "seqs_plus_2"], Int32[jax.Array, "seqs_plus_2"]]:
    """Where each sequence, and the padding after them, begins, in tokens and in tiles; then the ends."""
    starts = jnp.append(batch.starts, tokens).astype(jnp.int32)
    tiles = (starts[1:] - starts[:-1] + tile_tokens - 1) // tile_tokens
    return starts, jnp.append(0, jnp.cumsum(tiles)).astype(jnp.int32)


def plan(
    batch: Batch, tokens: int, tile_tokens: int, count: int, window: jax.Array | int
) -> Int32[jax.Array, "tiles 6"]:
    """What each of `count` tiles works on.

    The columns are its sequence, its first token, the end of the sequence's tokens, the first token's position, the end
    of the keys that its last token sees, 0 for tiles of the padding and for surplus tiles, and the first key of its
    first token's window, negative where that begins before the sequence.
    """
    seqs = batch.prefix.shape[0]
    starts, first_tiles = segments(batch, tokens, tile_tokens)
    tile = jnp.arange(count, dtype=jnp.int32)
    seq = jnp.clip(jnp.searchsorted(first_tiles, tile, side="right").astype(jnp.int32) - 1, 0, seqs)
    first = jnp.minimum(starts[seq] + (tile - first_tiles[seq]) * tile_tokens, tokens)
    end = starts[seq + 1]
    real = (seq < seqs) & (first < end)
    seq = jnp.minimum(seq, seqs - 1)
    position = jnp.where(real, batch.prefix[seq] + first - starts[seq], 0)
    keys = jnp.where(real, position + jnp.minimum(tile_tokens, end - first), 0)
    return jnp.stack([seq, first, end, position, keys, position - window + 1], axis=1)


def places_in_tiles(batch: Batch, tokens: int, tile_tokens: int) -> Int32[jax.Array, "tokens"]:
    """The index of each token in the tokens of all tiles, back to back."""
    starts, first_tiles = segments(batch, tokens, tile_tokens)
    token = jnp.arange(tokens, dtype=jnp.int32)
    seq = jnp.searchsorted(starts, token, side="right").astype(jnp.int32) - 1
    seq = jnp.minimum(seq, batch.prefix.shape[0])
    return first_tiles[seq] * tile_tokens + token - starts[seq]
