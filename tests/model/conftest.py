"""Tiny checkpoints, written by transformers itself: what the loader and the decoder are compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
# On a loaded machine torch's second thread once took cosines of large angles 1.7e-4 off their float64 values.
torch.set_num_threads(1)

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

# (name, family, overrides of config.json): every optional part of the decoder occurs in one of these.
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "llama", {}),
    ("llama-tied", "llama", {"tie_word_embeddings": True}),
    ("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama-wide-heads", "llama", {"head_dim": 32}),
    ("llama-linear", "llama", {"rope_parameters": LINEAR}),
    ("llama-llama3", "llama", {"rope_parameters": LLAMA3}),
    ("mistral", "mistral", {"sliding_window": None}),
    ("qwen2", "qwen2", {}),
    ("qwen2-tied", "qwen2", {"tie_word_embeddings": True}),
    ("qwen3", "qwen3", {"head_dim": 32}),
    ("qwen3-biases-tied", "qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3-yarn", "qwen3", {"head_dim": 16, "rope_parameters": YARN}),
]


GPT_OSS_YARN = {**YARN, "rope_theta": 150000.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
QWEN3_MOE = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
GLM4_MOE = {
    "head_dim": 16,
    "attention_bias": True,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}
# Those whose layers are of several kinds, have experts or windows, likewise.
OF_KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("mistral-window", "mistral", {"sliding_window": 24}),
    ("qwen2-windows", "qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    ("qwen3_moe", "qwen3_moe", {**QWEN3_MOE, "norm_topk_prob": True}),
    ("qwen3_moe-mixed", "qwen3_moe", {**QWEN3_MOE, "decoder_sparse_step": 2, "attention_bias": True}),
    ("mixtral-window", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24}),
    (
        "gpt_oss",
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "rope_parameters": GPT_OSS_YARN,
        },
    ),
    ("glm4_moe", "glm4_moe", {**GLM4_MOE, "use_qk_norm": True, "n_group": 4, "topk_group": 2}),
    ("glm4_moe-plain", "glm4_moe", {**GLM4_MOE, "first_k_dense_replace": 2, "norm_topk_prob": False}),
]


@pytest.fixture(params=VARIANTS, ids=[name for name, *_ in VARIANTS])
def variant(request: pytest.FixtureRequest) -> tuple[str, str, dict[str, Any]]:
    """Each entry of VARIANTS in turn: (name, family, overrides)."""
    return request.param


@pytest.fixture
def variant_folder(variant: tuple[str, str, dict[str, Any]], tiny_checkpoint: Callable[..., Path]) -> Path:
    """The checkpoint folder of each variant in turn."""
    _, family, overrides = variant
    return tiny_checkpoint(family, **overrides)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(family, dtype="float32", max_shard_size="1GB", **overrides)`: a folder, written once a session.

    Shared between tests: copy it before changing a file. `AutoModelForCausalLM.from_pretrained(folder)` reads it too.
    """
    made: dict[str, Path] = {}

    def write(family: str, dtype: str = "float32", max_shard_size: str = "1GB", **overrides: Any) -> Path:
        key = json.dumps([family, dtype, max_shard_size, overrides], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            random_model(family, **overrides).to(getattr(torch, dtype)).save_pretrained(
                folder, max_shard_size=max_shard_size
            )
            made[key] = folder
        return made[key]

    return write


def random_model(family: str, **overrides: Any) -> torch.nn.Module:
    """A seeded transformers model in float32 whose every weight, norms and biases too, is random."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **overrides}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Norm weights lie about one; the rest is large enough for biases and logits to matter.
            centre = 1.0 if "norm" in name else 0.0
            weight.copy_(centre + 0.2 * torch.randn(weight.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if "correction" in name:  # of the choice of experts
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model
