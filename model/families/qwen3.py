"""Qwen3, with norms on queries and keys: https://huggingface.co/docs/transformers/model_doc/qwen3."""

from __future__ import annotations

from model.config import ModelConfig
from model.families.common import FULL_OR_SLIDING, NAMES, Config, Family, read_decoder
from model.families.qwen2 import windows

DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}


def read(config: Config) -> ModelConfig:
    """The config of a Qwen3."""
    bias = bool(config.get("attention_bias", False))
    return read_decoder(config, DEFAULTS, windows(config), FULL_OR_SLIDING, qkv_bias=bias, out_bias=bias, qk_norm=True)


FAMILY = Family(read, NAMES)
