"""What a model takes of a device's memory, and how long a context fits beside it: arithmetic on configs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from model.config import ModelConfig
from model.kv import bytes_per_token
from model.layout import layout
from model.states import bytes_per_state

# Weights of 8 or 4 bits have a scale of 16 bits for each group of so many.
GROUP, SCALE_BITS = 32, 16
MATRICES = (
    *("qkv", "out", "gate_up", "down", "shared_gate_up", "shared_down"),
    *("proj_in", "proj_out", "latent_in", "latent_out"),
)
RESERVED = 3 * 2**30  # bytes of a device that programs need while they run, as the server leaves them


def parameters(config: ModelConfig) -> int:
    """The number of all weights."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(layout(config)))


def active_parameters(config: ModelConfig) -> int:
    """The number of the weights that a token goes through, with the embedding and the head."""
    if not config.experts:
        return parameters(config)
    idle = config.experts.count - config.experts.per_token
    mixed = sum(kind.experts for kind in config.layers)
    of_expert = (config.gates + 1) * (config.experts.latent_size or config.embed_size) * config.experts.ffn_size
    return parameters(config) - mixed * idle * of_expert


def weight_bytes(config: ModelConfig, bits: int = 16) -> int:
    """Bytes of the weights, with the layers' matrices in so many bits and all else in 16.

    Below 16 bits each group of GROUP weights has a scale, as in GGUF's Q8_0 and Q4_0
    (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
    """
    matrices = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(layout(config).layers):
        if path[-1].name in MATRICES:
            matrices += math.prod(leaf.shape)
    width = bits if bits == 16 else bits + SCALE_BITS / GROUP
    return round((matrices * width + (parameters(config) - matrices) * 16) / 8)


def longest_context(config: ModelConfig, memory: int, bits: int = 16, kv: DTypeLike = jnp.bfloat16) -> int:
    """Tokens of one sequence that fit beside the weights and its state on a device, up to what the model was made for.

    It is 0 where the weights do not fit. `memory` is in bytes, `bits` as for `weight_bytes`, and keys and values have
    the dtype `kv`.
    """
    left = memory - RESERVED - weight_bytes(config, bits) - bytes_per_state(config)
    return max(0, min(config.max_position, left // bytes_per_token(config, kv)))
