"""Matrices that stay quantised in memory: whole numbers of 8 or 4 bits, with a scale for each group of inputs.

Rounding to nearest in groups: from the least weight to the largest, with an offset, as llama.cpp's Q4_1 rounds, or
symmetrically, as its Q8_0 and Q4_0 do (https://github.com/ggml-org/llama.cpp/pull/1508), whichever comes nearer to a
group's weights. So weights that Q4_1 has rounded stay as they are, in 8 bits, too, and those of Q8_0 and Q4_0 in as
many. Checkpoints that bring quantised weights may have no offsets.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Float32, Int8, Int32, UInt8, UInt32

from model.batch import Array

BITS = (8, 4)


class Scheme(NamedTuple):
    """How a model is quantised on load."""

    bits: int
    group: int


# Of `Params`, the matrices that are quantised. The head decides on tokens, and 4 bits cost it most; a tied embedding is
# the head, and of one that is not tied a step reads a few rows only: so these keep 8 bits.
IN_LAYERS = ("qkv", "out", "gate_up", "down", "shared_gate_up", "shared_down")
IN_8_BITS = ("embed", "lm_head")
SCHEMES = {"int8": Scheme(bits=8, group=32), "int4": Scheme(bits=4, group=32)}  # as `--quantize` names them
BLOCK = 1 << 18  # weights that are rounded at a time: a few copies of them fit the second level of cache
MIDDLE = 8  # the 4-bit value that stands for zero where there are no offsets


@struct.dataclass
class Quantized:
    """A matrix [*outputs, inputs] whose weights are value x scale + offset, scale and offset those of their group.

    A group is `group` inputs of one output that follow each other; the last one may be shorter. Values of 8 bits are
    signed. Values of 4 bits are 0 to 15, two to a byte, the even input in the low half; without offsets, they count
    from 8, so the weight is (value - 8) x scale.
    """

    values: Int8[jax.Array, "*outputs inputs"] | UInt8[jax.Array, "*outputs bytes"]
    scales: Float[jax.Array, "*outputs groups"]
    bits: int = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False)
    offsets: Float[jax.Array, "*outputs groups"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's axes, [*outputs, inputs]."""
        return (*self.scales.shape[:-1], self.inputs)


@struct.dataclass
class QuantizedPanels(Quantized):
    """A quantised matrix in the order in which the CPU kernels read it: panels of outputs, input by input.

    Values of 4 bits lie eight to a word: those of inputs that follow each other, the first in the lowest bits.
    """

    values: Int8[jax.Array, "*layers panels inputs panel"] | UInt32[jax.Array, "*layers panels words panel"]
    scales: Float32[jax.Array, "*layers panels groups panel"]
    offsets: Float32[jax.Array, "*layers panels groups panel"] | None = None


def bits_of(field: str, bits: int) -> int | None:
    """The bits of a field of `Params` or of its layers in a model that is quantised to so many; None: not quantised."""
    return bits if field in IN_LAYERS else 8 if field in IN_8_BITS else None


def inputs_last(field: str, array: np.ndarray) -> np.ndarray:
    """An array of a field of `Layer` or `Params` as a matrix whose inputs are one axis: those of `out` are three."""
    return array.reshape(*array.shape[:2], -1) if field == "out" else array


def quantize(weight: Float[Array, "*outputs inputs"], bits: int, group: int) -> Quantized:
    """The matrix rounded to nearest; its scales and offsets are float32. See `rounded`."""
    values, scales, offsets = map(jnp.asarray, rounded(np.asarray(weight), bits, group))
    return Quantized(values, scales, bits, group, weight.shape[-1], offsets)


def rounded(
    weight: Float[np.ndarray, "*outputs inputs"], bits: int, group: int
) -> tuple[
    Int8[np.ndarray, "*outputs inputs"] | UInt8[np.ndarray, "*outputs bytes"],
    Float32[np.ndarray, "*outputs groups"],
    Float32[np.ndarray, "*outputs groups"],
]:
    """The values, scales and offsets of a matrix, rounded to nearest on all cores of the host.

    A group's least and largest weights are kept, or its weight of largest magnitude and zero, where all of its weights
    together then move less (by the sum of squares). Raises ValueError for bits other than 8 and 4, and for a group of
    less than one input.
    """
    if bits not in BITS:
        raise ValueError(f"bits are {bits}, supported are 8 and 4")
    if group < 1:
        raise ValueError(f"group is {group}, expected at least one input")
    *outputs, inputs = weight.shape
    rows = weight.reshape(-1, inputs)
    scales, offsets = (np.empty((len(rows), -(-inputs // group)), np.float32) for _ in range(2))
    values = np.empty((len(rows), inputs if bits == 8 else -(-inputs // 2)), np.int8 if bits == 8 else np.uint8)
    step = max(1, BLOCK // inputs)

    def fill(first: int) -> None:
        block = slice(first, first + step)
        values[block], scales[block], offsets[block] = _rounded_rows(rows[block].astype(np.float32), bits, group)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(0, len(rows), step)))
    return values.reshape(*outputs, -1), scales.reshape(*outputs, -1), offsets.reshape(*outputs, -1)


def _rounded_rows(
    rows: Float32[np.ndarray, "rows inputs"], bits: int, group: int
) -> tuple[
    Int8[np.ndarray, "rows inputs"] | UInt8[np.ndarray, "rows bytes"],
    Float32[np.ndarray, "rows groups"],
    Float32[np.ndarray, "rows groups"],
]:
    """The values, scales and offsets of some rows."""
    count, inputs = rows.shape
    grouped = np.pad(rows, [(0, 0), (0, -inputs % group)], mode="edge").reshape(count, -1, group)
    with np.errstate(invalid="ignore"):  # what is no number makes all of its group none
        (moved, *around_zero), (moved_less, *between) = (_rounded_groups(grouped, bits, at) for at in (True, False))
        nearer = moved_less < moved
        values, scales, offsets = (np.where(nearer, a, b) for a, b in zip(between, around_zero, strict=True))
        values = values.reshape(count, -1)[:, :inputs].astype(np.int8 if bits == 8 else np.uint8)
    return values if bits == 8 else pack_nibbles(values), scales[..., 0], offsets[..., 0]


def _rounded_groups(
    grouped: Float32[np.ndarray, "rows groups group"], bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The squares by which groups move, [rows, groups, 1], and their values, scales and offsets, in float32.

    Values of 8 bits are -128 to 127, those of 4 are 0 to 15.
    """
    least, most = (-128, 127) if bits == 8 else (0, 15)
    if symmetric:
        zero = 0 if bits == 8 else MIDDLE
        extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=-1, keepdims=True), axis=-1)
        scales = np.abs(extreme) / np.float32(most) if bits == 8 else extreme / np.float32(-MIDDLE)
        offsets = -np.float32(zero) * scales
        whole = np.rint(grouped / np.where(scales == 0, np.float32(1), scales)) + np.float32(zero)
    else:
        lowest = grouped.min(axis=-1, keepdims=True)
        scales = (grouped.max(axis=-1, keepdims=True) - lowest) / np.float32(most - least)
        offsets = lowest - np.float32(least) * scales
        whole = np.rint((grouped - lowest) / np.where(scales == 0, np.float32(1), scales)) + np.float32(least)
    values = np.clip(whole, least, most)
    moved = np.square(values * scales + offsets - grouped).sum(axis=-1, keepdims=True)
    return moved, values, scales, offsets


def dequantize(weight: Quantized, dtype: Any = jnp.float32) -> Float[jax.Array, "*outputs inputs"]:
    """The matrix in this dtype, computed in the scales' own."""
    values = weight.values if weight.bits == 8 else unpack_nibbles(weight.values, weight.inputs)
    numbers = values.astype(weight.scales.dtype)
    if weight.offsets is None:
        middle = 0 if weight.bits == 8 else MIDDLE
        return ((numbers - middle) * by_input(weight, weight.scales)).astype(dtype)
    return (numbers * by_input(weight, weight.scales) + by_input(weight, weight.offsets)).astype(dtype)


def floats(
    weight: Float[jax.Array, "*outputs inputs"] | Quantized, dtype: Any = jnp.float32
) -> Float[jax.Array, "*outputs inputs"]:
    """The matrix itself, or one that is quantised as numbers of this dtype."""
    return dequantize(weight, dtype) if isinstance(weight, Quantized) else weight


def by_input(weight: Quantized, of_groups: Float[jax.Array, "*outputs groups"]) -> Float[jax.Array, "*outputs inputs"]:
    """A number of each group, once for each of its inputs."""
    return jnp.repeat(of_groups, weight.group, axis=-1)[..., : weight.inputs]


def rows_of(weight: Quantized, rows: Int32[Array, "rows"], dtype: Any) -> Float[jax.Array, "rows inputs"]:
    """Some rows of a matrix [outputs, inputs], in this dtype."""
    return dequantize(jax.tree.map(lambda array: array[rows], weight), dtype)


def pack_nibbles(values: UInt8[np.ndarray, "*outputs inputs"]) -> UInt8[np.ndarray, "*outputs bytes"]:
    """Values from 0 to 15, two to a byte, the even input in the low half; an odd last one is alone."""
    odd = values.shape[-1] % 2
    even = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, odd)])
    packed: np.ndarray = even[..., ::2] | (even[..., 1::2] << 4)
    return packed


def unpack_nibbles(packed: UInt8[Array, "*outputs bytes"], inputs: int) -> UInt8[jax.Array, "*outputs inputs"]:
    """The values that `pack_nibbles` packed."""
    packed = jnp.asarray(packed)
    halves = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return halves.reshape(*packed.shape[:-1], -1)[..., :inputs]
