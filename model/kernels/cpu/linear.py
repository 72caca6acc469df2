"""Matrix products of few tokens on CPUs: the call into `linear.cc`, which says how it works."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from model.kernels.cpu.build import LINEAR

SIMD_WIDTH = 16  # floats in the widest vectors
# For more tokens XLA's own product is as fast: it packs the weights, which pays by then. Measured on two cores.
MAX_TOKENS = 24


def linear(
    x: Float[jax.Array, "tokens inputs"],
    weight: Float[jax.Array, "outputs _inputs"],
) -> Float32[jax.Array, "tokens outputs"]:
    """`x @ weight.T`, all in float32. A token's result has the same bits in any batch.

    Raises ValueError for what `unsupported_reason` names.
    """
    if reason := unsupported_reason(x, weight):
        raise ValueError(reason)
    return jax.ffi.ffi_call(LINEAR, jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype))(x, weight)


def unsupported_reason(x: jax.Array, weight: jax.Array) -> str | None:
    """Why the kernel cannot compute this, and what it supports; None if it can."""
    for name, array in (("x", x), ("weight", weight)):
        if array.dtype != jnp.float32:
            return f"dtype of {name} is {array.dtype.name}, supported is float32"
    if x.shape[1] != weight.shape[1]:
        return f"x has {x.shape[1]} inputs, weight {weight.shape[1]}"
    if not x.shape[1] or x.shape[1] % SIMD_WIDTH:
        return f"x has {x.shape[1]} inputs, supported are multiples of {SIMD_WIDTH}"
    return None
