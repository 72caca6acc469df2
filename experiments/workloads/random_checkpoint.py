"""Checkpoints of random weights in any model's shape, for what does not depend on their values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from model.families import read_config
from model.layout import layout

# The shape of https://huggingface.co/HuggingFaceTB/SmolLM2-135M.
LLAMA_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def write_random_checkpoint(folder: Path, config: dict[str, Any], tokenizer: Path, seed: int = 0) -> None:
    """Write a checkpoint of random bfloat16 weights for a config.json, with the tokenizer's files of another one.

    Nothing happens where one is. The config's end-of-sequence token becomes the tokenizer's.
    """
    if (folder / "model.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in tokenizer.glob("tokenizer*.json"):
        shutil.copy(path, folder)
    ends = json.loads((tokenizer / "config.json").read_text())["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ends, "torch_dtype": "bfloat16"}))
    generator = np.random.default_rng(seed)

    def drawn(shape: tuple[int, ...]) -> np.ndarray:
        """A matrix of random values, or a norm of ones."""
        matrix = generator.standard_normal(shape, np.float32) * shape[-1] ** -0.5
        values: np.ndarray = (matrix if len(shape) > 1 else np.ones(shape)).astype(ml_dtypes.bfloat16)
        return values

    leaves = jax.tree.leaves(layout(read_config(config)))
    tensors = {part.name: drawn(part.shape) for leaf in leaves for part in leaf.parts}
    partial_file = folder / "partial"
    save_file(tensors, partial_file)
    partial_file.rename(folder / "model.safetensors")
