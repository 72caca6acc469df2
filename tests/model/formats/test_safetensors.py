"""Safetensors files: mapped, read by rows, and refused with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint import load
from model.formats.safetensors import map_tensors
from model.formats.tensor import BLOCK, Tensor, same_values


def mapped(folder: Path, **tensors: torch.Tensor) -> dict[str, Tensor]:
    save_file(tensors, folder / "model.safetensors")
    return map_tensors([folder / "model.safetensors"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "float8_e4m3fn"])
def test_rows_are_those_of_the_whole(tmp_path, dtype):
    stored = torch.arange(60).reshape(5, 4, 3).to(getattr(torch, dtype))
    tensor = mapped(tmp_path, x=stored)["x"]
    assert (tensor.shape, tensor.rows, tensor.nbytes) == ((5, 4, 3), 5, 60 * stored.itemsize)
    np.testing.assert_array_equal(tensor.values().astype(np.float32), stored.float().numpy())
    np.testing.assert_array_equal(tensor.values(1, 3).astype(np.float32), stored[1:3].float().numpy())
    assert tensor.values().dtype == tensor.dtype


def test_a_scalar_is_one_row(tmp_path):
    tensor = mapped(tmp_path, x=torch.tensor(2.5))["x"]
    assert (tensor.shape, tensor.rows, tensor.values().item()) == ((), 1, 2.5)


def test_blocks_are_all_rows_in_their_order(tmp_path):
    tensors = mapped(tmp_path, wide=torch.zeros(3, BLOCK + 1), tall=torch.zeros(BLOCK + 1, 1), none=torch.zeros(0, 4))
    blocks = {name: list(tensor.blocks()) for name, tensor in tensors.items()}
    assert blocks == {"wide": [(0, 1), (1, 2), (2, 3)], "tall": [(0, BLOCK), (BLOCK, BLOCK + 1)], "none": []}


def test_values_are_compared_whatever_the_block_that_differs(tmp_path):
    last = torch.zeros(3, BLOCK)
    last[2, -1] = 1
    tensors = mapped(tmp_path, zeros=torch.zeros(3, BLOCK), more=torch.zeros(3, BLOCK), last=last, short=torch.zeros(2))
    equal = {name: same_values(tensors["zeros"], tensors[name]) for name in tensors}
    assert equal == {"zeros": True, "more": True, "last": False, "short": False}


@pytest.mark.parametrize("keep", [4, 100, 100_000])
def test_a_truncated_file_is_named(tiny_checkpoint, tmp_path, keep):
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copy")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"model\.safetensors \({keep} bytes\) is not a whole safetensors file"):
        load(folder, jnp.float32)


def test_a_missing_shard_is_named(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen2", max_shard_size="50KB"), tmp_path / "copy")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"{lost.name} is missing"):
        load(folder, jnp.float32)


def test_a_folder_without_safetensors_says_what_it_has_and_what_to_do(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"found pytorch_model\.bin.*save_pretrained"):
        load(folder, jnp.float32)
