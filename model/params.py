"""The weights as a pytree: what the loader writes, the decoder reads and the mesh shards.

Matrices keep the checkpoint's orientation, outputs before inputs, so loading never transposes. Projections that read
the same input are fused; queries, key and value of one KV head lie together, so a mesh splits them along one axis.
Letters in shapes and einsums, throughout the model: l layers, t tokens, e embed, k kv heads, g group (query heads
per KV head), d head_dim, f ffn, v vocab.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import struct


@struct.dataclass
class Layer:
    """One decoder layer; with a leading `layers` axis on every field when stacked."""

    attn_norm: jax.Array  # [embed]
    qkv: jax.Array  # [kv_heads, group + 2, head_dim, embed]: a KV head's queries, then its key, then its value
    out: jax.Array  # [embed, kv_heads, group, head_dim]
    mlp_norm: jax.Array  # [embed]
    gate_up: jax.Array  # [2, ffn, embed]
    down: jax.Array  # [embed, ffn]
    qkv_bias: jax.Array | None = None  # [kv_heads, group + 2, head_dim]
    out_bias: jax.Array | None = None  # [embed]
    q_norm: jax.Array | None = None  # [head_dim]
    k_norm: jax.Array | None = None  # [head_dim]
    gate_up_bias: jax.Array | None = None  # [2, ffn]
    down_bias: jax.Array | None = None  # [embed]


@struct.dataclass
class Params:
    """A whole model. `layers` is one stacked Layer, or a tuple of them as `unstacked` makes it."""

    embed: jax.Array  # [vocab, embed]
    layers: Layer | tuple[Layer, ...]
    final_norm: jax.Array  # [embed]
    lm_head: jax.Array | None = None  # [vocab, embed]; None where the embedding is tied


def unstacked(params: Params) -> Params:
    """The same weights with `layers` as a tuple, one Layer each.

    On a CPU, XLA copies the slice of a stacked weight on every layer of a scan, which halves the speed of decode; with
    separate arrays it reads each weight once. On an H200 a decoded token took no longer with stacked ones, and they
    compile faster (`experiments.gpu_bench`).
    """
    if isinstance(params.layers, tuple):
        return params
    leaves, structure = jax.tree.flatten(params.layers)
    layers = tuple(jax.tree.unflatten(structure, layer) for layer in zip(*leaves, strict=True))
    return dataclasses.replace(params, layers=layers)
