"""What a reader of checkpoint files gives: tensors by name, each with its values when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

# What the values of a weight may be, by the names that safetensors has for them.
FLOATS = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
# The bits that are all set in infinity and NaN, and in nothing else; numpy has no fast loop for these dtypes.
EXPONENTS = {FLOATS["BF16"]: np.uint16(0x7F80), FLOATS["F16"]: np.uint16(0x7C00)}
BLOCK = 1 << 20  # elements that are read at a time, so that what lies between file and weights stays small


class Grouped(NamedTuple):
    """Rows of a matrix of small numbers: a weight is (value - zero) x scale + offset, all three those of its group.

    A group is `group` inputs of an output that follow each other; the last one may be shorter. A format has zeros, or
    offsets, or neither.
    """

    values: np.ndarray  # [*outputs, inputs] int8 or uint8, or float32
    scales: np.ndarray  # [*outputs, groups] of any float dtype
    group: int
    zeros: np.ndarray | None = None  # [*outputs, groups]
    offsets: np.ndarray | None = None  # [*outputs, groups]

    def floats(self) -> np.ndarray:
        """The weights, [*outputs, inputs] float32."""
        weights = self.values.astype(np.float32)
        if self.zeros is not None:
            weights -= spread(self.zeros.astype(np.float32), self.group, weights.shape[-1])
        weights *= spread(self.scales.astype(np.float32), self.group, weights.shape[-1])
        if self.offsets is not None:
            weights += spread(self.offsets.astype(np.float32), self.group, weights.shape[-1])
        return weights

    def ordered(self, group_of: np.ndarray) -> Grouped:
        """The same with groups of inputs that are anywhere: `group_of` is the group of each input, [inputs]."""
        zeros = None if self.zeros is None else self.zeros[..., group_of]
        return Grouped(self.values, self.scales[..., group_of], 1, zeros)


def spread(of_groups: np.ndarray, group: int, inputs: int) -> np.ndarray:
    """A number of each group, [*outputs, groups], once for each of its inputs, [*outputs, inputs]."""
    repeated: np.ndarray = np.repeat(of_groups, group, axis=-1)[..., :inputs]
    return repeated


@dataclass(frozen=True)
class Stored:
    """Whole numbers in groups of inputs that follow each other, as a file has them; `rows` is as `Tensor.read`."""

    bits: int  # 4 or 8
    group: int
    zeros: bool  # whether groups have zeros, or offsets
    rows: Callable[[int, int], Grouped]


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: its shape is that of its values, however the file packs them.

    `read(first, stop)` gives the values of the rows [first, stop) of the first axis, [stop - first, *shape[1:]]; what
    is quantised in the file is dequantised then, and no sooner.
    """

    name: str
    path: Path  # for errors
    shape: tuple[int, ...]
    kind: str  # what the file holds, in the format's own word: F32, F8_E4M3, Q4_K
    dtype: np.dtype | None  # of the values; None where nothing here can read them
    nbytes: int  # in the file, with scales and whatever else the values are made from
    read: Callable[[int, int], np.ndarray]
    stored: Stored | None = None  # where the weight can stay quantised

    def values(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """The values of the rows [first, stop) of the first axis, of all by default; a scalar has one row.

        Raises ValueError, with tensor and file, for floats that are not finite: no answer would follow from them.
        """
        values = self.read(first, self.rows if stop is None else stop)
        if not all_finite(values):
            raise not_finite(self, first)
        return values

    @property
    def rows(self) -> int:
        """The length of the first axis."""
        return self.shape[0] if self.shape else 1

    def blocks(self) -> Iterator[tuple[int, int]]:
        """All rows in runs [first, stop) of about BLOCK elements."""
        step = max(1, BLOCK // max(1, math.prod(self.shape[1:])))
        return ((first, min(first + step, self.rows)) for first in range(0, self.rows, step))


def rows_of(tensor: Tensor, name: str, rows: np.ndarray) -> Tensor:
    """Some rows of a tensor, [rows] whole numbers in the order in which they are wanted, as a tensor of its own."""

    def read(first: int, stop: int) -> np.ndarray:
        wanted = rows[first:stop]
        start, end = int(wanted.min()), int(wanted.max()) + 1
        taken: np.ndarray = tensor.read(start, end)[wanted - start]
        return taken

    return _part(tensor, name, (len(rows), *tensor.shape[1:]), read)


def matrix_of(tensor: Tensor, name: str, number: int, rows: slice) -> Tensor:
    """Some rows of one of a tensor's matrices, [matrices, rows, inputs], as a tensor of its own."""
    taken = range(tensor.shape[1])[rows]

    def read(first: int, stop: int) -> np.ndarray:
        matrix: np.ndarray = tensor.read(number, number + 1)[0]
        return matrix[taken[first:stop].start : taken[first:stop].stop]

    return _part(tensor, name, (len(taken), *tensor.shape[2:]), read)


def _part(tensor: Tensor, name: str, shape: tuple[int, ...], read: Callable[[int, int], np.ndarray]) -> Tensor:
    share = math.prod(shape) / max(1, math.prod(tensor.shape))
    return replace(tensor, name=name, shape=shape, nbytes=round(tensor.nbytes * share), read=read, stored=None)


def all_finite(values: np.ndarray) -> bool:
    """Whether an array of one of `FLOATS` has neither NaN nor infinity; of another dtype, nothing is asked."""
    if values.dtype == np.float32:
        return bool(np.isfinite(values).all())
    if (exponent := EXPONENTS.get(values.dtype)) is None or not values.size:
        return True
    return bool((np.ascontiguousarray(values).view(np.uint16) & exponent).max() < exponent)


def not_finite(tensor: Tensor, first: int) -> ValueError:
    """The error for a tensor with NaN or infinity in its file, in the rows from `first` on."""
    found = "found values that are not finite (NaN or infinity), expected finite numbers"
    return ValueError(f"{tensor.path}: {tensor.name}, rows from {first} on: {found}: download it again")


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have equal shapes and values."""
    return one.shape == other.shape and all(
        np.array_equal(one.values(first, stop), other.values(first, stop)) for first, stop in one.blocks()
    )
