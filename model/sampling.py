"""From logits to token ids, on the device: greedy, temperature, top-k, top-p, seeds and token masks."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Float32, Int32, Shaped, UInt32

from model.batch import Array
from model.kernels.dispatch import on_cpu


@struct.dataclass
class Sampling:
    """How each token is sampled. The draw depends on the token's own seed and position only."""

    temperature: Float32[Array, "samples"]  # 0 is greedy
    top_k: Int32[Array, "samples"]  # 0 keeps every token
    top_p: Float32[Array, "samples"]  # in (0, 1]; 1 keeps every token
    seeds: UInt32[Array, "samples"]
    positions: Int32[Array, "samples"]  # index of the sampled token in its sequence
    # Bit t of word w allows token 32w + t, so there are ceil(vocab / 32) words; None allows all tokens.
    mask: UInt32[Array, "samples words"] | None = None


def greedy(logits: Float[jax.Array, "samples vocab"], sampling: Sampling) -> Int32[jax.Array, "samples"]:
    """The most likely allowed token of each sample."""
    return jnp.argmax(masked(logits, sampling.mask), axis=-1).astype(jnp.int32)


def sample(logits: Float[jax.Array, "samples vocab"], sampling: Sampling) -> Int32[jax.Array, "samples"]:
    """One token id per sample: drawn, or the most likely where the temperature is 0.

    Temperature comes first, then top-k, then top-p (nucleus sampling, Holtzman et al., 2020,
    https://arxiv.org/abs/1904.09751) of the probabilities that top-k has left, renormalised. Ties at either threshold
    stay in.
    """
    allowed = masked(logits, sampling.mask)

    def draw(row: Sampling, allowed: jax.Array) -> jax.Array:
        scaled = allowed / jnp.maximum(row.temperature, 1e-6)
        least = jax.lax.cond(
            (row.top_k > 0) | (row.top_p < 1),
            lambda: threshold(scaled[None], row.top_k[None], row.top_p[None])[0, 0],
            lambda: jnp.asarray(-jnp.inf, scaled.dtype),
        )
        kept = jnp.where(scaled >= least, scaled, -jnp.inf)
        return jax.random.categorical(sample_key(jnp.asarray(row.seeds), jnp.asarray(row.positions)), kept).astype(
            jnp.int32
        )

    def one(row: tuple[Sampling, jax.Array, jax.Array]) -> jax.Array:
        sampling, allowed, likeliest = row
        drawn: jax.Array = jax.lax.cond(sampling.temperature > 0, draw, lambda *_: likeliest, sampling, allowed)
        return drawn

    rows = jax.tree.map(jnp.asarray, replace(sampling, mask=None)), allowed, greedy(logits, sampling)
    # One by one on a CPU, where a sample that asks for no draw or no sorting then costs none; on a GPU all at once.
    sampled: jax.Array = jax.lax.map(one, rows) if on_cpu() else jax.vmap(one)(rows)
    return sampled


def masked(
    logits: Float[jax.Array, "samples vocab"],
    mask: UInt32[Array, "samples words"] | None,
) -> Float[jax.Array, "samples vocab"]:
    """The logits, minus infinity where the mask has no bit; bits beyond the vocabulary are ignored."""
    if mask is None:
        return logits
    samples, vocab = logits.shape
    bits = (jnp.asarray(mask)[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jnp.where(bits.reshape(samples, -1)[:, :vocab] == 1, logits, -jnp.inf)


def threshold(
    scaled: Float[jax.Array, "samples vocab"],
    top_k: Int32[Array, "samples"],
    top_p: Float[Array, "samples"],
) -> Float[jax.Array, "samples 1"]:
    """The smallest logit that survives top-k and top-p; the most likely token always does."""
    vocab = scaled.shape[-1]
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    by_k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    kth = jnp.take_along_axis(ordered, by_k[:, None] - 1, axis=-1)
    probs = jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    by_p = jnp.sum(before < top_p[:, None], axis=-1)
    # A sum of many probabilities is rounded: top_p = 1 must keep every token all the same.
    by_p = jnp.where(top_p < 1, jnp.maximum(by_p, 1), vocab)
    return jnp.maximum(kth, jnp.take_along_axis(ordered, by_p[:, None] - 1, axis=-1))


def sample_key(seed: UInt32[jax.Array, ""], position: Int32[jax.Array, ""]) -> Shaped[jax.Array, ""]:
    """The random key of one sampled token."""
    return jax.random.fold_in(jax.random.key(seed), position)
