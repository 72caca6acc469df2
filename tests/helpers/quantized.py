"""Params with quantised matrices, and the same ones dequantised."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np

from model.checkpoint import layout
from model.config import ModelConfig
from model.params import Params
from model.quantized import Quantized, bits_of, dequantize, inputs_last, quantize


def quantized_params(params: Params, bits: int, group: int, offsets: bool = True) -> Params:
    """Stacked params whose matrices are quantised as a loaded checkpoint's are, or the same values without offsets."""

    def quantized(path: tuple[jax.tree_util.KeyEntry, ...], array: jax.Array) -> jax.Array | Quantized:
        own = bits_of(path[-1].name, bits)  # type: ignore[attr-defined]
        if own is None:
            return array
        made = quantize(inputs_last(path[-1].name, np.asarray(array)), own, group)  # type: ignore[attr-defined]
        return made if offsets else replace(made, offsets=None)

    return jax.tree_util.tree_map_with_path(quantized, params)  # type: ignore[no-any-return]


def dequantized_params(params: Params, config: ModelConfig) -> Params:
    """The same params, with every matrix in float32 and in the axes of a plain one."""

    def whole(leaf: jax.Array | Quantized, expected: jax.ShapeDtypeStruct) -> jax.Array:
        return dequantize(leaf).reshape(expected.shape) if isinstance(leaf, Quantized) else leaf

    leaves = layout(config)
    return jax.tree.map(whole, params, leaves, is_leaf=lambda leaf: isinstance(leaf, Quantized))  # type: ignore[no-any-return]
