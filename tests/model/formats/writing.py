"""Quantised checkpoints for the tests: a tiny model's linear weights, replaced by what a format has in their place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from model.formats.safetensors import map_tensors
from model.formats.tensor import Tensor
from model.params import Params
from model.quantized import Quantized, dequantize

State = dict[str, torch.Tensor]
Quantise = Callable[[str, torch.Tensor], tuple[State, torch.Tensor]]


def quantised(source: Path, target: Path, settings: dict[str, Any], quantise: Quantise) -> tuple[Path, Path]:
    """Two copies of a tiny checkpoint: quantised, and with the weights that the reference makes of that.

    `quantise(module, weight)` gives the tensors of a module, by their full names, and those weights. The projections
    of all layers are quantised; the embedding, the norms and the head stay.
    """
    state = load_file(source / "model.safetensors")
    stored, expected = dict(state), dict(state)
    for name in [name for name in state if name.endswith("_proj.weight")]:
        tensors, expected[name] = quantise(name.removesuffix(".weight"), stored.pop(name))
        stored |= tensors
    made = target / "quantised", target / "expected"
    for folder, tensors in zip(made, (stored, expected), strict=True):
        shutil.copytree(source, folder)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (made[0] / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return made


def mapped(folder: Path, tensors: State) -> dict[str, Tensor]:
    """The tensors of a file with these."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return map_tensors([folder / "model.safetensors"])


def packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers [rows, count] in int32 words, from the lowest bits on, [rows, words]."""
    in_a_word = 32 // bits
    padded = np.pad(numbers.astype(np.uint64), ((0, 0), (0, -numbers.shape[1] % in_a_word)))
    shifts = np.arange(in_a_word, dtype=np.uint64) * np.uint64(bits)
    words = (padded.reshape(len(padded), -1, in_a_word) << shifts).sum(-1, dtype=np.uint64)
    return words.astype(np.uint32).view(np.int32)


def assert_floats_are(params: Params, expected: Params) -> None:
    """Each array, or what its numbers stand for, is that of a checkpoint of these weights in full precision."""

    def compare(found: jax.Array | Quantized, wanted: jax.Array) -> None:
        if isinstance(found, Quantized):
            # An offset of zero x scale is rounded once, and so is the sum.
            np.testing.assert_allclose(dequantize(found).reshape(wanted.shape), wanted, rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(found, wanted)

    jax.tree.map(compare, params, expected, is_leaf=lambda each: isinstance(each, Quantized))
