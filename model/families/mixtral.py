"""Mixtral: Mistral with experts in all layers: https://huggingface.co/docs/transformers/model_doc/mixtral."""

from __future__ import annotations

from model.config import ExpertsConfig, ModelConfig
from model.families.common import NAMES, Config, Family, read_decoder, size

DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
NAMES_OF_EXPERTS = {
    "router": "block_sparse_moe.gate",
    "expert_gate": "block_sparse_moe.experts.{}.w1.weight",
    "expert_up": "block_sparse_moe.experts.{}.w3.weight",
    "expert_down": "block_sparse_moe.experts.{}.w2.weight",
}


def read(config: Config) -> ModelConfig:
    """The config of a Mixtral."""
    given = {**DEFAULTS, **config}
    layers = size(given, "num_hidden_layers")
    return read_decoder(
        config,
        DEFAULTS,
        [given.get("sliding_window")] * layers,
        mixed=[True] * layers,
        experts=ExpertsConfig(
            count=size(given, "num_local_experts"),
            per_token=size(given, "num_experts_per_tok"),
            ffn_size=size(given, "intermediate_size"),
        ),
    )


FAMILY = Family(read, {**NAMES, **NAMES_OF_EXPERTS})
