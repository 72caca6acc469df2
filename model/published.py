"""The shapes of published models that agents run, as far as their config.json says what a model is.

From each model's config.json on the Hugging Face Hub, of the id that its entry names.
"""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families import read_config

GQA = {"num_key_value_heads": 8, "head_dim": 128}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "max_position_embeddings": 40_960, "rope_theta": 1e6, **GQA}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "max_position_embeddings": 262_144,
    "rope_theta": 1e7,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
}
GLM4_MOE = {
    "model_type": "glm4_moe",
    "vocab_size": 151_552,
    "num_attention_heads": 96,
    "attention_bias": True,
    "rope_theta": 1e6,
    **GQA,
}
# Those of qwen3_next.py and qwen3_5.py in `families/`, whose defaults are the smallest models' of their kind.
QWEN3_NEXT = {"vocab_size": 151_936, "max_position_embeddings": 262_144, "num_attention_heads": 16}
QWEN3_5 = {**QWEN3_NEXT, "vocab_size": 248_320}

# By name, with the id of the model on the hub.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3.1 8B": (
        "meta-llama/Llama-3.1-8B-Instruct",
        {
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 131_072,
            "rope_theta": 5e5,
            **GQA,
        },
    ),
    "Qwen3 8B": (
        "Qwen/Qwen3-8B",
        {**QWEN3, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32},
    ),
    "Qwen3 32B": (
        "Qwen/Qwen3-32B",
        {**QWEN3, "hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64},
    ),
    "Devstral Small, Mistral Small 3 (24B)": (
        "mistralai/Devstral-Small-2505",
        {
            "model_type": "mistral",
            "vocab_size": 131_072,
            "hidden_size": 5120,
            "intermediate_size": 32_768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "max_position_embeddings": 131_072,
            "sliding_window": None,
            "rope_theta": 1e9,
            **GQA,
        },
    ),
    "Mixtral 8x7B": (
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        {
            "model_type": "mixtral",
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32_768,
        },
    ),
    "Qwen3-Coder-30B-A3B": (
        "Qwen/Qwen3-Coder-30B-A3B-Instruct",
        {
            **QWEN3_MOE,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
        },
    ),
    "Qwen3-235B-A22B-2507": (
        "Qwen/Qwen3-235B-A22B-Instruct-2507",
        {
            **QWEN3_MOE,
            "hidden_size": 4096,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
        },
    ),
    "gpt-oss-20b": ("openai/gpt-oss-20b", {**GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt-oss-120b": ("openai/gpt-oss-120b", {**GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128}),
    "GLM-4.5-Air": (
        "zai-org/GLM-4.5-Air",
        {
            **GLM4_MOE,
            "hidden_size": 4096,
            "intermediate_size": 10_944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 46,
            "max_position_embeddings": 131_072,
        },
    ),
    "GLM-4.6, GLM-4.7": (
        "zai-org/GLM-4.6",
        {
            **GLM4_MOE,
            "hidden_size": 5120,
            "intermediate_size": 12_288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "num_hidden_layers": 92,
            "use_qk_norm": True,
            "max_position_embeddings": 202_752,
        },
    ),
    "Qwen3-Coder-Next (80B-A3B)": (
        "Qwen/Qwen3-Coder-Next",
        {**QWEN3_NEXT, "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48},
    ),
    "Qwen3.5-35B-A3B": (
        "Qwen/Qwen3.5-35B-A3B",
        {
            **QWEN3_5,
            "model_type": "qwen3_5_moe_text",
            "hidden_size": 2048,
            "num_key_value_heads": 2,
            "num_hidden_layers": 40,
        },
    ),
    "Qwen3.5-27B": (
        "Qwen/Qwen3.5-27B",
        {
            **QWEN3_5,
            "model_type": "qwen3_5_text",
            "hidden_size": 5120,
            "intermediate_size": 17_408,
            "num_hidden_layers": 64,
            "num_attention_heads": 24,
            "linear_num_value_heads": 48,
        },
    ),
    "Nemotron 3 Nano (30B-A3B)": (
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        {
            "model_type": "nemotron_h",
            "vocab_size": 131_072,
            "hidden_size": 2688,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "num_key_value_heads": 2,
            "max_position_embeddings": 262_144,
            "mamba_num_heads": 64,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
        },
    ),
}


def published(name: str) -> ModelConfig:
    """The config of one of MODELS."""
    return read_config(MODELS[name][1])
