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
from model.quantized import Quantized, dequantize

MATRICES = ("qkv", "out", "gate_up", "down", "experts_gate_up", "experts_down")  # which may be quantised


def embedding(
    embed: Float32[jax.Array, "panels embed panel"] | Quantized, tokens: Int32[Array, "tokens"]
) -> Float32[jax.Array, "tokens embed"]:
    """The rows of the packed embedding that belong to tokens."""

    def rows(array: jax.Array) -> jax.Array:
        panel = array.shape[-1]
        return array[tokens // panel, :, tokens % panel]

    if isinstance(embed, jax.Array):
        return rows(embed)
    values = rows(embed.values)
    if embed.bits == 4:
        values = jax.lax.bitcast_convert_type(values, jnp.uint8).reshape(len(values), -1)[:, : (embed.inputs + 1) // 2]
    offsets = None if embed.offsets is None else rows(embed.offsets)
    return dequantize(Quantized(values, rows(embed.scales), embed.bits, embed.group, embed.inputs, offsets))


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
    kinds = config.active_layers[first : first + len(layers.attn_norm)]
    windows = np.asarray([kind.window or NO_WINDOW for kind in kinds], np.int32)
    fields = {name: getattr(layers, name) for name in PackedLayers.__dataclass_fields__}
    matrices = [kernel_arrays(fields[name]) for name in MATRICES]
    fields |= {name: values for name, (values, *_) in zip(MATRICES, matrices, strict=True)}
    scales = [array for _, *arrays in matrices for array in arrays]
    call = jax.ffi.ffi_call(LAYERS, shapes, input_output_aliases={0: 0, 1: 1, 2: 2})
    numbers = {"eps": np.float32(config.norm_eps), "first": first, **experts_of(config if layers.router.size else None)}
    x, k, v = call(
        *(x, pool.k, pool.v, cos, sin, *integers, windows, *fields.values(), *scales),
        **numbers,
        heads=config.num_heads,
        ffn=inputs_of(layers.down),
        expert_ffn=inputs_of(layers.experts_down),
        quantised=np.asarray([group_of(getattr(layers, name)) for name in MATRICES], np.int64),
    )
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
    head: Float32[jax.Array, "panels embed panel"] | Quantized,
    vocab: int,
    eps: float,
) -> Float32[jax.Array, "logits vocab"]:
    """The logits of the tokens `indices`: norm, then the product with the packed head.

    Equal indices at the end, as padding has them, are computed once.
    """
    call = jax.ffi.ffi_call(HEAD, jax.ShapeDtypeStruct((indices.shape[0], vocab), jnp.float32))
    arrays = (x, jnp.asarray(indices, jnp.int32), norm, *kernel_arrays(head))
    found: jax.Array = call(*arrays, eps=np.float32(eps), group=group_of(head))
    return found


def kernel_arrays(weight: jax.Array | Quantized) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A packed matrix as the kernel takes it: values, scales, offsets; what it lacks is empty."""
    values = weight.values if isinstance(weight, Quantized) else weight
    nothing = jnp.zeros((len(values), 0), jnp.float32)
    if isinstance(weight, Quantized):
        return values, weight.scales, nothing if weight.offsets is None else weight.offsets
    return values, nothing, nothing


def group_of(weight: jax.Array | Quantized) -> int:
    """Inputs of a group; 0 for a matrix that is not quantised."""
    return weight.group if isinstance(weight, Quantized) else 0


def inputs_of(weight: jax.Array | Quantized) -> int:
    """The inputs of a packed matrix."""
    return weight.inputs if isinstance(weight, Quantized) else int(weight.shape[-2])
