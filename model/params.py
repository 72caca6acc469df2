"""The weights as a pytree: what the loader writes and the decoder reads.

Matrices keep the checkpoint's orientation, outputs before inputs, so loading never transposes. Projections that read
the same input are fused; queries, key and value of one KV head lie together, so a mesh can split them along one axis.
Layers that have the same arrays and follow each other are one run, whose arrays are stacked. Letters in einsums,
throughout the model: l layers, t tokens, e embed, k kv heads, g group (query heads per KV head), d head_dim, f ffn,
v vocab, x experts.
"""

from __future__ import annotations

import dataclasses
import typing

import jax
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Float32

from model.quantized import Quantized, QuantizedPanels


@struct.dataclass
class Experts:
    """A layer's mixture of experts; with a leading `layers` axis on every field when stacked."""

    router: Float[jax.Array, "*layers experts embed"]
    # Their inputs and outputs are `latent` where there are matrices that lead there and back.
    gate_up: Float[jax.Array, "*layers experts gates ffn embed"] | Quantized
    down: Float[jax.Array, "*layers experts embed ffn"] | Quantized
    router_bias: Float[jax.Array, "*layers experts"] | None = None
    # Added to a token's scores for the choice of its experts, and not to their weights.
    correction: Float32[jax.Array, "*layers experts"] | None = None
    gate_up_bias: Float[jax.Array, "*layers experts gates ffn"] | None = None
    down_bias: Float[jax.Array, "*layers experts embed"] | None = None
    # The experts that every token goes through, as one block.
    shared_gate_up: Float[jax.Array, "*layers gates ffn embed"] | Quantized | None = None
    shared_down: Float[jax.Array, "*layers embed ffn"] | Quantized | None = None
    shared_gate: Float[jax.Array, "*layers 1 embed"] | None = None  # of the sigmoid that weighs them
    latent_in: Float[jax.Array, "*layers latent embed"] | None = None
    latent_out: Float[jax.Array, "*layers embed latent"] | None = None


@struct.dataclass
class Recurrent:
    """A layer's gated delta net or Mamba-2; with a leading `layers` axis on every field when stacked.

    `inputs` are, of a gated delta net, queries, keys, values, the gate of the norm, and of each head the strength of a
    write and its decay; of a Mamba-2, the gate, values, keys, queries, and the time step of each head.
    """

    proj_in: Float[jax.Array, "*layers inputs embed"]
    conv: Float[jax.Array, "*layers channels width"]
    log_rate: Float32[jax.Array, "*layers state_heads"]  # of decay, for a time step of one
    step_bias: Float32[jax.Array, "*layers state_heads"]
    norm: Float[jax.Array, "*layers norm"]  # value_dim, or of a Mamba-2 the channels of all values
    proj_out: Float[jax.Array, "*layers embed values"]
    conv_bias: Float[jax.Array, "*layers channels"] | None = None
    skip: Float32[jax.Array, "*layers state_heads"] | None = None  # from a value to the output of its own token


@struct.dataclass
class Layer:
    """One decoder layer; with a leading `layers` axis on every field when stacked.

    A quantised matrix has the axes of a plain one, but all inputs are one axis: `out` is [*layers, embed, inputs]. A
    layer has `qkv` and `out`, or `recurrent`, or does not mix tokens; and `experts`, or `gate_up` and `down`, or does
    not mix features.
    """

    attn_norm: Float[jax.Array, "*layers embed"] | None
    # A KV head's queries, then its key, then its value: qkv_heads is group + 2. Where attention has a gate, each query
    # is followed by its own: qkv_heads is 2 group + 2.
    qkv: Float[jax.Array, "*layers kv_heads qkv_heads head_dim embed"] | Quantized | None
    out: Float[jax.Array, "*layers embed kv_heads group head_dim"] | Quantized | None
    mlp_norm: Float[jax.Array, "*layers embed"] | None
    gate_up: Float[jax.Array, "*layers gates ffn embed"] | Quantized | None = None
    down: Float[jax.Array, "*layers embed ffn"] | Quantized | None = None
    qkv_bias: Float[jax.Array, "*layers kv_heads qkv_heads head_dim"] | None = None
    out_bias: Float[jax.Array, "*layers embed"] | None = None
    q_norm: Float[jax.Array, "*layers head_dim"] | None = None
    k_norm: Float[jax.Array, "*layers head_dim"] | None = None
    gate_up_bias: Float[jax.Array, "*layers gates ffn"] | None = None
    down_bias: Float[jax.Array, "*layers embed"] | None = None
    experts: Experts | None = None
    sinks: Float32[jax.Array, "*layers kv_heads group"] | None = None  # logits in the softmax's denominator
    recurrent: Recurrent | None = None

    @property
    def norm(self) -> jax.Array:
        """The layer's first norm."""
        first = self.mlp_norm if self.attn_norm is None else self.attn_norm
        assert first is not None
        return first

    @property
    def stacked(self) -> bool:
        """Whether this is a run of layers."""
        return self.norm.ndim > 1


@struct.dataclass
class PackedLayers:
    """A run of layers in the order in which the CPU kernel reads them; what a model lacks has no outputs.

    A weight is [layers, panels, inputs, panel]: a panel of outputs lies together, input by input. Half of each panel of
    `gate_up` is gate, half is up. Biases are in the order of their weight's panels. Of layers with experts, `gate_up`
    and `down` are the shared ones'.
    """

    attn_norm: Float32[jax.Array, "layers embed"]
    qkv: Float32[jax.Array, "layers qkv_panels embed panel"] | QuantizedPanels
    qkv_bias: Float32[jax.Array, "layers qkv_outputs"]
    q_norm: Float32[jax.Array, "layers q_norm"]
    k_norm: Float32[jax.Array, "layers k_norm"]
    out: Float32[jax.Array, "layers embed_panels heads_dim panel"] | QuantizedPanels
    out_bias: Float32[jax.Array, "layers out_outputs"]
    mlp_norm: Float32[jax.Array, "layers embed"]
    gate_up: Float32[jax.Array, "layers ffn_panels embed panel"] | QuantizedPanels
    gate_up_bias: Float32[jax.Array, "layers gate_up_outputs"]
    down: Float32[jax.Array, "layers embed_panels ffn panel"] | QuantizedPanels
    down_bias: Float32[jax.Array, "layers down_outputs"]
    router: Float32[jax.Array, "layers router_panels embed panel"]
    router_bias: Float32[jax.Array, "layers router_outputs"]
    correction: Float32[jax.Array, "layers correction"]
    experts_gate_up: Float32[jax.Array, "layers experts expert_panels embed panel"] | QuantizedPanels
    experts_gate_up_bias: Float32[jax.Array, "layers experts expert_outputs"]
    experts_down: Float32[jax.Array, "layers experts down_panels expert_ffn panel"] | QuantizedPanels
    experts_down_bias: Float32[jax.Array, "layers experts expert_down_outputs"]
    sinks: Float32[jax.Array, "layers sinks"]


@struct.dataclass
class Params:
    """A whole model: its layers in stacked runs, or apart as `unstacked` makes them, or packed for the CPU kernels.

    Where the layers are packed, so are the embedding and the head: [panels, embed, panel].
    """

    embed: Float[jax.Array, "vocab embed"] | Quantized | Float32[jax.Array, "panels embed panel"]
    layers: tuple[Layer | PackedLayers, ...]
    final_norm: Float[jax.Array, "embed"]
    # None where the embedding is tied.
    lm_head: Float[jax.Array, "vocab embed"] | Quantized | Float32[jax.Array, "panels embed panel"] | None = None

    @property
    def packed(self) -> bool:
        """Whether the weights are packed for the CPU kernels."""
        return isinstance(self.layers[0], PackedLayers)

    @property
    def runs(self) -> tuple[Layer, ...]:
        """The layers where they are not packed."""
        return typing.cast(tuple[Layer, ...], self.layers)


def unstacked(params: Params) -> Params:
    """The same weights with each Layer of `layers` by itself.

    On a CPU, XLA copies the slice of a stacked weight on every layer of a scan, which halves the speed of decode; with
    separate arrays it reads each weight once. On an H200 stacked weights decode as fast, and compile faster
    (`make gpu-bench`).
    """
    if params.packed:
        return params
    return dataclasses.replace(params, layers=tuple(layer for run in params.runs for layer in _layers_of(run)))


def _layers_of(run: Layer) -> list[Layer]:
    """The layers of a run, or the one that is apart already."""
    if not run.stacked:
        return [run]
    leaves, structure = jax.tree.flatten(run)
    if all(device.platform == "cpu" for leaf in leaves for device in leaf.devices()):
        leaves = [_apart(leaf) for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*leaves, strict=True)]


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
