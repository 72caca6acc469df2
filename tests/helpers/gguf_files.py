"""GGUF files written with the `gguf` package from Hugging Face checkpoints: its writer, its names, its quantisation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

Kind = GGMLQuantizationType
# The package dequantises these and cannot quantise to them. Where their half-precision scales are, in bytes of a block.
DRAWN = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
INTERLEAVED = ("llama",)  # whose queries and keys llama.cpp rotates in pairs of neighbours


def blocks_of(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Values as a file stores them, [*rows, bytes]; random blocks where the package cannot quantise."""
    if kind not in DRAWN:
        return quantize(values, kind)
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.size)
    blocks = rng.integers(0, 256, (values.size // block, size), np.uint8)
    for at in DRAWN[kind]:
        scales = rng.uniform(-1e-3, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*values.shape[:-1], -1)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of llama.cpp's rotation, as its converter writes them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    folder: Path,
    path: Path,
    kind: Kind = Kind.F32,
    change: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
    metadata: Callable[[GGUFWriter], object] = lambda writer: None,
) -> dict[str, np.ndarray]:
    """Write a checkpoint in float32 as a GGUF file, its matrices quantised.

    `change` changes the tensors under their names in the file, `metadata` adds fields. Returns the dequantised tensors
    under their Hugging Face names.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    names = get_tensor_name_map(ARCHITECTURES[family], config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = GGUFWriter(path, family)
    add_sizes(writer, config)
    metadata(writer)
    stored, kinds, values = {}, {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kinds[own] = kind if tensor.ndim > 1 else Kind.F32
        projection = name.split(".")[-2]
        data = blocks_of(tensor, kinds[own])
        values[name] = dequantize(data, kinds[own]).reshape(tensor.shape)
        permuted = family in INTERLEAVED and projection in heads
        stored[own] = interleaved(data, heads[projection]) if permuted else data
    change(stored)
    for own, data in stored.items():
        writer.add_tensor(own, data, raw_dtype=kinds[own] if data.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def add_sizes(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """The fields that llama.cpp's converter writes of a config.json."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if head_dim := config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
    if (end := config.get("eos_token_id")) is not None:
        writer.add_eos_token_id(end)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if (scaling := rope.get("rope_type", "default")) in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(scaling))
        writer.add_rope_scaling_factor(rope["factor"])
    if scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def dequantised_copy(folder: Path, values: dict[str, np.ndarray], target: Path) -> Path:
    """The checkpoint with these weights."""
    shutil.copytree(folder, target)
    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, target / "model.safetensors")
    return target
