"""Attention whose past is a matrix: the recurrence of gated delta nets and Mamba-2, in chunks and in steps.

Of each head, a token with decay a, key k, value v and query q turns the state S into a S + k w' and reads S' q. In
Mamba-2 (Dao and Gu, 2024, https://arxiv.org/abs/2405.21060) what it writes, w, is v. In the gated delta rule (Yang et
al., 2024, https://arxiv.org/abs/2412.06464) w is b (v - a S' k), which replaces what the state has under k by v, with
strength b. In a chunk, the writes of the delta rule solve a triangular system (Yang et al., 2024,
https://arxiv.org/abs/2406.06484, section 3.2), and all else is matrix products.

All in float32: what a state loses by rounding it never gets back.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped

from model.batch import Batch

CHUNK = 64  # tokens that are computed together; a longer chunk has larger products and a larger triangle
BLOCK = 16  # tokens of the blocks of a triangle that are inverted by themselves
PRECISION = jax.lax.Precision.HIGHEST  # a GPU would round factors to fewer bits


class Inputs(NamedTuple):
    """What the recurrence reads of each token; `strength` is none where all of a value is written."""

    queries: Float32[jax.Array, "*rows tokens key_heads key_dim"]
    keys: Float32[jax.Array, "*rows tokens key_heads key_dim"]
    values: Float32[jax.Array, "*rows tokens state_heads value_dim"]
    decay: Float32[jax.Array, "*rows tokens state_heads"]  # its logarithm
    strength: Float32[jax.Array, "*rows tokens state_heads"] | None


class Chunks(NamedTuple):
    """The tokens of a batch in chunks of one sequence each, which begin at its first new token."""

    seqs: Int32[jax.Array, "chunks"]  # the sequence of each; chunks after the last have any
    tokens: Int32[jax.Array, "chunks size"]  # their numbers in the batch
    real: Bool[jax.Array, "chunks size"]  # whether there are such tokens
    places: Int32[jax.Array, "tokens"]  # of each token, among those of all chunks


def recurrence(
    inputs: Inputs,
    batch: Batch,
    lengths: Int32[jax.Array, "seqs"],
    states: Float32[jax.Array, "seqs state_heads key_dim value_dim"],
) -> tuple[
    Float32[jax.Array, "tokens state_heads value_dim"], Float32[jax.Array, "seqs state_heads key_dim value_dim"]
]:
    """What each token reads, and the state after the first `lengths` tokens of each sequence.

    `states` are those before them. Other tokens read anything finite.
    """
    tokens, seqs = len(inputs.decay), len(states)
    chunks = in_chunks(batch, lengths, tokens, min(CHUNK, batch.max_chunk))
    by_chunk: Inputs = jax.tree.map(lambda x: where_real(x, chunks, seqs), inputs)
    found, after = chunked(by_chunk, chunks.seqs, states)
    flat = found.reshape(-1, *found.shape[2:])
    return flat[:tokens] if seqs == 1 else flat[chunks.places], after


def in_chunks(batch: Batch, lengths: Int32[jax.Array, "seqs"], tokens: int, size: int) -> Chunks:
    """The first `lengths` tokens of each sequence of a batch of `tokens` tokens, in chunks of `size`."""
    starts, seqs = jnp.asarray(batch.starts), len(lengths)
    most = (tokens + (size - 1) * seqs) // size
    counts = -(-(starts[1:] - starts[:-1]) // size)
    ends = jnp.cumsum(counts)
    numbers = jnp.arange(most, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, numbers, side="right", method="compare_all").astype(jnp.int32)
    used, owner = owner < seqs, jnp.minimum(owner, seqs - 1)
    inside = (numbers - (ends - counts)[owner])[:, None] * size + jnp.arange(size)  # [chunks, size], from its start
    real = used[:, None] & (inside < lengths[owner][:, None])
    token = jnp.arange(tokens, dtype=jnp.int32)
    of_token = jnp.clip(jnp.searchsorted(starts, token, side="right", method="compare_all") - 1, 0, seqs - 1)
    places = (ends - counts)[of_token] * size + token - starts[of_token]
    return Chunks(
        seqs=owner,
        tokens=jnp.clip(starts[owner][:, None] + inside, 0, tokens - 1).astype(jnp.int32),
        real=real,
        places=jnp.clip(places, 0, most * size - 1).astype(jnp.int32),
    )


def where_real(
    x: Shaped[jax.Array, "tokens *rest"], chunks: Chunks, seqs: int
) -> Shaped[jax.Array, "chunks size *rest"]:
    """Tokens by chunk, with zeros for those that are not real: they neither write nor let the state decay."""
    count, size = chunks.tokens.shape
    if seqs == 1:  # its chunks follow each other
        padded = jnp.pad(x, [(0, count * size - len(x))] + [(0, 0)] * (x.ndim - 1))
        taken = padded.reshape(count, size, *x.shape[1:])
    else:
        taken = x[chunks.tokens]
    return jnp.where(chunks.real.reshape(count, size, *(1 for _ in x.shape[1:])), taken, 0)


def chunked(
    inputs: Inputs,
    seqs: Int32[jax.Array, "chunks"],
    states: Float32[jax.Array, "seqs state_heads key_dim value_dim"],
) -> tuple[
    Float32[jax.Array, "chunks size state_heads value_dim"],
    Float32[jax.Array, "seqs state_heads key_dim value_dim"],
]:
    """What each token of chunks [chunks, size, ...] reads, and the states after the last chunk of each sequence.

    Letters: c chunks, h heads of values, k heads of keys, i and j tokens of a chunk, d key_dim, v value_dim.
    """
    heads, size = inputs.decay.shape[2], inputs.decay.shape[1]
    # [chunks, heads, tokens, ...], so that each head's matrices lie together.
    queries, keys, values, decay = (jnp.moveaxis(x, 2, 1) for x in inputs[:4])
    total = jnp.cumsum(decay, axis=-1)  # [c, h, i]: from before the chunk to after token i
    earlier = jnp.tril(jnp.ones((size, size), bool))
    between = jnp.exp(jnp.where(earlier, total[..., :, None] - total[..., None, :], -jnp.inf))  # [c, h, i, j]

    def products(x: jax.Array) -> jax.Array:
        found = jnp.einsum("ckid,ckjd->ckij", x, keys, precision=PRECISION)
        return by_head(found, heads) * between

    seen = products(queries)
    keys_of_heads = by_head(keys, heads)
    reading = by_head(queries, heads) * jnp.exp(total)[..., None]
    writing = keys_of_heads * jnp.exp(total[..., -1:] - total)[..., None]
    if inputs.strength is not None:
        strength = jnp.moveaxis(inputs.strength, 2, 1)[..., None]  # [c, h, i, 1]
        wanted = jnp.concatenate([values, keys_of_heads * jnp.exp(total)[..., None]], axis=-1) * strength
        solved = solve(products(keys) * strength, wanted)
        values, correcting = jnp.split(solved, [values.shape[-1]], axis=-1)
        reading = jnp.concatenate([reading, correcting], axis=2)  # [c, h, 2i, d]

    def one(states: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        seq, values, reading, writing, last = chunk
        state = states[seq]
        read = jnp.einsum("hid,hdv->hiv", reading, state, precision=PRECISION)
        written = values if inputs.strength is None else values - read[:, size:]
        state = state * jnp.exp(last)[:, None, None] + jnp.einsum("hid,hiv->hdv", writing, written, precision=PRECISION)
        return states.at[seq].set(state), (read[:, :size], written)

    states, (read, written) = jax.lax.scan(one, states, (seqs, values, reading, writing, total[..., -1]))
    found = read + jnp.einsum("chij,chjv->chiv", seen, written, precision=PRECISION)
    return jnp.moveaxis(found, 1, 2), states


def by_head(x: Float32[jax.Array, "rows key_heads *rest"], heads: int) -> Float32[jax.Array, "rows state_heads *rest"]:
    """What belongs to heads of keys, for each head of values that they serve."""
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


def solve(
    system: Float32[jax.Array, "chunks heads size size"], wanted: Float32[jax.Array, "chunks heads size columns"]
) -> Float32[jax.Array, "chunks heads size columns"]:
    """The solution of (1 + system) x = wanted, of which `system` counts below the diagonal only.

    By the inverse, from the blocks on the diagonal to ones of twice their size: that of [[A, 0], [C, B]] has
    -B^-1 C A^-1 below A^-1 and B^-1. Unlike sums of powers of the system, it does not grow where keys are alike. XLA's
    own solver takes ten times as long on a CPU.
    """
    chunks, heads, size, _ = system.shape
    whole = max(BLOCK, 1 << (size - 1).bit_length())
    padded = jnp.pad(system, [(0, 0)] * 2 + [(0, whole - size)] * 2)
    diagonal = jnp.arange(whole // BLOCK)
    small = padded.reshape(chunks, heads, -1, BLOCK, whole // BLOCK, BLOCK)[:, :, diagonal, :, diagonal]
    blocks = jnp.moveaxis(inverses(small), 0, 2)  # [chunks, heads, blocks, BLOCK, BLOCK]
    width = BLOCK
    while width < whole:
        pairs = whole // (2 * width)
        tiles, pair = padded.reshape(chunks, heads, pairs, 2, width, pairs, 2, width), jnp.arange(pairs)
        below = jnp.moveaxis(tiles[:, :, pair, 1, :, pair, 0], 0, 2)  # [chunks, heads, pairs, width, width]
        first, second = blocks[:, :, ::2], blocks[:, :, 1::2]
        corner = -jnp.matmul(jnp.matmul(second, below, precision=PRECISION), first, precision=PRECISION)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        blocks = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        width *= 2
    return jnp.matmul(blocks[:, :, 0, :size, :size], wanted, precision=PRECISION)


def inverses(system: Float32[jax.Array, "*rest size size"]) -> Float32[jax.Array, "*rest size size"]:
    """The inverses of 1 + what is below the diagonal of small matrices, by the same step on whole matrices."""
    size, width = system.shape[-1], 1
    row, column = np.indices((size, size))
    found = jnp.broadcast_to(jnp.eye(size, dtype=jnp.float32), system.shape)
    while width < size:
        below = (row // (2 * width) == column // (2 * width)) & (row // width > column // width)
        product = jnp.matmul(found, jnp.where(below, system, 0), precision=PRECISION)
        found = found - jnp.matmul(product, found, precision=PRECISION)
        width *= 2
    return found


def step(
    inputs: Inputs, states: Float32[jax.Array, "seqs state_heads key_dim value_dim"]
) -> tuple[Float32[jax.Array, "seqs state_heads value_dim"], Float32[jax.Array, "seqs state_heads key_dim value_dim"]]:
    """One token of each sequence: what it reads, and the states after it."""
    heads = states.shape[1]
    queries, keys = by_head(inputs.queries, heads), by_head(inputs.keys, heads)  # [seqs, heads, key_dim]
    decay = jnp.exp(inputs.decay)[..., None]  # [seqs, heads, 1]
    both = jnp.stack([queries, keys], axis=2)
    # One product reads the old state for query and key, so that it is read twice and written once.
    read = jnp.einsum("shnd,shdv->shnv", both, states, precision=PRECISION) * decay[..., None]
    written = inputs.values
    if inputs.strength is not None:
        written = (written - read[:, :, 1]) * inputs.strength[..., None]
    states = states * decay[..., None] + keys[..., :, None] * written[..., None, :]
    return read[:, :, 0] + jnp.sum(queries * keys, axis=-1, keepdims=True) * written, states
