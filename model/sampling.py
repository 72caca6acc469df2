"""From logits to token ids, on the device: greedy, temperature, top-k, top-p, seeds and token masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray


@struct.dataclass
class Sampling:
    """How each row of a batch is sampled. A row's token depends on its own seed and position only."""

    temperature: Array  # [rows] float32; 0 is greedy
    top_k: Array  # [rows] int32; 0 keeps every token
    top_p: Array  # [rows] float32 in (0, 1]; 1 keeps every token
    seeds: Array  # [rows] uint32
    positions: Array  # [rows] int32: index of the sampled token in its sequence
    mask: Array | None = None  # [rows, ceil(vocab / 32)] uint32: bit t of word w allows token 32w + t; None allows all


def greedy(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The most likely allowed token of each row of `logits` [rows, vocab] float32, [rows] int32."""
    return jnp.argmax(masked(logits, sampling.mask), axis=-1).astype(jnp.int32)


def sample(
    logits: jax.Array,  # [rows, vocab] float32
    sampling: Sampling,
) -> jax.Array:
    """One token id per row, [rows] int32: drawn, or the most likely where the temperature is 0.

    Temperature comes first, then top-k, then top-p (Holtzman et al., 2020) of the probabilities that top-k has left,
    which sum to one again. Ties at either threshold stay in.
    """
    scaled = masked(logits, sampling.mask) / jnp.maximum(sampling.temperature, 1e-6)[:, None]
    kept = jnp.where(scaled >= threshold(scaled, sampling.top_k, sampling.top_p), scaled, -jnp.inf)
    drawn = jax.vmap(lambda seed, position, row: jax.random.categorical(row_key(seed, position), row))(
        sampling.seeds, sampling.positions, kept
    )
    return jnp.where(sampling.temperature > 0, drawn.astype(jnp.int32), greedy(logits, sampling))


def masked(
    logits: jax.Array,  # [rows, vocab] float32
    mask: Array | None,  # [rows, ceil(vocab / 32)] uint32
) -> jax.Array:
    """The logits, minus infinity where the mask has no bit; its bits beyond the vocabulary mean nothing."""
    if mask is None:
        return logits
    rows, vocab = logits.shape
    bits = (jnp.asarray(mask)[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jnp.where(bits.reshape(rows, -1)[:, :vocab] == 1, logits, -jnp.inf)


def threshold(
    scaled: jax.Array,  # [rows, vocab] float32
    top_k: Array,  # [rows] int32
    top_p: Array,  # [rows] float32
) -> jax.Array:
    """The smallest logit that survives top-k and top-p, [rows, 1]; the most likely token always does."""
    vocab = scaled.shape[-1]
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    by_k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    kth = jnp.take_along_axis(ordered, by_k[:, None] - 1, axis=-1)
    probs = jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    by_p = jnp.sum(before < top_p[:, None], axis=-1)
    # A sum of many probabilities is rounded: one that keeps every token must not depend on it.
    by_p = jnp.where(top_p < 1, jnp.maximum(by_p, 1), vocab)
    return jnp.maximum(kth, jnp.take_along_axis(ordered, by_p[:, None] - 1, axis=-1))


def row_key(seed: jax.Array, position: jax.Array) -> jax.Array:
    """The random key of one sampled token."""
    return jax.random.fold_in(jax.random.key(seed), position)
