"""Weights in 8-bit floats with scales: of the whole matrix, of each output, or of each block of it.

`weight` is F8_E4M3, and `weight_scale_inv` (or `weight_scale`) what it is multiplied by, [ceil(outputs / 128),
ceil(inputs / 128)] where the blocks are 128x128: as DeepSeek-V3 has it
(https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md), and Qwen and GLM after it.
"""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np

from model.formats.grouped import (
    UNUSED,
    Block,
    Reader,
    Settings,
    Tensors,
    choice,
    grid_over,
    needed,
    tensor_of,
)
from model.formats.tensor import Grouped, Tensor

KINDS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
# Of each byte, its float32.
TABLES = {kind: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) for kind, dtype in KINDS.items()}
SCALES = ("_scale_inv", "_scale")  # what follows the name of a weight


def reader(settings: Settings) -> Reader:
    """The reader of a checkpoint whose `quant_method` is fp8. Raises ValueError for what is not supported."""
    choice(settings, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    choice(settings, "expert_dtype", ("fp8",), "fp8")
    block = settings.get("weight_block_size")
    if block is not None and not (len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise ValueError(f"quantization_config (fp8) has weight_block_size {block!r}, expected null or two sizes")
    return partial(read, block=tuple(block) if block else None)


def read(tensors: Tensors, block: Block | None) -> Tensors:
    """The tensors of a model whose 8-bit weights have scales; others stay."""
    scales = {name + end for name in tensors for end in SCALES}
    kept = {name: tensor for name, tensor in tensors.items() if name not in scales and not name.endswith(UNUSED)}
    return {name: scaled(tensor, tensors, block) if tensor.kind in KINDS else tensor for name, tensor in kept.items()}


def scaled(weight: Tensor, tensors: Tensors, block: Block | None) -> Tensor:
    """A weight [*experts, outputs, inputs] times its scales. Raises ValueError if they are missing or misshapen."""
    name = next((weight.name + end for end in SCALES if weight.name + end in tensors), weight.name + SCALES[0])
    scale = needed(tensors, name, weight)
    grid = grid_over(scale, weight.shape, block)

    def rows(first: int, stop: int) -> Grouped:
        values = TABLES[weight.kind][weight.values(first, stop).view(np.uint8)]
        return Grouped(values, grid.rows(first, stop), grid.block[1])

    return tensor_of(weight.name, weight.shape, weight.kind, (weight, scale), rows)
