"""Attention of prompt chunks over the paged pool: FlashAttention-3 (Shah et al., 2024) behind page tables.

A thread block is one tile of query rows, one KV head and one part of the keys. One warpgroup loads pages, two compute
and take turns on the tensor cores: one's softmax runs beside the other's products. The products of a turn are issued
back to back, a block's values and the next one's scores, with no wait in between. A warpgroup's rows are
the query heads of the group times consecutive tokens, so that any group fills them and shares what is loaded.

How many parts there are depends on the shapes alone: the number of sequences and of KV heads, the longest chunk, and
the width of the block table. The same batch gets the same bits; a sequence in a batch of another shape may get others.
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

from model.batch import Batch
from model.kernels import limits
from model.kernels.hopper import compat, ring
from model.kernels.hopper.online_softmax import (
    PER_ROW,
    State,
    merge,
    normalised,
    nothing_seen,
    parts_for,
    summed,
    weigh,
)
from model.kv import KVPool

COMPUTE = 2  # warpgroups that compute; the one after them loads


@dataclass(frozen=True)
class Tuning:
    """Sizes that only speed depends on."""

    block_q: int = 64  # query rows of each compute warpgroup
    block_kv: int = 128  # keys of a stage
    stages: int = 2

    def __post_init__(self) -> None:
        """Refuse what the kernel cannot run with."""
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
    rows: int  # tokens of each compute warpgroup
    tiles: int
    parts: int  # that the keys of a tile are split into
    interpreted: bool


def attend(
    launch: Launch,
    tiles: Any,  # [tiles, 5] int32, as `plan` makes them
    table: Any,  # [seqs, pages] int32
    layer: Any,  # [1] int32
    q: Any,  # [tokens, kv_heads, group, head_dim]
    k: Any,  # [layers, pages, kv_heads, page_size, head_dim]
    v: Any,
    *outputs: Any,  # like q; or the State of every part
    pages: ring.Ring,
    q_tile: Any,  # [COMPUTE, block_q, head_dim] as wgmma reads it
    o_tile: Any,  # [COMPUTE, block_q, head_dim] in plain rows, as ragged copies need them
    q_full: Any,
    turn: Any,
) -> None:
    """The kernel: one thread block."""
    tuning = launch.tuning
    # The longest tiles of a prompt first, so that the last to finish are short ones.
    tile = launch.tiles - 1 - lax.axis_index("tile")
    kv_head, part, warpgroup = (lax.axis_index(name) for name in ("kv_head", "part", "warpgroup"))
    seq, keys = tiles[tile, 0], tiles[tile, 4]
    start, stop = ring.share_of_keys(keys, tuning.block_kv, part, launch.parts)

    @pl.when(warpgroup == COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        ring.fill(pages, k, v, table, seq, layer[0], kv_head, start, stop, keys)

    @pl.when(warpgroup < COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        first, end, position = (tiles[tile, i] for i in (1, 2, 3))
        token = first + warpgroup * launch.rows
        load_queries(launch, q.at[:, kv_head], token, q_tile.at[warpgroup], o_tile.at[warpgroup], q_full.at[warpgroup])

        head_dim = q_tile.shape[-1]

        def slot_of(i: jax.Array) -> jax.Array:
            return lax.rem(i - start, jnp.int32(tuning.stages))

        # The index is asked for anew here and at the end: what is held all along takes registers that there are not.
        def pass_turn() -> None:
            plgpu.barrier_arrive(turn.at[1 - lax.axis_index("warpgroup")])

        def weigh_scores(masked: bool, i: jax.Array, state: State, scores: jax.Array) -> tuple[State, jax.Array]:
            """The softmax of block `i`, while the other warpgroup has the tensor cores, and the wait for its values."""
            slot = slot_of(i)
            if masked:
                plgpu.barrier_wait(pages.v_full.at[slot])

                # The first warpgroup's work for both: the second's turn at these values comes after its own.
                @pl.when((warpgroup == 0) & ((i + 1) * tuning.block_kv > keys))
                def _() -> None:
                    ring.zero_unseen(pages.v.at[slot], i * tuning.block_kv, keys)

                scores = mask(scores, launch.rows, position + warpgroup * launch.rows, i * tuning.block_kv)
            state, weights = weigh(scores, state, head_dim)
            if not masked:
                plgpu.barrier_wait(pages.v_full.at[slot])
            return state, weights

        def step(masked: bool, i: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            """Fold in block `i`, whose scores are there, and compute the next ones: the two products of a turn."""
            state, weights = weigh_scores(masked, i, *carry)
            slot, next_slot = slot_of(i), slot_of(i + 1)
            plgpu.barrier_wait(pages.k_full.at[next_slot])
            plgpu.barrier_wait(turn.at[warpgroup])
            operands = weights, pages.v.at[slot], q_tile.at[warpgroup], pages.k.at[next_slot]
            total, scores = compat.values_then_scores(state.total, *operands, pass_turn, launch.interpreted)
            plgpu.barrier_arrive(pages.v_free.at[slot])
            plgpu.barrier_arrive(pages.k_free.at[next_slot])
            return state._replace(total=total), scores

        def all_blocks(state: State) -> State:
            last = stop - 1
            plgpu.barrier_wait(pages.k_full.at[0])
            scores = compat.queries_by_keys(q_tile.at[warpgroup], pages.k.at[0], launch.interpreted)
            plgpu.barrier_arrive(pages.k_free.at[0])
            pl.when(warpgroup == 1)(pass_turn)
            # Blocks that every row sees whole need no mask.
            whole = jnp.clip(lax.div(position + 1, jnp.int32(tuning.block_kv)), start, last)
            carry = lax.fori_loop(start, whole, partial(step, False), (state, scores))
            carry = lax.fori_loop(whole, last, partial(step, True), carry)
            state, weights = weigh_scores(True, last, *carry)
            plgpu.barrier_wait(turn.at[warpgroup])
            pl.when(warpgroup == 0)(pass_turn)
            slot = slot_of(last)
            total = compat.plus_probs_by_values(state.total, weights, pages.v.at[slot], launch.interpreted)
            plgpu.barrier_arrive(pages.v_free.at[slot])
            return state._replace(total=total)

        state = nothing_seen(tuning.block_q, head_dim)
        state = summed(lax.cond(start < stop, all_blocks, lambda state: state, state))

        if launch.parts == 1:
            o_tile[warpgroup] = normalised(state)
            plgpu.commit_smem()
            rows = o_tile.at[lax.axis_index("warpgroup")]
            store_rows(launch, rows, outputs[0].at[:, kv_head], token, end)
        else:
            for output, value in zip(outputs, state, strict=True):
                output[part, tile, kv_head, warpgroup] = value


def load_queries(launch: Launch, q: Any, token: jax.Array, tile: Any, staging: Any, full: Any) -> None:
    """Bring a warpgroup's queries into `tile`: row g * rows + i is head g of token `token` + i.

    Swizzled TMA boxes begin at multiples of eight rows, a sequence anywhere: the rows come in plainly, then move.
    """
    for g in range(launch.group):
        plgpu.copy_gmem_to_smem(
            q.at[pl.ds(token, launch.rows), g], staging.at[pl.ds(g * launch.rows, launch.rows)], full
        )
    plgpu.barrier_wait(full)
    tile[...] = compat.load(staging, plgpu.Layout.WGMMA)
    plgpu.commit_smem()


def mask(scores: jax.Array, rows: int, position: jax.Array, first: jax.Array) -> jax.Array:
    """Hide the keys that a row does not see; `position` is the first token's, `first` the first key's."""
    row = plgpu.broadcasted_iota(jnp.int32, scores.shape[:1], 0, layout=PER_ROW)
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + first
    last = lax.rem(row, jnp.int32(rows)) + position
    return jnp.where(key <= lax.broadcast_in_dim(last, scores.shape, [0]), scores, -jnp.inf)


def store_rows(launch: Launch, tile: Any, out: Any, token: jax.Array, end: jax.Array) -> None:
    """Write a warpgroup's outputs, but no token from `end` on: the next sequence begins there.

    A TMA box has a fixed size: the count of tokens is put together from powers of two.
    """
    count = jnp.clip(end - token, 0, launch.rows)
    done = jnp.int32(0)
    for size in (1 << bit for bit in reversed(range(launch.rows.bit_length()))):

        @pl.when((count & size) != 0)
        def _(size: int = size, done: jax.Array = done) -> None:
            for g in range(launch.group):
                rows = pl.ds(g * launch.rows + done, size)
                plgpu.copy_smem_to_gmem(tile.at[rows], out.at[pl.ds(token + done, size), g])

        done = done + (count & size)
    plgpu.wait_smem_to_gmem(0)


# As a program of its own, so that a model of many layers in line has it traced and lowered once.
@partial(jax.jit, static_argnames=("tuning", "interpret"))
def paged_prefill(
    q: jax.Array,  # [tokens, kv_heads, group, head_dim] bf16
    pool: KVPool,
    layer: jax.Array | int,
    batch: Batch,
    *,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> jax.Array:
    """What `model.attention.paged_attention` computes: a ragged batch of chunks, each behind its prefix.

    Padding tokens give zero. Pages outside the table and slots behind a sequence's last key may hold anything, NaN too.
    Where the batch has too few tiles to occupy the chip, the keys are split and the parts merged by XLA.
    Raises ValueError for head sizes, groups, dtypes and page sizes that `limits.SUPPORTED` does not list.
    """
    limits.refuse_unsupported(q, pool)
    tokens, kv_heads, group, head_dim = q.shape
    tuning = tuning or tuning_for(head_dim, group, pool.page_size)
    seqs, table_pages = batch.block_table.shape
    rows = min(tuning.block_q // group, tokens)
    tiles = -(-tokens // (COMPUTE * rows)) + seqs  # each of the sequences, padding among them, may end in a broken tile
    blocks = -(-table_pages * pool.page_size // tuning.block_kv)
    parts = parts_for(-(-batch.max_chunk // (COMPUTE * rows)) * seqs * kv_heads, blocks)
    launch = Launch(tuning, group, rows, tiles, parts, interpret is not None)

    if parts == 1:
        out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    else:
        states = (parts, tiles, kv_heads, COMPUTE, tuning.block_q)
        out_type = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*states, head_dim), states, states)]
    tile = plgpu.SMEM((COMPUTE, tuning.block_q, head_dim), jnp.bfloat16, transforms=ring.TILED)
    kernel = plgpu.kernel(
        partial(attend, launch),
        out_type=out_type,
        # Head by head, so that the keys and values that are under way at a time are one head's and stay in the cache.
        grid=(kv_heads, tiles, parts),
        grid_names=("kv_head", "tile", "part"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types={
            "pages": ring.ring_types(tuning.stages, tuning.block_kv, head_dim, pool.page_size, readers=COMPUTE),
            "q_tile": tile,
            "o_tile": plgpu.SMEM((COMPUTE, tuning.block_q, head_dim), jnp.bfloat16),
            "q_full": plgpu.Barrier(num_arrivals=group, num_barriers=COMPUTE),
            "turn": plgpu.Barrier(num_barriers=COMPUTE),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="paged_prefill",
    )
    layers = jnp.asarray(layer, jnp.int32).reshape(1)
    outputs = kernel(plan(batch, tokens, COMPUTE * rows, tiles), batch.block_table, layers, q, pool.k, pool.v)
    if parts == 1:
        return outputs[0]
    merged = merge(*outputs)[:, :, :, : group * rows].reshape(tiles, kv_heads, COMPUTE, group, rows, head_dim)
    by_row = jnp.einsum("tkwgrd->twrkgd", merged).reshape(-1, kv_heads, group, head_dim)
    return by_row[tile_rows(batch, tokens, COMPUTE * rows)].astype(q.dtype)


def segments(batch: Batch, tokens: int, tile_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Starts [seqs + 2] of the sequences and of the padding behind them, and the first tile of each [seqs + 2]."""
    starts = jnp.append(batch.starts, tokens).astype(jnp.int32)
    tiles = (starts[1:] - starts[:-1] + tile_tokens - 1) // tile_tokens
    return starts, jnp.append(0, jnp.cumsum(tiles)).astype(jnp.int32)


def plan(batch: Batch, tokens: int, tile_tokens: int, count: int) -> jax.Array:
    """What each of `count` tiles works on, [tiles, 5] int32.

    The columns are its sequence, its first token, the end of the sequence's tokens, the first token's position, and how
    many keys its last token sees: none in the tiles of the padding and in those that are too many.
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
    return jnp.stack([seq, first, end, position, keys], axis=1)


def tile_rows(batch: Batch, tokens: int, tile_tokens: int) -> jax.Array:
    """The row of each token where all tiles' tokens lie in one line, [tokens] int32."""
    starts, first_tiles = segments(batch, tokens, tile_tokens)
    token = jnp.arange(tokens, dtype=jnp.int32)
    seq = jnp.searchsorted(starts, token, side="right").astype(jnp.int32) - 1
    seq = jnp.minimum(seq, batch.prefix.shape[0])
    return first_tiles[seq] * tile_tokens + token - starts[seq]
