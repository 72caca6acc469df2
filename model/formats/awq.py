"""Weights of 4 bits in groups, as AutoAWQ writes them: https://github.com/casper-hansen/AutoAWQ.

`qweight` is [inputs, outputs / 8] int32, `qzeros` [groups, outputs / 8] int32 and `scales` [groups, outputs]. Of the
eight outputs in a word, the bits from the lowest on have those of ORDER.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from model.formats.grouped import (
    Reader,
    Settings,
    Tensors,
    choice,
    expect_shape,
    needed,
    size_of,
    tensor_of,
    unpack,
)
from model.formats.tensor import Grouped, Stored, Tensor

BITS, IN_A_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def reader(settings: Settings) -> Reader:
    """The reader of a checkpoint whose `quant_method` is awq. Raises ValueError for what is not supported."""
    choice(settings, "bits" if "bits" in settings else "w_bit", (BITS,))
    choice(settings, "version", ("gemm", "GEMM"), "gemm")
    choice(settings, "format", ("gemm",), "gemm")
    choice(settings, "zero_point", (True,), True)
    return partial(read, group=size_of(settings, "group_size", "q_group_size"))


def read(tensors: Tensors, group: int | None) -> Tensors:
    """The tensors of a model whose quantised modules have `qweight`, `qzeros` and `scales`; others stay."""
    modules = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    used = {f"{module}.{kind}" for module in modules for kind in ("qweight", "qzeros", "scales")}
    made = [unpacked(module, tensors, group) for module in modules]
    return {name: tensor for name, tensor in tensors.items() if name not in used} | {each.name: each for each in made}


def unpacked(module: str, tensors: Tensors, group: int | None) -> Tensor:
    """The weight of a module, [outputs, inputs]. Raises ValueError if what belongs to it is missing or misshapen."""
    qweight = tensors[f"{module}.qweight"]
    qzeros, scales = (needed(tensors, f"{module}.{kind}", qweight) for kind in ("qzeros", "scales"))
    inputs, outputs = qweight.shape[0], qweight.shape[1] * IN_A_WORD
    size = group or inputs
    groups = -(-inputs // size)
    expect_shape(scales, (groups, outputs))
    expect_shape(qzeros, (groups, outputs // IN_A_WORD))

    def rows(first: int, stop: int) -> Grouped:
        values, zeros = (in_order(each.values(), first, stop).T for each in (qweight, qzeros))
        return Grouped(values, scales.values()[:, first:stop].T, size, zeros)

    stored = Stored(BITS, size, True, rows)
    return tensor_of(f"{module}.weight", (outputs, inputs), "int4", (qweight, qzeros, scales), rows, stored)


def in_order(words: np.ndarray, first: int, stop: int) -> np.ndarray:
    """The numbers of the outputs [first, stop) of words, [rows, outputs / 8] to [rows, stop - first] uint8."""
    begin, end = first // IN_A_WORD, -(-stop // IN_A_WORD)
    numbers = unpack(words[:, begin:end], BITS, (end - begin) * IN_A_WORD).reshape(-1, IN_A_WORD)[:, np.argsort(ORDER)]
    return numbers.reshape(len(words), -1)[:, first - begin * IN_A_WORD : stop - begin * IN_A_WORD]
