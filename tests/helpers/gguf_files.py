"""GGUF files written with the `gguf` package from Hugging Face checkpoints: its writer, its names, its quantisation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from experiments.workloads.gguf_file import add_shape

Kind = GGMLQuantizationType
# The package dequantises these and cannot quantise to them. Where their half-precision scales are, in bytes of a block.
DRAWN = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "gpt_oss": MODEL_ARCH.GPT_OSS,
}
INTERLEAVED = ("llama", "mixtral")  # whose queries and keys llama.cpp rotates in pairs of neighbours
EXPERT = re.compile(r"(model\.layers\.\d+)\.(mlp|block_sparse_moe)\.experts\.\d+\.(\w+)\.weight")
FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up|down)_proj(_bias)?")


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
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[ARCHITECTURES[family]])
    add_sizes(writer, config)
    add_experts(writer, config)
    metadata(writer)
    stored, kinds, values = {}, {}, {}
    for name, tensor in with_experts_together(load_file(folder / "model.safetensors")).items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own, name
        kinds[own] = kind if tensor.ndim > 1 and name.endswith("weight") else Kind.F32
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


def with_experts_together(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp's converter takes them: the experts of a layer as one, outputs before inputs."""
    made: dict[str, np.ndarray] = {}
    grouped: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")]):
        tensor = tensors[name]
        if match := EXPERT.fullmatch(name):
            layer, block, own = match.groups()
            place = "mlp.experts" if block == "mlp" else "feed_forward.experts"
            layer = layer if block == "mlp" else layer.removeprefix("model.")
            grouped.setdefault(f"{layer}.{place}.{own}.weight", []).append(tensor)
        elif match := FUSED.fullmatch(name):
            prefix, which, bias = match.groups()
            rows, ending = (tensor, "bias") if bias else (tensor.swapaxes(1, 2), "weight")
            parts = {"gate": rows[:, ::2], "up": rows[:, 1::2]} if which == "gate_up" else {"down": rows}
            made |= {f"{prefix}.{own}_proj.{ending}": np.ascontiguousarray(part) for own, part in parts.items()}
        else:
            made[f"{name}.weight" if name.endswith("sinks") else name] = tensor
    return made | {name: np.stack(each) for name, each in grouped.items()}


def add_experts(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """The fields of a mixture of experts."""
    if count := config.get("num_experts", config.get("num_local_experts")):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", config["intermediate_size"]))
    if config["model_type"] == "gpt_oss":
        writer.add_sliding_window(config["sliding_window"])


def add_sizes(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """The fields that llama.cpp's converter writes of a config.json."""
    add_shape(writer, config)
    if head_dim := config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config["model_type"] in INTERLEAVED:  # the converter says it of no other
        writer.add_rope_dimension_count(head_dim or config["hidden_size"] // config["num_attention_heads"])
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
