"""Checkpoints of llm-compressor: integers or 8-bit floats with a scale for each matrix, output, group or block.

The format is https://github.com/vllm-project/compressed-tensors. Of the modules that its `config_groups` name, the file
has `weight` or `weight_packed`, and `weight_scale`, `weight_zero_point` and `weight_g_idx` where they apply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from model.formats import fp8
from model.formats.grouped import (
    UNUSED,
    Block,
    Reader,
    Settings,
    Tensors,
    choice,
    expect_shape,
    grid_over,
    needed,
    order_of,
    tensor_of,
    unpack,
)
from model.formats.tensor import Grouped, Stored, Tensor

PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "naive-quantized", "float-quantized", "mixed-precision", "dense")
STRATEGIES = ("tensor", "channel", "group", "block")
Zeros = Callable[[int, int], np.ndarray] | None  # of the rows [first, stop) of a weight
OF_A_WEIGHT = ("_packed", "_scale", "_zero_point", "_shape", "_g_idx")


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are quantised: an entry of `config_groups`."""

    targets: tuple[str, ...]
    bits: int
    block: Block | None  # None: a scale for each output, or for the whole matrix
    symmetric: bool


def reader(settings: Settings) -> Reader:
    """The reader of a checkpoint whose `quant_method` is compressed-tensors.

    Raises ValueError for what is not supported.
    """
    choice(settings, "format", FORMATS, "dense")
    choice(settings, "quantization_status", ("compressed", "frozen"), "compressed")
    sparsity = settings.get("sparsity_config") or {}
    choice({"quant_method": "compressed-tensors, sparsity_config"} | sparsity, "format", ("dense",), "dense")
    if settings.get("transform_config"):
        raise ValueError(
            "quantization_config (compressed-tensors) has a transform_config, which is not supported: use a checkpoint "
            "without it"
        )
    groups = settings.get("config_groups") or {}
    return partial(read, schemes=[scheme_of(name, group) for name, group in groups.items() if group.get("weights")])


def scheme_of(name: str, group: dict[str, Any]) -> Scheme:
    """An entry of `config_groups`. Raises ValueError for what is not supported, naming it."""
    weights = {"quant_method": f"compressed-tensors, {name}"} | group["weights"]
    choice({"quant_method": weights["quant_method"]} | group, "format", (*FORMATS, None))
    bits = choice(weights, "num_bits", (4, 8) if choice(weights, "type", ("int", "float"), "int") == "int" else (8,))
    strategy = choice(weights, "strategy", STRATEGIES, "group" if weights.get("group_size") else "tensor")
    size = weights.get("group_size")
    if strategy == "group" and not (isinstance(size, int) and size > 0):
        raise ValueError(f"quantization_config (compressed-tensors, {name}) has group_size {size!r}, expected a size")
    rows, columns = weights.get("block_structure") or (128, 128)
    block = {"group": (1, size), "block": (rows, columns)}.get(strategy)
    return Scheme(tuple(group.get("targets") or ()), bits, block, bool(weights.get("symmetric", True)))


def read(tensors: Tensors, schemes: list[Scheme]) -> Tensors:
    """The tensors of a model whose quantised weights are stored by these schemes; others stay."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed" or (kind == "weight" and tensor.kind in ("I8", *fp8.KINDS)):
            weight = dequantised(module, tensor, tensors, scheme_for(module, tensor, schemes))
            made[weight.name] = weight
    used = {name + end for name in made for end in OF_A_WEIGHT}
    kept = {name: tensor for name, tensor in tensors.items() if name not in used and not name.endswith(UNUSED)}
    return kept | made


def scheme_for(module: str, tensor: Tensor, schemes: list[Scheme]) -> Scheme:
    """The scheme of a module: that which names it, or a pattern of it, or else its class."""
    by_name = [s for s in schemes for target in s.targets if target == module or matches(target, module)]
    by_class = [s for s in schemes if ("Embedding" if module.endswith("embed_tokens") else "Linear") in s.targets]
    if not (found := [*by_name, *by_class]):
        raise ValueError(
            f"{tensor.path}: {tensor.name} is {tensor.kind}, but no target of config_groups in quantization_config is "
            f"{module}: download the checkpoint again"
        )
    return found[0]


def matches(target: str, module: str) -> bool:
    """Whether a target is a pattern that fits a module's name."""
    return target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None


def dequantised(module: str, weight: Tensor, tensors: Tensors, scheme: Scheme) -> Tensor:
    """The weight of a module. Raises ValueError if what belongs to it is missing or misshapen."""
    name = f"{module}.weight"
    if weight.kind in fp8.KINDS:
        return fp8.scaled(weight, tensors, scheme.block)
    packed = weight.name != name
    shape = shape_of(weight, needed(tensors, f"{name}_shape", weight), scheme.bits) if packed else weight.shape
    scale = needed(tensors, f"{name}_scale", weight)
    grid = grid_over(scale, shape, scheme.block)
    order = order_of(tensors.get(f"{name}_g_idx"), shape[-1], grid.block[1])
    sources = [weight, scale]
    zeros: Zeros = None
    if not scheme.symmetric:
        zero = needed(tensors, f"{name}_zero_point", weight)
        sources.append(zero)
        zeros = packed_zeros(zero, scheme.bits, grid.shape) if packed else grid_over(zero, shape, scheme.block).rows

    def rows(first: int, stop: int) -> Grouped:
        values = weight.values(first, stop)
        values = signed(unpack(values, scheme.bits, shape[-1]), scheme.bits) if packed else values
        found = Grouped(values, grid.rows(first, stop), grid.block[1], zeros and zeros(first, stop))
        return found if order is None else found.ordered(order)

    whole = order is None and len(shape) == 2 and grid.block[0] == 1
    stored = Stored(scheme.bits, grid.block[1], zeros is not None, rows) if whole else None
    return tensor_of(name, shape, f"int{scheme.bits}", sources, rows, stored)


def shape_of(weight: Tensor, shape: Tensor, bits: int) -> tuple[int, ...]:
    """The shape of a packed weight, which a tensor of two numbers has. Raises ValueError if they do not fit."""
    expect_shape(shape, (2,))
    outputs, inputs = map(int, shape.values())
    expect_shape(weight, (outputs, math.ceil(inputs * bits / 32)))
    return outputs, inputs


def packed_zeros(zero: Tensor, bits: int, shape: tuple[int, ...]) -> Zeros:
    """Of some outputs, the zeros of all groups; in the file they are packed by output. Raises ValueError."""
    outputs, groups = shape
    expect_shape(zero, (math.ceil(outputs * bits / 32), groups))
    return lambda first, stop: signed(unpack(zero.values().T, bits, outputs), bits).T[first:stop]


def signed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers as they are packed, from 0 on, as int8."""
    shifted: np.ndarray = (numbers - np.uint8(1 << (bits - 1))).view(np.int8)
    return shifted
