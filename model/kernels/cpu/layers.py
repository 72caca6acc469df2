"""The forward pass on CPUs over packed weights: all layers in one call, and the logits in another; see `layers.cc`.

A token's result has the same bits in any batch and with any number of threads, if the same of its sequence's tokens are
new.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from model.batch import NO_WINDOW, Array, Batch
from model.config import ExpertsConfig, ModelConfig
from model.kernels.cpu.build import HEAD, LAYERS
from model.kv import KVPool
from model.params import PackedLayers


def embedding(
    embed: Float32[jax.Array, "panels embed panel"], tokens: Int32[Array, "tokens"]
) -> Float32[jax.Array, "tokens embed"]:
    """The rows of the packed embedding that belong to tokens."""
    panel = embed.shape[-1]
    return embed[tokens // panel, :, tokens % panel]


def run_layers(
    x: Float32[jax.Array, "tokens embed"],
    layers: PackedLayers,
    first: int,
    pool: KVPool,
    batch: Batch,
    cos: Float32[jax.Array, "tokens pairs"],
    sin: Float32[jax.Array, "tokens pairs"],
    config: ModelConfig,
) -> tuple[Float32[jax.Array, "tokens embed"], KVPool]:
    """The residual stream after a run of layers, from number `first` on, and the pool with the new keys and values.

    Padding tokens keep their `x` and cost nothing.
    """
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, pool.k, pool.v)]
    integers = (jnp.asarray(n, jnp.int32) for n in (batch.starts, batch.prefix, batch.block_table))
    kinds = config.layers[first : first + len(layers.attn_norm)]
    windows = np.asarray([kind.window or NO_WINDOW for kind in kinds], np.int32)
    weights = (getattr(layers, name) for name in PackedLayers.__dataclass_fields__)
    call = jax.ffi.ffi_call(LAYERS, shapes, input_output_aliases={0: 0, 1: 1, 2: 2})
    numbers = {"eps": np.float32(config.norm_eps), "first": first, **experts_of(config if layers.router.size else None)}
    x, k, v = call(x, pool.k, pool.v, cos, sin, *integers, windows, *weights, **numbers)
    return x, KVPool(k, v)


def experts_of(config: ModelConfig | None) -> dict[str, np.number | int | bool]:
    """What the kernel is told of the experts; nothing is set where there are none."""
    experts = (config and config.experts) or ExpertsConfig(count=0, per_token=0, ffn_size=0)
    factor, limit = experts.clamp or (0.0, 0.0)
    return {
        "experts": experts.count,
        "per_token": experts.per_token,
        "groups": experts.groups,
        "chosen_groups": experts.chosen_groups,
        "sigmoid": experts.scoring == "sigmoid",
        "renormalize": experts.renormalize,
        "scaling": np.float32(experts.scaling),
        "factor": np.float32(factor),
        "limit": np.float32(limit),
    }


def logits(
    x: Float32[jax.Array, "tokens embed"],
    indices: Int32[Array, "logits"],
    norm: Float32[jax.Array, "embed"],
    head: Float32[jax.Array, "panels embed panel"],
    vocab: int,
    eps: float,
) -> Float32[jax.Array, "logits vocab"]:
    """The logits of the tokens `indices`: norm, then the product with the packed head.

    Equal indices at the end, as padding has them, are computed once.
    """
    call = jax.ffi.ffi_call(HEAD, jax.ShapeDtypeStruct((indices.shape[0], vocab), jnp.float32))
    found: jax.Array = call(x, jnp.asarray(indices, jnp.int32), norm, head, eps=np.float32(eps))
    return found
