"""Mistral: llama, with a window on all layers or on none: https://huggingface.co/docs/transformers/model_doc/mistral."""

from __future__ import annotations

from model.config import ModelConfig
from model.families.common import NAMES, Config, Family, read_decoder, size

DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "eos_token_id": 2}


def read(config: Config) -> ModelConfig:
    """The config of a Mistral model."""
    windows = [config.get("sliding_window", 4096)] * size(config, "num_hidden_layers")
    return read_decoder(config, DEFAULTS, windows)


FAMILY = Family(read, NAMES)
