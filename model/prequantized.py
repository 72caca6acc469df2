"""Matrices that a checkpoint has in 8 or 4 bits already, and that stay so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from model.formats.tensor import BLOCK, Grouped, Stored, Tensor, all_finite, not_finite
from model.layout import Leaf, Part
from model.quantized import IN_8_BITS, IN_LAYERS, MIDDLE, Quantized, pack_nibbles


def stored_as(path: tuple[Any, ...], leaf: Leaf, tensors: Mapping[str, Tensor]) -> Stored | None:
    """How the files have the matrices of a leaf of Params; None where they are not quantised, or not all the same."""
    if path[-1].name not in IN_LAYERS + IN_8_BITS or any(part.axes for part in leaf.parts):
        return None
    first, *others = (tensors[part.name].stored if part.name in tensors else None for part in leaf.parts)
    if (
        first is None
        or (path[-1].name in IN_8_BITS and first.bits != 8)
        or any(
            other is None or (other.bits, other.group, other.zeros) != (first.bits, first.group, first.zeros)
            for other in others
        )
    ):
        return None
    return first


def kept(field: str, leaf: Leaf, tensors: Mapping[str, Tensor], stored: Stored) -> Quantized:
    """The matrices of a field, with the numbers that the files have."""
    outputs = leaf.shape[:2] if field == "out" else leaf.shape[:-1]
    inputs = math.prod(leaf.shape[len(outputs) :])
    groups = -(-inputs // stored.group)
    values = (
        np.empty((*outputs, inputs), np.int8) if stored.bits == 8 else np.empty((*outputs, -(-inputs // 2)), np.uint8)
    )
    arrays = [values, *(np.empty((*outputs, groups), np.float32) for _ in range(1 + stored.zeros))]
    for part in leaf.parts:
        place(part, tensors[part.name], stored.bits, arrays)
    values, scales, *offsets = map(jax.device_put, arrays)
    return Quantized(values, scales, stored.bits, stored.group, inputs, offsets[0] if offsets else None)


def place(part: Part, tensor: Tensor, bits: int, arrays: list[np.ndarray]) -> None:
    """Write a tensor's values, scales and, if there are, offsets to their place in the arrays of a leaf."""
    assert tensor.stored is not None
    targets = [array[part.at] for array in arrays]
    count = len(targets[0])
    rows = tensor.rows // count  # of the tensor, for each index of the leaf's axis
    step = max(1, BLOCK // math.prod(tensor.shape[1:]) // rows)
    for first in range(0, count, step):
        stop = min(first + step, count)
        numbers = numbers_of(tensor.stored.rows(first * rows, stop * rows), bits)
        if not all(map(all_finite, numbers)):
            raise not_finite(tensor, first * rows)
        for target, each in zip(targets, numbers, strict=True):
            target[first:stop] = each.reshape(target[first:stop].shape)


def numbers_of(rows: Grouped, bits: int) -> list[np.ndarray]:
    """Rows as `Quantized` has them: values, scales, and offsets where groups have zeros or offsets."""
    scales = rows.scales.astype(np.float32)
    # Files have either kind of numbers: those that count from 0, which 4 bits do here, or signed ones, as 8 bits do.
    wanted = np.uint8 if bits == 4 else np.int8
    shift = 0 if rows.values.dtype == wanted else MIDDLE if bits == 4 else -128
    values = rows.values.astype(np.int16) + np.int16(shift)
    packed = pack_nibbles(values.astype(np.uint8)) if bits == 4 else values.astype(np.int8)
    if rows.offsets is not None:
        return [packed, scales, rows.offsets.astype(np.float32) - np.float32(shift) * scales]
    if rows.zeros is None:
        return [packed, scales]
    return [packed, scales, -(rows.zeros.astype(np.float32) + np.float32(shift)) * scales]
