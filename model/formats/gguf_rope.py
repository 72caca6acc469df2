"""The rotation of a GGUF file: its metadata, or the divisors of frequencies, as the `rope_scaling` of a config.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from model.formats.gguf_file import GgufFile

Config = dict[str, Any]
ROPE_FREQS = "rope_freqs.weight"
# What all published Llama 3 models have: only their factors differ.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_scaling(file: GgufFile, name: str, head_dim: int) -> Config | None:
    """How frequencies are stretched; None for not at all."""
    if ROPE_FREQS in file.tensors:
        return _llama3_scaling(file, name, head_dim)
    prefix = f"{name}.rope.scaling"
    field, older = f"{prefix}.factor", f"{name}.rope.scale_linear"
    field = older if older in file.metadata and field not in file.metadata else field
    kind = file.value(f"{prefix}.type", str, "linear" if field in file.metadata else "none")
    if kind == "none":
        return None
    if not 0 < (factor := file.value(field, float)) < math.inf:
        raise ValueError(f"{file.path}: {field} is {factor:g}, expected a positive number: convert it again")
    scaling: Config = {"rope_type": kind, "factor": factor}
    if name == "gpt-oss":  # whose config.json says so, and its metadata does not
        scaling["truncate"] = False
    if kind == "yarn":
        fields = {
            "original_max_position_embeddings": "original_context_length",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        for ours, theirs in fields.items():
            if f"{prefix}.{theirs}" in file.metadata:
                scaling[ours] = file.value(f"{prefix}.{theirs}", float)
        if f"{prefix}.attn_factor" in file.metadata:
            own = file.value(f"{prefix}.attn_factor", float)
            scaling["attention_factor"] = own * (0.1 * math.log(factor) + 1)
    return scaling


def _llama3_scaling(file: GgufFile, name: str, head_dim: int) -> Config:
    """Llama 3's scaling, of which a file has only the divisors of frequencies, [head_dim / 2] float32.

    Raises ValueError for divisors that Llama 3's formula does not give.
    """
    stored = file.tensors[ROPE_FREQS]
    divisors = stored.data.view(np.float32) if stored.kind == GGMLQuantizationType.F32 else np.ones(0)
    factor = float(divisors.max(initial=1.0))
    theta = file.value(f"{name}.rope.freq_base", float, 10000.0)
    if divisors.shape != (head_dim // 2,) or not np.allclose(divisors, llama3_divisors(theta, head_dim, factor), 1e-3):
        raise ValueError(
            f"{file.path}: {ROPE_FREQS} has divisors of frequencies up to {factor:g}, expected those of Llama 3: "
            "use the safetensors checkpoint"
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def llama3_divisors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """What Llama 3 divides the frequency of each pair by, [head_dim / 2] float64: `model.rope` has the formula."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original, low, high = (
        LLAMA3[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
