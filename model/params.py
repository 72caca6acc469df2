"""The weights as a pytree: what the loader writes and the decoder reads.

Matrices keep the checkpoint's orientation, outputs before inputs, so loading never transposes. Projections that read
the same input are fused; queries, key and value of one KV head lie together, so a mesh can split them along one axis.
Letters in einsums, throughout the model: l layers, t tokens, e embed, k kv heads, g group (query heads
per KV head), d head_dim, f ffn, v vocab.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import struct
from jaxtyping import Float


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
class Params:
    """A whole model. `layers` is one stacked Layer, or a tuple of them as `unstacked` makes it."""

    embed: Float[jax.Array, "vocab embed"]
    layers: Layer | tuple[Layer, ...]
    final_norm: Float[jax.Array, "embed"]
    lm_head: Float[jax.Array, "vocab embed"] | None = None  # None where the embedding is tied


def unstacked(params: Params) -> Params:
    """The same weights with `layers` as a tuple, one Layer each.

    On a CPU, XLA copies the slice of a stacked weight on every layer of a scan, which halves the speed of decode; with
    separate arrays it reads each weight once. On an H200 stacked weights decode as fast, and compile faster
    (`make gpu-bench`).
    """
    if isinstance(params.layers, tuple):
        return params
    leaves, structure = jax.tree.flatten(params.layers)
    layers = tuple(jax.tree.unflatten(structure, layer) for layer in zip(*leaves, strict=True))
    return dataclasses.replace(params, layers=layers)
