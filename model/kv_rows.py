"""How a pool of pages holds one key or value: its numbers in the pool's dtype, or in 8 bits with scales of their own.

A quantised row is head_dim bytes, then a bfloat16 scale for each GROUP of them, so a page stays one run of bytes, and
what copies, stores or divides pages knows nothing of it. Some channels of keys are many times as large as others (Liu
et al., 2024, https://arxiv.org/abs/2402.02750): in groups, they do not take the digits of the rest. A row is written
once, when its token is computed, and never scaled again: what a later request reads has the same bits. Scales for a
whole page would have to be known before the page is full, and change what is read of its first tokens when later ones
come.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Shaped

# Of each kind of quantised pages, by its name on the command line, the dtype of the pool's bytes.
QUANTIZED: dict[str, np.dtype] = {"int8": np.dtype(np.int8), "fp8": np.dtype(np.uint8)}
# The numbers that bytes stand for, of each dtype of bytes, and the largest of them.
NUMBERS: dict[np.dtype, tuple[np.dtype, float]] = {
    QUANTIZED["int8"]: (jnp.dtype(jnp.int8), 127.0),
    QUANTIZED["fp8"]: (jnp.dtype(jnp.float8_e4m3fn), 448.0),
}
GROUP, SCALE_BYTES = 16, 2  # numbers that share a scale, the last ones of a row may be fewer; bytes of the scale
SMALLEST = float(jnp.finfo(jnp.bfloat16).tiny)  # scale: numbers that would need a smaller one are zeros


def pool_dtype(name: str) -> np.dtype:
    """The dtype of a pool's arrays: that of this name, or bytes for one of QUANTIZED."""
    return QUANTIZED.get(name) or jnp.dtype(name)


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether a pool of this dtype has quantised rows."""
    return jnp.dtype(dtype) in NUMBERS


def row_size(head_dim: int, dtype: DTypeLike) -> int:
    """Elements of a row in a pool of this dtype."""
    return head_dim + -(-head_dim // GROUP) * SCALE_BYTES if is_quantized(dtype) else head_dim


def head_dim_of(row: int, dtype: DTypeLike) -> int:
    """Numbers of a row with so many elements in a pool of this dtype."""
    return row - -(-row // (GROUP + SCALE_BYTES)) * SCALE_BYTES if is_quantized(dtype) else row


def encode(x: Float[jax.Array, "*rest head_dim"], dtype: DTypeLike) -> Shaped[jax.Array, "*rest row"]:
    """Keys or values as a pool of this dtype holds them.

    The scale of a group is its largest magnitude over 127, or over 448 for 8-bit floats (E4M3), in bfloat16; its
    numbers are rounded to the nearest, ties to even.
    """
    if not is_quantized(dtype):
        return x.astype(dtype)
    kind, largest = NUMBERS[jnp.dtype(dtype)]
    size = x.shape[-1]
    padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -size % GROUP)])
    grouped = padded.reshape(*x.shape[:-1], -1, GROUP)
    scales = (jnp.max(jnp.abs(grouped), axis=-1) / largest).astype(jnp.bfloat16)
    scales = jnp.where(scales < SMALLEST, jnp.bfloat16(0), scales)
    scaled = padded[..., :size] / _by_number(jnp.where(scales == 0, jnp.bfloat16(1), scales), size)
    numbers = (jnp.round(scaled) if jnp.issubdtype(kind, jnp.integer) else scaled).astype(kind)
    in_bytes = jax.lax.bitcast_convert_type(scales, dtype).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jax.lax.bitcast_convert_type(numbers, dtype), in_bytes], axis=-1)


def decode(rows: Shaped[jax.Array, "*rest row"], dtype: DTypeLike) -> Float[jax.Array, "*rest head_dim"]:
    """Keys or values for products: quantised rows in `dtype`, others as the pool holds them."""
    if not is_quantized(rows.dtype):
        return rows
    kind, _ = NUMBERS[rows.dtype]
    size = head_dim_of(rows.shape[-1], rows.dtype)
    numbers = jax.lax.bitcast_convert_type(rows[..., :size], kind).astype(jnp.float32)
    in_bytes = rows[..., size:].reshape(*rows.shape[:-1], -1, SCALE_BYTES)
    return (numbers * _by_number(jax.lax.bitcast_convert_type(in_bytes, jnp.bfloat16), size)).astype(dtype)


def _by_number(scales: Float[jax.Array, "*rest groups"], size: int) -> Float32[jax.Array, "*rest head_dim"]:
    """The scale of each of a row's numbers."""
    return jnp.repeat(scales.astype(jnp.float32), GROUP, axis=-1)[..., :size]
