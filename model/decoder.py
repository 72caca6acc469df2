"""The forward pass: all families are one decoder, of layers of a few kinds, with optional parts.

`forward` is a pure function over a ragged batch and the paged KV pool; prefill chunks and decode tokens are the same to
it. Compilation and donation happen in `serve/engine/steps.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Float32, Int32

from model import kv, rope, sharding
from model.attention import paged_attention
from model.batch import NO_WINDOW, Array, Batch, locate
from model.config import LayerKind, ModelConfig
from model.experts import chosen_bias, gated, mixture
from model.kernels.cpu.layers import embedding, logits, run_layers
from model.kv import KVPool
from model.linear import biased, linear, product
from model.params import Layer, PackedLayers, Params
from model.quantized import Quantized, floats, rows_of

Carry = tuple[Float[jax.Array, "tokens embed"], KVPool]
# A layer, its number, and the keys that each of its queries sees (None: all).
LayerStep = Callable[[Carry, Layer, jax.Array | int, jax.Array | int | None], Carry]


def forward(
    params: Params, batch: Batch, pool: KVPool, config: ModelConfig, mesh: sharding.AnyMesh | None = None
) -> tuple[Float32[jax.Array, "logits vocab"], KVPool]:
    """The logits of the tokens `batch.logit_indices`, and the pool with the new tokens' keys and values written.

    With a mesh, params and pool are divided over its devices (`model/sharding.py`), and the logits are on all of them.
    """
    if mesh is None:
        return forward_part(params, batch, pool, config, lambda x: x)
    part = partial(forward_part, config=config, summed=sharding.summed)
    replicated, pool_specs = PartitionSpec(), sharding.partition_specs(pool, mesh)
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(sharding.partition_specs(params, mesh), replicated, pool_specs),
        out_specs=(replicated, pool_specs),
        check_vma=False,  # which calls of kernels do not state
    )(params, batch, pool)


def forward_part(
    params: Params, batch: Batch, pool: KVPool, config: ModelConfig, summed: sharding.Collective
) -> tuple[Float32[jax.Array, "logits vocab"], KVPool]:
    """One device's part of `forward`; `summed` adds up what each device has computed with its heads and its ffn."""
    positions, pages, offsets = locate(batch, pool)
    cos, sin = rope.angles(positions, *rope.inverse_frequencies(config.rope, config.head_dim))
    if params.packed:
        x = embedding(params.embed, batch.tokens)
        for run, numbers in zip(params.layers, config.runs, strict=True):
            assert isinstance(run, PackedLayers)
            x, pool = run_layers(x, run, numbers.start, pool, batch, cos, sin, config)
        head = params.embed if params.lm_head is None else params.lm_head
        return logits(x, batch.logit_indices, params.final_norm, head, config.vocab_size, config.norm_eps), pool

    real = jnp.arange(batch.tokens.shape[0]) < batch.starts[-1]

    def step(carry: Carry, layer: Layer, index: jax.Array | int, window: jax.Array | int | None) -> Carry:
        x, pool = carry
        q, k, v = project(layer, x, config)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        pool = kv.write(pool, index, k, v, pages, offsets)
        attended = paged_attention(q, k, v, pool, index, batch, window, layer.sinks)
        out = linear(attended.reshape(x.shape[0], -1), floats(layer.out, x.dtype).reshape(x.shape[1], -1), None)
        x = x + biased(summed(out), layer.out_bias)
        return x + mlp(layer, x, real, config, summed), pool

    divided = params.embed.shape[0] < config.vocab_size  # its rows, over devices
    x = embedded(params, batch.tokens, divided)
    x, pool = over_layers(step, (x, pool), params.runs, config.active_layers)
    x = rms_norm(x[batch.logit_indices], params.final_norm, config.norm_eps)
    head = params.embed if params.lm_head is None else params.lm_head
    found = product(x, floats(head, x.dtype), jnp.float32)
    return sharding.gathered(found) if divided else found, pool


def over_layers(step: LayerStep, carry: Carry, layers: Sequence[Layer], kinds: Sequence[LayerKind]) -> Carry:
    """Fold `step(carry, layer, index, window)` over layers: a scan for each stacked run, and separate ones unrolled."""
    once = jax.jit(step)  # a call for each layer: traced and lowered once for each kind, and inlined by XLA
    first = 0
    for run in layers:
        count = len(run.attn_norm) if run.stacked else 1
        windows = [kind.window for kind in kinds[first : first + count]]
        if run.stacked:
            indices = jnp.arange(first, first + count, dtype=jnp.int32)
            carry, _ = jax.lax.scan(lambda c, xs: (step(c, *xs), None), carry, (run, indices, as_array(windows)))
        else:
            carry = once(carry, run, first, windows[0])
        first += count
    return carry


def as_array(windows: Sequence[int | None]) -> Int32[jax.Array, "layers"] | None:
    """The windows of layers of which one has a window."""
    if all(window is None for window in windows):
        return None
    return jnp.asarray([NO_WINDOW if window is None else window for window in windows], jnp.int32)


def embedded(params: Params, tokens: Int32[Array, "tokens"], divided: bool) -> Float[jax.Array, "tokens embed"]:
    """The embeddings of tokens, in the dtype of the norms where their table is quantised."""
    table = params.embed
    if isinstance(table, Quantized):
        return rows_of(table, tokens, params.final_norm.dtype)
    return sharding.embedded(table, tokens) if divided else table[tokens]


def project(
    layer: Layer, x: Float[jax.Array, "tokens embed"], config: ModelConfig
) -> tuple[
    Float[jax.Array, "tokens kv_heads group head_dim"],
    Float[jax.Array, "tokens kv_heads head_dim"],
    Float[jax.Array, "tokens kv_heads head_dim"],
]:
    """Queries, keys and values, before rotation."""
    normed = rms_norm(x, layer.attn_norm, config.norm_eps)
    qkv = linear(normed, layer.qkv, layer.qkv_bias)  # [tokens, kv_heads, group + 2, head_dim]
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, config.norm_eps), rms_norm(k, layer.k_norm, config.norm_eps)
    return q, k, v


def mlp(
    layer: Layer,
    x: Float[jax.Array, "tokens embed"],
    real: Bool[jax.Array, "tokens"],
    config: ModelConfig,
    summed: sharding.Collective,
) -> Float[jax.Array, "tokens embed"]:
    """The gated feed-forward block, or the experts that each real token goes through.

    A bias of `down` is added once, after the sum over devices.
    """
    normed = rms_norm(x, layer.mlp_norm, config.norm_eps)
    if layer.experts is not None and config.experts is not None:
        mixed, choice = mixture(layer.experts, normed, real, config.experts)
        return summed(mixed) + chosen_bias(layer.experts.down_bias, choice, x.dtype)
    assert layer.gate_up is not None
    assert layer.down is not None
    units = gated(linear(normed, layer.gate_up, layer.gate_up_bias))
    return biased(summed(linear(units, layer.down, None)), layer.down_bias)


def rms_norm(
    x: Float[jax.Array, "*rest size"], weight: Float[jax.Array, "size"], eps: float
) -> Float[jax.Array, "*rest size"]:
    """Root-mean-square norm over the last axis, in float32 (Zhang and Sennrich, https://arxiv.org/abs/1910.07467)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight
