"""The work that a model cannot avoid: arithmetic of a prompt, bytes of weights, keys and values."""

from __future__ import annotations

from model.config import ModelConfig
from serve.cost.model import cost_model

BF16 = 2  # bytes a number


def prefill_flops(config: ModelConfig, prompt: int, cached: int = 0) -> float:
    """FLOPs of a prompt with so many tokens cached: those of serve.cost.model, and the head for the last token."""
    return cost_model(config).flops(cached, prompt) + 2.0 * config.vocab_size * config.embed_size


def weight_bytes(config: ModelConfig, width: int = BF16) -> float:
    """Bytes of the weights that a step reads, `width` bytes a number: the layers' matrices and the head."""
    return width * (cost_model(config).linear_flops / 2 + config.vocab_size * config.embed_size)


def kv_bytes(config: ModelConfig, tokens: float, width: int = BF16) -> float:
    """Bytes of the keys and values of so many tokens, `width` bytes a number."""
    return 2.0 * width * config.num_layers * config.num_kv_heads * config.head_dim * tokens
