"""Llama, and what has its architecture: https://huggingface.co/docs/transformers/model_doc/llama."""

from __future__ import annotations

from model.config import ModelConfig
from model.families.common import NAMES, Config, Family, read_decoder

DEFAULTS = {"max_position_embeddings": 2048, "eos_token_id": 2}


def read(config: Config) -> ModelConfig:
    """The config of a llama."""
    bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    return read_decoder(config, DEFAULTS, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


FAMILY = Family(read, NAMES)
