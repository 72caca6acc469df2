"""Rotary position embedding: its frequencies, how they are stretched for long contexts, and the rotation.

RoPE is Su et al., 2021, https://arxiv.org/abs/2104.09864.

The arithmetic follows transformers' `modeling_rope_utils.py`
(https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py) step by step in float32:
at position 262,144 one rounding of a frequency moves its angle by hundredths of a radian, so an equal formula is not
enough.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from model.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Float32[np.ndarray, "pairs"], float]:
    """Radians per token of each pair of dimensions that rotate, and the factor on cosine and sine.

    There are head_dim / 2 pairs where the whole head rotates. Raises ValueError for a kind that is not in
    `model.config.ROPE_KINDS`.
    """
    head_dim = int(head_dim * rope.partial)
    plain = _plain(rope.theta, head_dim)
    if rope.kind == "default":
        return plain, 1.0
    if rope.kind == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim), _yarn_attention_factor(rope)
    raise ValueError(f"rope.kind is {rope.kind!r}, supported are default, linear, llama3, yarn")


def angles(
    positions: Int32[jax.Array, "tokens"],
    inv_freq: Float[np.ndarray | jax.Array, "pairs"],
    scaling: float,
) -> tuple[Float32[jax.Array, "tokens pairs"], Float32[jax.Array, "tokens pairs"]]:
    """Cosine and sine of every pair at every position, times `scaling`."""
    radians = positions.astype(jnp.float32)[:, None] * jnp.asarray(inv_freq, jnp.float32)
    return jnp.cos(radians) * scaling, jnp.sin(radians) * scaling


def rotate(
    x: Float[jax.Array, "tokens *heads head_dim"],
    cos: Float32[jax.Array, "tokens pairs"],
    sin: Float32[jax.Array, "tokens pairs"],
) -> Float[jax.Array, "tokens *heads head_dim"]:
    """Rotate the pairs (i, i + pairs) of every head, in float32; the result has the dtype of `x`.

    Dimensions after the last pair stay as they are.
    """
    pairs = cos.shape[-1]
    per_token = (x.shape[0], *(1 for _ in x.shape[1:-1]), pairs)
    cos, sin = cos.reshape(per_token), sin.reshape(per_token)
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :pairs], wide[..., pairs : 2 * pairs], wide[..., 2 * pairs :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*rotated, rest] if rest.shape[-1] else rotated, axis=-1).astype(x.dtype)


def _periods(theta: float, head_dim: int) -> Float32[np.ndarray, "pairs"]:
    """Tokens per radian: theta^(2i / head_dim)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # A float64 power rounded once is the closest match to torch's float32 power.
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def _plain(theta: float, head_dim: int) -> Float32[np.ndarray, "pairs"]:
    """The unstretched frequencies."""
    return np.float32(1.0) / _periods(theta, head_dim)


def _llama3(rope: RopeConfig, plain: Float32[np.ndarray, "pairs"]) -> Float32[np.ndarray, "pairs"]:
    """Llama 3.1's frequencies: slow pairs slowed by `factor`, fast ones kept, others interpolated by wavelength."""
    low, high, factor = (np.float32(x) for x in (rope.low_freq_factor, rope.high_freq_factor, rope.factor))
    original = np.float32(rope.original_max_position)
    # Torch divides a number by a tensor as reciprocal, then product: two roundings, repeated here.
    wavelength = (np.float32(1) / plain) * np.float32(2 * math.pi)
    slowed = plain / factor
    smooth = ((np.float32(1) / wavelength) * original - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    is_slow, is_fast = wavelength > original / low, wavelength < original / high
    return np.where(is_slow, slowed, np.where(is_fast, plain, between)).astype(np.float32)


def _yarn(rope: RopeConfig, head_dim: int) -> Float32[np.ndarray, "pairs"]:
    """YaRN's frequencies (https://arxiv.org/abs/2309.00071, section 3.2): a ramp from kept pairs to slowed ones."""
    periods = _periods(rope.theta, head_dim)
    kept, slowed = np.float32(1.0) / periods, np.float32(1.0) / (np.float32(rope.factor) * periods)

    def pair_turning(rotations: float) -> float:
        """The (fractional) pair that makes so many rotations over the original context."""
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp's slope stays finite
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = 1 - np.clip(ramp, 0, 1)
    blended: np.ndarray = (slowed * (1 - keep) + kept * keep).astype(np.float32)
    return blended


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """YaRN's factor on cosine and sine: as given, or 0.1 mscale ln(factor) + 1 (a ratio where both mscales are set)."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
