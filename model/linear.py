"""Matrix products with weights that have outputs before inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from model.quantized import Quantized, floats


def linear(
    x: Float[jax.Array, "tokens inputs"],
    weight: Float[jax.Array, "*outputs inputs"] | Quantized,
    bias: Float[jax.Array, "*outputs"] | None,
) -> Float[jax.Array, "tokens *outputs"]:
    """`x @ weight.T + bias`; a quantised weight is dequantised as a part of the product.

    As one plain matrix product: given several output axes, XLA's CPU backend transposes the weight on every step.
    """
    flat = product(x, floats(weight, x.dtype).reshape(-1, weight.shape[-1]), x.dtype)
    return biased(flat.reshape(x.shape[0], *weight.shape[:-1]), bias)


def biased(
    x: Float[jax.Array, "tokens *outputs"], bias: Float[jax.Array, "*outputs"] | None
) -> Float[jax.Array, "tokens *outputs"]:
    """`x + bias`, where there is one."""
    return x if bias is None else x + bias


def product(
    x: Float[jax.Array, "tokens inputs"],
    weight: Float[jax.Array, "outputs inputs"],
    dtype: DTypeLike,
) -> Float[jax.Array, "tokens outputs"]:
    """`x @ weight.T` in this dtype."""
    return jnp.einsum("ti,oi->to", x, weight, preferred_element_type=dtype)
