"""How a pool of pages holds one key or value: its numbers in the pool's dtype, or in 8 bits with a scale of their own.

A quantised row is head_dim bytes and the four bytes of its float32 scale, so a page stays one run of bytes, and what
copies, stores or divides pages knows nothing of it. A row is written once, when its token is computed, and never scaled
again: what a later request reads has the same bits. A scale for a whole page would have to be known before the page is
full, and change what is read of its first tokens when later ones come.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

# Of each kind of quantised pages, by its name on the command line, the dtype of the pool's bytes.
QUANTIZED: dict[str, np.dtype] = {"int8": np.dtype(np.int8), "fp8": np.dtype(np.uint8)}
# The numbers that bytes stand for, of each dtype of bytes, and the largest of them.
NUMBERS: dict[np.dtype, tuple[np.dtype, float]] = {
    QUANTIZED["int8"]: (jnp.dtype(jnp.int8), 127.0),
    QUANTIZED["fp8"]: (jnp.dtype(jnp.float8_e4m3fn), 448.0),
}
SCALE_BYTES = 4


def pool_dtype(name: str) -> np.dtype:
    """The dtype of a pool's arrays: that of this name, or bytes for one of QUANTIZED."""
    return QUANTIZED.get(name) or jnp.dtype(name)


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether a pool of this dtype has quantised rows."""
    return jnp.dtype(dtype) in NUMBERS


def row_size(head_dim: int, dtype: DTypeLike) -> int:
    """Elements of a row in a pool of this dtype."""
    return head_dim + SCALE_BYTES if is_quantized(dtype) else head_dim


def encode(x: Float[jax.Array, "*rest head_dim"], dtype: DTypeLike) -> Shaped[jax.Array, "*rest row"]:
    """Keys or values as a pool of this dtype holds them.

    A quantised row's scale is its largest magnitude over 127, or over 448 for 8-bit floats (E4M3); its numbers are
    rounded to the nearest, ties to even.
    """
    if not is_quantized(dtype):
        return x.astype(dtype)
    kind, largest = NUMBERS[jnp.dtype(dtype)]
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / largest
    scaled = wide / jnp.where(scale == 0, 1, scale)
    numbers = (jnp.round(scaled) if jnp.issubdtype(kind, jnp.integer) else scaled).astype(kind)
    in_bytes = jax.lax.bitcast_convert_type(scale, dtype).reshape(*scale.shape[:-1], SCALE_BYTES)
    return jnp.concatenate([jax.lax.bitcast_convert_type(numbers, dtype), in_bytes], axis=-1)


def decode(rows: Shaped[jax.Array, "*rest row"], dtype: DTypeLike) -> Float[jax.Array, "*rest head_dim"]:
    """Keys or values for products: quantised rows in `dtype`, others as the pool holds them."""
    if not is_quantized(rows.dtype):
        return rows
    kind, _ = NUMBERS[rows.dtype]
    numbers = jax.lax.bitcast_convert_type(rows[..., :-SCALE_BYTES], kind).astype(jnp.float32)
    scale = jax.lax.bitcast_convert_type(rows[..., -SCALE_BYTES:], jnp.float32)[..., None]
    return (numbers * scale).astype(dtype)
