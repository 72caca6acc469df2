"""Weights of 4 or 8 bits in groups, as AutoGPTQ and GPTQModel write them: https://github.com/ModelCloud/GPTQModel.

`qweight` is [inputs * bits / 32, outputs] int32, `qzeros` [groups, outputs * bits / 32] int32, `scales` [groups,
outputs] and `g_idx` [inputs], the group of each input, which may be left out where they take turns. In the first
version of the format, zeros are less by one.
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
    order_of,
    size_of,
    tensor_of,
    unpack,
)
from model.formats.tensor import Grouped, Stored, Tensor

OF_A_MODULE = ("qweight", "qzeros", "scales", "g_idx")


def reader(settings: Settings) -> Reader:
    """The reader of a checkpoint whose `quant_method` is gptq. Raises ValueError for what is not supported."""
    bits = choice(settings, "bits", (4, 8))
    version = choice(settings, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    overrides = [pattern for pattern in settings.get("dynamic") or {} if not pattern.startswith("-:")]
    if overrides:
        raise ValueError(
            f"quantization_config (gptq) has settings of their own for {overrides[0]!r} in `dynamic`, supported are "
            "modules that are left out, whose patterns begin with -:"
        )
    group = size_of(settings, "group_size")
    return partial(read, bits=bits, group=group, less=1 if version == "gptq" else 0)


def read(tensors: Tensors, bits: int, group: int | None, less: int) -> Tensors:
    """The tensors of a model whose quantised modules have those of OF_A_MODULE; others stay.

    `less` is by how much the zeros in the file are less than they should be.
    """
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    used = {f"{module}.{kind}" for module in modules for kind in OF_A_MODULE}
    made = [unpacked(module, tensors, bits, group, less) for module in modules]
    return {name: tensor for name, tensor in tensors.items() if name not in used} | {each.name: each for each in made}


def unpacked(module: str, tensors: Tensors, bits: int, group: int | None, less: int) -> Tensor:
    """The weight of a module, [outputs, inputs]. Raises ValueError if what belongs to it is missing or misshapen."""
    qweight = tensors[f"{module}.qweight"]
    qzeros, scales = (needed(tensors, f"{module}.{kind}", qweight) for kind in ("qzeros", "scales"))
    in_a_word = 32 // bits
    inputs, outputs = qweight.shape[0] * in_a_word, qweight.shape[1]
    size = group or inputs
    groups = -(-inputs // size)
    expect_shape(scales, (groups, outputs))
    expect_shape(qzeros, (groups, -(-outputs // in_a_word)))
    group_of = order_of(tensors.get(f"{module}.g_idx"), inputs, size)
    # One less for each number of a word, which may have taken from the next: adding to the word gives that back.
    less_in_word = np.uint32(sum(less << bits * i for i in range(in_a_word)))

    def rows(first: int, stop: int) -> Grouped:
        values = unpack(qweight.values()[:, first:stop].T, bits, inputs)
        zeros = unpack(qzeros.values().view(np.uint32) + less_in_word, bits, outputs)[:, first:stop].T
        found = Grouped(values, scales.values()[:, first:stop].T, size, zeros)
        return found if group_of is None else found.ordered(group_of)

    sources = (qweight, qzeros, scales)
    stored = Stored(bits, size, True, rows) if group_of is None else None
    return tensor_of(f"{module}.weight", (outputs, inputs), f"int{bits}", sources, rows, stored)
