"""What the quantised formats share: grids of scales, packed numbers, and the settings that name them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from model.formats.tensor import FLOATS, Grouped, Stored, Tensor

Settings = Mapping[str, Any]  # the quantization_config of a config.json
Tensors = dict[str, Tensor]  # by name
Block = tuple[int, int]  # outputs and inputs that share a scale
Reader = Callable[[Tensors], Tensors]  # what the files hold to what the model has

# Scales of activations and of a KV cache, which are not quantised here, or by their own values.
UNUSED = tuple(
    f".{of}_{kind}"
    for of in ("input", "output", "activation", "q", "k", "v", "attn_q")
    for kind in ("scale", "scale_inv", "zero_point", "global_scale")
)


@dataclass(frozen=True)
class Grid:
    """A tensor with one number for each block of a weight: its scales, or its zeros."""

    tensor: Tensor
    shape: tuple[int, ...]  # [*experts, blocks of outputs, blocks of inputs]
    block: Block
    outputs: int

    def rows(self, first: int, stop: int) -> np.ndarray:
        """The numbers of the rows [first, stop) of the weight's first axis, [rows, *outputs, groups] float32."""
        found = self.tensor.values()
        # Bytes are exponents of 2, as in E8M0.
        found = (found.view(ml_dtypes.float8_e8m0fnu) if found.dtype == np.uint8 else found).astype(np.float32)
        found = np.broadcast_to(found if found.size == 1 else found.reshape(self.shape), self.shape)
        if len(self.shape) == 2:
            return found[np.arange(first, stop) // self.block[0]]
        return found[first:stop, np.arange(self.outputs) // self.block[0]]


def grid_over(tensor: Tensor, shape: tuple[int, ...], block: Block | None) -> Grid:
    """What a tensor has for the blocks of a weight [*experts, outputs, inputs]; without a block, by output or for all.

    Raises ValueError for any other shape.
    """
    *experts, outputs, inputs = shape
    by_output, by_matrix = (*experts, outputs, 1), (*experts, 1, 1)
    grids: dict[tuple[int, ...], tuple[tuple[int, ...], Block]] = {}  # by the shapes that it may have
    if block:
        by_block = (*experts, math.ceil(outputs / block[0]), math.ceil(inputs / block[1]))
        grids[by_block] = by_block, block
    else:
        grids |= dict.fromkeys((by_output[:-1], by_output), (by_output, (1, inputs)))
        grids |= dict.fromkeys(((), (1,), by_matrix), (by_matrix, (outputs, inputs)))
    expect_shape(tensor, *grids)
    found, size = grids[tensor.shape]
    return Grid(tensor, found, size, outputs)


def tensor_of(
    name: str,
    shape: tuple[int, ...],
    kind: str,
    sources: Sequence[Tensor],
    rows: Callable[[int, int], Grouped],
    stored: Stored | None = None,
) -> Tensor:
    """The tensor that is made from some of a file's, the rows [first, stop) of its first axis at a time."""
    size, path = sum(source.nbytes for source in sources), sources[0].path

    def read(first: int, stop: int) -> np.ndarray:
        return rows(first, stop).floats()

    return Tensor(name, path, shape, kind, FLOATS["F32"], size, read, stored)


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Numbers of 4 or 8 bits that lie in words of 32 from the lowest bits on: [rows, words] to [rows, count] uint8."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        octets = np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)
    return octets[:, :count]


def order_of(group_of: Tensor | None, inputs: int, size: int) -> np.ndarray | None:
    """The group of each input, [inputs]; None where groups of `size` take turns, as where all are -1, which is unset.

    Raises ValueError for another shape, and for groups that there are not.
    """
    if group_of is None:
        return None
    expect_shape(group_of, (inputs,))
    found, turns = group_of.values(), np.arange(inputs) // size
    if np.array_equal(found, turns) or np.all(found == -1):
        return None
    if found.min() < 0 or found.max() > turns[-1]:
        raise ValueError(
            f"{group_of.path}: {group_of.name} has groups {found.min()} to {found.max()}, expected 0 to {turns[-1]}: "
            "check that the quantization_config of config.json belongs to it"
        )
    return found


def choice(settings: Settings, field: str, supported: Sequence[Any], default: Any = None) -> Any:
    """A setting. Raises ValueError, with the values that are supported, if it is none of them."""
    value = settings.get(field, default)
    value = default if value is None else value
    if value not in supported:
        method = settings.get("quant_method", "unnamed")
        wanted = ", ".join("none" if each is None else str(each) for each in supported)
        raise ValueError(f"quantization_config ({method}) has {field} {value!r}, supported are {wanted}")
    return value


def size_of(settings: Settings, *fields: str) -> int | None:
    """The inputs of a group; None where all of an output are one, as -1 says. Raises ValueError for what is no size."""
    found = next((settings[field] for field in fields if field in settings), None)
    if found != -1 and not (isinstance(found, int) and found > 0):
        raise ValueError(
            f"quantization_config ({settings.get('quant_method')}) has {fields[0]} {found!r}, expected a number of "
            "inputs, or -1 for all"
        )
    return None if found == -1 else found


def needed(tensors: Tensors, name: str, of: Tensor) -> Tensor:
    """A tensor that belongs to another. Raises ValueError if the files lack it."""
    if name not in tensors:
        raise ValueError(
            f"{of.path}: {of.name} is {of.kind}, but {name} is missing: download the checkpoint again, or check that "
            "the quantization_config of config.json belongs to it"
        )
    return tensors[name]


def expect_shape(tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError if a tensor has none of these shapes."""
    if tensor.shape not in shapes:
        raise ValueError(
            f"{tensor.path}: {tensor.name} has shape {tensor.shape}, expected {' or '.join(map(str, shapes))}: check "
            "that the quantization_config of config.json belongs to it"
        )
