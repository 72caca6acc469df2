"""Matrix products of few tokens on CPUs: the call into `linear.cc`, which says how it works."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.cpu.build import LINEAR

WIDTH = 16  # inputs that the widest vectors take at once
# Beyond, XLA's own product is as fast: it packs the weights, which pays for itself by then. Measured on two cores.
MOST_TOKENS = 24


def linear(
    x: jax.Array,  # [tokens, inputs] float32
    weight: jax.Array,  # [outputs, inputs] float32
) -> jax.Array:
    """`x @ weight.T`, [tokens, outputs] float32. A token's result has the same bits in any company.

    Raises ValueError for what the kernel does not take.
    """
    if reason := unsupported_reason(x, weight):
        raise ValueError(reason)
    return jax.ffi.ffi_call(LINEAR, jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype))(x, weight)


def unsupported_reason(x: jax.Array, weight: jax.Array) -> str | None:
    """Why the kernel cannot compute this, with what it can; None if it can."""
    for name, array in (("x", x), ("weight", weight)):
        if array.dtype != jnp.float32:
            return f"dtype of {name} is {array.dtype.name}, supported is float32"
    if x.shape[1] != weight.shape[1]:
        return f"x has {x.shape[1]} inputs, weight {weight.shape[1]}"
    if not x.shape[1] or x.shape[1] % WIDTH:
        return f"x has {x.shape[1]} inputs, supported are multiples of {WIDTH}"
    return None
