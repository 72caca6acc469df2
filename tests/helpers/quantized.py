"""Params with quantised matrices, and the same ones dequantised."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from model.checkpoint import layout
from model.config import ModelConfig
from model.params import Params
from model.quantized import Quantized, bits_of, dequantize, inputs_last, quantize


def quantized_params(params: Params, bits: int, group: int) -> Params:
    """Stacked params whose matrices are quantised as a loaded checkpoint's are."""

    def quantized(path: tuple[jax.tree_util.KeyEntry, ...], array: jax.Array) -> jax.Array | Quantized:
        own = bits_of(path[-1].name, bits)  # type: ignore[attr-defined]
        if own is None:
            return array
        flat = inputs_last(path[-1].name, np.asarray(array))  # type: ignore[attr-defined]
        return jax.tree.map(jnp.asarray, quantize(flat, own, group))  # type: ignore[no-any-return]

    return jax.tree_util.tree_map_with_path(quantized, params)  # type: ignore[no-any-return]


def dequantized_params(params: Params, config: ModelConfig) -> Params:
    """The same params, with every matrix in float32 and in the axes of a plain one."""

    def whole(leaf: jax.Array | Quantized, expected: jax.ShapeDtypeStruct) -> jax.Array:
        return dequantize(leaf).reshape(expected.shape) if isinstance(leaf, Quantized) else leaf

    leaves = layout(config)
    return jax.tree.map(whole, params, leaves, is_leaf=lambda leaf: isinstance(leaf, Quantized))  # type: ignore[no-any-return]
