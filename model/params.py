"""The weights as a pytree: what the loader writes and the decoder reads.

Matrices keep the checkpoint's orientation, outputs before inputs, so loading never transposes. Projections that read
the same input are fused; queries, key and value of one KV head lie together, so a mesh can split them along one axis.
Letters in einsums, throughout the model: l layers, t tokens, e embed, k kv heads, g group (query heads
per KV head), d head_dim, f ffn, v vocab.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Float32


@struct.dataclass
class Layer:
    """One decoder layer; with a leading `layers` axis on every field when stacked."""

    attn_norm: Float[jax.Array, "*layers embed"]
    # A KV head's queries, then its key, then its value: qkv_heads is group + 2.
    qkv: Float[jax.Array, "*layers kv_heads qkv_heads head_dim embed"]
    out: Float[jax.Array, "*layers embed kv_heads group head_dim"]
    mlp_norm: Float[jax.Array, "*layers embed"]
    gate_up: Float[jax.Array, "*layers 2 ffn embed"]
    down: Float[jax.Array, "*layers embed ffn"]
    qkv_bias: Float[jax.Array, "*layers kv_heads qkv_heads head_dim"] | None = None
    out_bias: Float[jax.Array, "*layers embed"] | None = None
    q_norm: Float[jax.Array, "*layers head_dim"] | None = None
    k_norm: Float[jax.Array, "*layers head_dim"] | None = None
    gate_up_bias: Float[jax.Array, "*layers 2 ffn"] | None = None
    down_bias: Float[jax.Array, "*layers embed"] | None = None


@struct.dataclass
class PackedLayers:
    """All layers in the order in which the CPU kernel reads them; what a model lacks has no outputs.

    A weight is [layers, panels, inputs, panel]: a panel of outputs lies together, input by input. Half of each panel of
    `gate_up` is gate, half is up. Biases are in the order of their weight's panels.
    """

    attn_norm: Float32[jax.Array, "layers embed"]
    qkv: Float32[jax.Array, "layers qkv_panels embed panel"]
    qkv_bias: Float32[jax.Array, "layers qkv_outputs"]
    q_norm: Float32[jax.Array, "layers q_norm"]
    k_norm: Float32[jax.Array, "layers k_norm"]
    out: Float32[jax.Array, "layers embed_panels heads_dim panel"]
    out_bias: Float32[jax.Array, "layers out_outputs"]
    mlp_norm: Float32[jax.Array, "layers embed"]
    gate_up: Float32[jax.Array, "layers ffn_panels embed panel"]
    gate_up_bias: Float32[jax.Array, "layers gate_up_outputs"]
    down: Float32[jax.Array, "layers embed_panels ffn panel"]
    down_bias: Float32[jax.Array, "layers down_outputs"]


@struct.dataclass
class Params:
    """A whole model: its layers stacked, or apart as `unstacked` makes them, or packed for the CPU kernels.

    Where the layers are packed, so are the embedding and the head: [panels, embed, panel].
    """

    embed: Float[jax.Array, "vocab embed"] | Float32[jax.Array, "panels embed panel"]
    layers: Layer | tuple[Layer, ...] | PackedLayers
    final_norm: Float[jax.Array, "embed"]
    # None where the embedding is tied.
    lm_head: Float[jax.Array, "vocab embed"] | Float32[jax.Array, "panels embed panel"] | None = None


def unstacked(params: Params) -> Params:
    """The same weights with `layers` as a tuple, one Layer each.

    On a CPU, XLA copies the slice of a stacked weight on every layer of a scan, which halves the speed of decode; with
    separate arrays it reads each weight once. On an H200 stacked weights decode as fast, and compile faster
    (`make gpu-bench`).
    """
    if not isinstance(params.layers, Layer):
        return params
    leaves, structure = jax.tree.flatten(params.layers)
    if all(device.platform == "cpu" for leaf in leaves for device in leaf.devices()):
        leaves = [_apart(leaf) for leaf in leaves]
    layers = tuple(jax.tree.unflatten(structure, layer) for layer in zip(*leaves, strict=True))
    return dataclasses.replace(params, layers=layers)


def _apart(stacked: jax.Array) -> list[jax.Array]:
    """The parts of an array along its first axis, made on the host: JAX takes them as they are where they are aligned.

    Of an array on several devices, each device has the same part of what it has.
    """
    if not isinstance(stacked.sharding, NamedSharding):
        return [jax.device_put(part) for part in np.asarray(stacked)]
    place = NamedSharding(stacked.sharding.mesh, PartitionSpec(*stacked.sharding.spec[1:]))
    shards = [(shard.device, np.asarray(shard.data)) for shard in stacked.addressable_shards]

    def part(index: int) -> jax.Array:
        arrays = [jax.device_put(data[index], device) for device, data in shards]
        return jax.make_array_from_single_device_arrays(stacked.shape[1:], place, arrays)

    return [part(index) for index in range(len(stacked))]
