"""Qwen2 and 2.5, with biases on queries, keys and values: https://huggingface.co/docs/transformers/model_doc/qwen2."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.families.common import FULL_OR_SLIDING, NAMES, Config, Family, number, read_decoder, windows_by_type

DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}


def read(config: Config) -> ModelConfig:
    """The config of a Qwen2."""
    return read_decoder(config, DEFAULTS, windows(config), FULL_OR_SLIDING, qkv_bias=True)


def windows(config: Config) -> list[Any]:
    """The window of each layer of a Qwen2 or Qwen3: as `layer_types` says, or from `max_window_layers` on."""
    used = {"sliding_window": config.get("sliding_window", 4096) if config.get("use_sliding_window") else None}
    given = {"max_window_layers": 28, **config, **used}
    return windows_by_type(given, lambda layer: layer >= number(given, "max_window_layers"))


FAMILY = Family(read, NAMES)
