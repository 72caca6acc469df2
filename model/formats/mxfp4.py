"""Experts in 4-bit floats, E2M1, 32 of which share a power of two: gpt-oss' form of MXFP4.

The Open Compute Project's specification has the numbers
(https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from model.formats.grouped import Reader, Settings, Tensors, expect_shape, needed
from model.formats.tensor import FLOATS, Grouped, Tensor

GROUP = 32
BLOCKS, SCALES = "_blocks", "_scales"
# The two numbers of each byte, [256, 2] float32; the first is in the low half.
NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
PAIRS = np.stack([NUMBERS[np.arange(256) & 15], NUMBERS[np.arange(256) >> 4]], axis=-1)


def reader(settings: Settings) -> Reader:
    """The reader of a checkpoint whose `quant_method` is mxfp4."""
    return read


def read(tensors: Tensors) -> Tensors:
    """The tensors of a model whose experts are in `<name>_blocks` and `<name>_scales`; others stay."""
    packed = {name: tensor for name, tensor in tensors.items() if name.endswith(BLOCKS) and tensor.kind == "U8"}
    used = {name.removesuffix(BLOCKS) + end for name in packed for end in (BLOCKS, SCALES)}
    made = [unpacked(tensor, tensors) for tensor in packed.values()]
    return {name: tensor for name, tensor in tensors.items() if name not in used} | {each.name: each for each in made}


def unpacked(blocks: Tensor, tensors: Tensors) -> Tensor:
    """The weight [experts, inputs, outputs] of blocks [experts, outputs, groups, bytes].

    Inputs come before outputs, as transformers has the weight in full precision. Raises ValueError if the scales are
    missing or misshapen.
    """
    name = blocks.name.removesuffix(BLOCKS)
    scales = needed(tensors, name + SCALES, blocks)
    experts, outputs, groups = blocks.shape[:3]
    expect_shape(blocks, (experts, outputs, groups, GROUP // 2))
    expect_shape(scales, (experts, outputs, groups))

    def read(first: int, stop: int) -> np.ndarray:
        numbers = PAIRS[blocks.values(first, stop)].reshape(stop - first, outputs, groups * GROUP)
        powers = scales.values(first, stop).view(ml_dtypes.float8_e8m0fnu)
        return Grouped(numbers, powers, GROUP).floats().swapaxes(1, 2)

    size = blocks.nbytes + scales.nbytes
    return Tensor(name, blocks.path, (experts, groups * GROUP, outputs), "MXFP4", FLOATS["F32"], size, read)
