"""Root-mean-square norms, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float


def rms_norm(
    x: Float[jax.Array, "*rest size"], weight: Float[jax.Array, "size"], eps: float, centred: bool = False
) -> Float[jax.Array, "*rest size"]:
    """Root-mean-square norm over the last axis (Zhang and Sennrich, https://arxiv.org/abs/1910.07467).

    A `centred` weight counts from one, and is applied before the result is rounded to the dtype of `x`.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if centred:
        return (wide * scale * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return (wide * scale).astype(x.dtype) * weight
