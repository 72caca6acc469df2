"""The forward pass: all families are one decoder, of layers of a few kinds, with optional parts.

`forward` is a pure function over a ragged batch, the paged KV pool and, where layers are recurrent, their states;
prefill chunks and decode tokens are the same to it. Compilation and donation happen in `serve/engine/steps.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Float32, Int32

from model import kv, recurrent, rope, sharding
from model.attention import paged_attention
from model.batch import NO_WINDOW, Array, Batch, locate
from model.config import NO_ROPE, LayerKind, ModelConfig
from model.experts import chosen_bias, gated, mixture
from model.kernels.cpu.layers import embedding, logits, run_layers
from model.kv import KVPool
from model.linear import biased, linear, product
from model.norm import rms_norm
from model.params import Layer, PackedLayers, Params
from model.quantized import Quantized, floats, rows_of
from model.states import States, Trail


class Memory(NamedTuple):
    """What layers write to, besides the tokens' features: the pool, and of recurrent layers states or a trail."""

    pool: KVPool
    states: States | None = None
    trail: Trail | None = None  # where there is one, states are only read


Carry = tuple[Float[jax.Array, "tokens embed"], Memory]
# A layer, its number among those that mix tokens as it does, and the keys that each of its queries sees (None: all).
LayerStep = Callable[[Carry, Layer, jax.Array | int, jax.Array | int | None], Carry]
Carried = TypeVar("Carried")
Logits = Float32[jax.Array, "logits vocab"]


@overload
def forward(
    params: Params, batch: Batch, pool: KVPool, config: ModelConfig, mesh: sharding.AnyMesh | None = None
) -> tuple[Logits, KVPool]: ...
@overload
def forward(
    params: Params, batch: Batch, pool: KVPool, config: ModelConfig, mesh: sharding.AnyMesh | None, states: States
) -> tuple[Logits, KVPool, States]: ...
def forward(
    params: Params,
    batch: Batch,
    pool: KVPool,
    config: ModelConfig,
    mesh: sharding.AnyMesh | None = None,
    states: States | None = None,
) -> tuple[Logits, KVPool] | tuple[Logits, KVPool, States]:
    """The logits of the tokens `batch.logit_indices`, and the pool with the new tokens' keys and values written.

    With a mesh, params and pool are divided over its devices (`model/sharding.py`), and the logits are on all of them.
    A model with recurrent layers takes its states, too, and returns them with the slots `batch.writes` written, each
    from what the sequence's slot of `batch.reads` held before the call. Raises ValueError where states are missing.
    """
    if states is not None or config.recurrent_layers:
        found, memory = forward_hybrid(params, batch, Memory(pool, states), config)
        assert memory.states is not None
        return found, memory.pool, memory.states
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


def forward_draft(
    params: Params, batch: Batch, pool: KVPool, config: ModelConfig, states: States
) -> tuple[Logits, KVPool, Trail]:
    """The same for tokens of which some may be taken back: states are only read, and `settle` writes them later."""
    tokens = len(batch.tokens)
    sizes = config.recurrent
    if sizes is None:
        raise ValueError(f"a {config.family} model has no recurrent layers, expected some to take tokens back from")
    gates = recurrent.gate_count(config)
    trail = Trail(*(jnp.zeros((config.recurrent_layers, tokens, size)) for size in (sizes.channels, gates)))
    found, memory = forward_hybrid(params, batch, Memory(pool, states, trail), config)
    assert memory.trail is not None
    return found, memory.pool, memory.trail


def settle(
    params: Params,
    batch: Batch,
    counts: Int32[Array, "seqs"],
    trail: Trail,
    states: States,
    config: ModelConfig,
) -> States:
    """Write the states after the first `counts` new tokens of each sequence of a batch that `forward_draft` ran.

    The slots that it read must hold what they held then. Of the model's work only the recurrences are done again. A
    sequence of which no token counts writes nothing.
    """
    lengths, sizes = jnp.minimum(jnp.asarray(counts), batch.lengths), config.recurrent
    assert sizes is not None

    def step(states: States, layer: Layer, index: jax.Array | int, window: jax.Array | int | None) -> States:
        if layer.recurrent is None:
            return states
        before = recurrent.read_states(states, index, batch)
        conv, gates = trail.conv[index], trail.gates[index]
        _, after = recurrent.run(layer.recurrent, conv, gates, batch, lengths, before, sizes)
        return recurrent.write_states(states, index, batch, lengths, after)

    return over_layers(step, states, params.runs, config.active_layers)


def forward_part(
    params: Params, batch: Batch, pool: KVPool, config: ModelConfig, summed: sharding.Collective
) -> tuple[Logits, KVPool]:
    """One device's part of `forward`; `summed` adds up what each device has computed with its heads and its ffn."""
    if params.packed:
        positions, _, _ = locate(batch, pool)
        cos, sin = rope.angles(positions, *rope.inverse_frequencies(config.rope, config.head_dim))
        x = embedding(params.embed, batch.tokens)
        for run, numbers in zip(params.layers, config.runs, strict=True):
            assert isinstance(run, PackedLayers)
            x, pool = run_layers(x, run, numbers.start, pool, batch, cos, sin, config)
        head = params.embed if params.lm_head is None else params.lm_head
        return logits(x, batch.logit_indices, params.final_norm, head, config.vocab_size, config.norm_eps), pool
    found, memory = by_layers(params, batch, Memory(pool), config, summed)
    return found, memory.pool


def forward_hybrid(params: Params, batch: Batch, memory: Memory, config: ModelConfig) -> tuple[Logits, Memory]:
    """The forward pass of a model with recurrent layers, on one device."""
    if memory.states is None or batch.reads is None or batch.writes is None:
        raise ValueError(f"a {config.family} model has recurrent layers: expected states, and a batch with their slots")
    return by_layers(params, batch, memory, config, lambda x: x)


def by_layers(
    params: Params, batch: Batch, memory: Memory, config: ModelConfig, summed: sharding.Collective
) -> tuple[Logits, Memory]:
    """The logits and the memory after all layers, for weights that are not packed."""
    positions, pages, offsets = locate(batch, memory.pool)
    real = jnp.arange(batch.tokens.shape[0]) < batch.starts[-1]
    rotate = rotation(positions, config)

    def step(carry: Carry, layer: Layer, index: jax.Array | int, window: jax.Array | int | None) -> Carry:
        x, memory = carry
        if layer.recurrent is not None:
            mixed, memory = recur(layer, x, memory, index, batch, config)
            x = x + mixed
        elif layer.qkv is not None:
            q, k, v, gate = project(layer, x, config)
            q, k = rotate(q), rotate(k)
            pool = kv.write(memory.pool, index, k, v, pages, offsets)
            attended = paged_attention(q, k, v, pool, index, batch, window, layer.sinks)
            memory = memory._replace(pool=pool)
            if gate is not None:
                attended = attended * jax.nn.sigmoid(gate)
            assert layer.out is not None
            out = linear(attended.reshape(x.shape[0], -1), floats(layer.out, x.dtype).reshape(x.shape[1], -1), None)
            x = x + biased(summed(out), layer.out_bias)
        return x if layer.mlp_norm is None else x + mlp(layer, x, real, config, summed), memory

    divided = params.embed.shape[0] < config.vocab_size  # its rows, over devices
    x = embedded(params, batch.tokens, divided)
    x, memory = over_layers(step, (x, memory), params.runs, config.active_layers)
    x = rms_norm(x[batch.logit_indices], params.final_norm, config.norm_eps, config.centred_norms)
    head = params.embed if params.lm_head is None else params.lm_head
    found = product(x, floats(head, x.dtype), jnp.float32)
    return sharding.gathered(found) if divided else found, memory


def rotation(positions: Int32[jax.Array, "tokens"], config: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    """The rotation of queries or keys, [tokens, *heads, head_dim], at these positions."""
    if config.rope.kind == NO_ROPE:
        return lambda x: x
    cos, sin = rope.angles(positions, *rope.inverse_frequencies(config.rope, config.head_dim))
    return partial(rope.rotate, cos=cos, sin=sin)


def recur(
    layer: Layer,
    x: Float[jax.Array, "tokens embed"],
    memory: Memory,
    index: jax.Array | int,
    batch: Batch,
    config: ModelConfig,
) -> tuple[Float[jax.Array, "tokens embed"], Memory]:
    """What a recurrent layer makes of tokens, and the memory with its states, or with its trail."""
    sizes, states, trail = config.recurrent, memory.states, memory.trail
    assert layer.recurrent is not None
    assert layer.attn_norm is not None
    assert sizes is not None
    assert states is not None
    normed = rms_norm(x, layer.attn_norm, config.norm_eps, config.centred_norms)
    projected = recurrent.project(layer.recurrent, normed, sizes)
    before, lengths = recurrent.read_states(states, index, batch), jnp.asarray(batch.lengths)
    conv, gates = projected.conv, projected.gates
    read, after = recurrent.run(layer.recurrent, conv, gates, batch, lengths, before, sizes)
    if trail is None:
        memory = memory._replace(states=recurrent.write_states(states, index, batch, lengths, after))
    else:
        memory = memory._replace(trail=Trail(trail.conv.at[index].set(conv), trail.gates.at[index].set(gates)))
    return recurrent.finish(layer.recurrent, read, projected.norm_gate, sizes, config.norm_eps, x.dtype), memory


def over_layers(
    step: Callable[[Carried, Layer, jax.Array | int, jax.Array | int | None], Carried],
    carry: Carried,
    layers: Sequence[Layer],
    kinds: Sequence[LayerKind],
) -> Carried:
    """Fold `step(carry, layer, index, window)` over layers: a scan for each stacked run, and separate ones unrolled.

    The index of a layer is its number among those that mix tokens as it does.
    """
    once = jax.jit(step)  # a call for each layer: traced and lowered once for each kind, and inlined by XLA
    first = 0
    for run in layers:
        count = len(run.norm) if run.stacked else 1
        windows = [kind.window for kind in kinds[first : first + count]]
        index = sum(kind.mixer == kinds[first].mixer for kind in kinds[:first])
        if run.stacked:
            indices = jnp.arange(index, index + count, dtype=jnp.int32)
            carry, _ = jax.lax.scan(lambda c, xs: (step(c, *xs), None), carry, (run, indices, as_array(windows)))
        else:
            carry = once(carry, run, index, windows[0])
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
    Float[jax.Array, "tokens kv_heads group head_dim"] | None,
]:
    """Queries, keys and values, before rotation, and the gate's logits if attention has one."""
    assert layer.attn_norm is not None
    assert layer.qkv is not None
    eps, centred = config.norm_eps, config.centred_norms
    normed = rms_norm(x, layer.attn_norm, eps, centred)
    qkv = linear(normed, layer.qkv, layer.qkv_bias)  # [tokens, kv_heads, qkv_heads, head_dim]
    q, k, v, gate = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1], None
    if config.query_gate:
        q, gate = q[:, :, ::2], q[:, :, 1::2]
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, eps, centred), rms_norm(k, layer.k_norm, eps, centred)
    return q, k, v, gate


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
    assert layer.mlp_norm is not None
    normed = rms_norm(x, layer.mlp_norm, config.norm_eps, config.centred_norms)
    if layer.experts is not None and config.experts is not None:
        mixed, choice = mixture(layer.experts, normed, real, config.experts)
        return summed(mixed) + chosen_bias(layer.experts.down_bias, choice, x.dtype)
    assert layer.gate_up is not None
    assert layer.down is not None
    units = gated(linear(normed, layer.gate_up, layer.gate_up_bias))
    return biased(summed(linear(units, layer.down, None)), layer.down_bias)
