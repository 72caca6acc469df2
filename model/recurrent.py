"""The recurrent layers: gated delta nets (Yang et al., 2024, https://arxiv.org/abs/2412.06464) and Mamba-2 (Dao and Gu,
2024, https://arxiv.org/abs/2405.21060), as Qwen3-Next and Nemotron-H have them.

Both project a token, convolve it with those before it, run the recurrence of `linear_attention.py`, and norm and gate
what was read. A layer has of each sequence two states, the last inputs of the convolution and the recurrence's matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32

from model.batch import Batch, owners, split_prefill_decode
from model.config import DELTA_NET, ModelConfig, RecurrentConfig
from model.linear import linear
from model.linear_attention import Inputs, recurrence, step
from model.norm import rms_norm
from model.params import Recurrent
from model.states import States


class Projected(NamedTuple):
    """What a layer's projection makes of each token."""

    conv: Float32[jax.Array, "tokens channels"]  # inputs of the convolution
    gates: Float32[jax.Array, "tokens gates"]  # of each head: strength and decay, or the time step
    norm_gate: Float32[jax.Array, "tokens values"]


class State(NamedTuple):
    """One layer's states, by sequence."""

    conv: Float32[jax.Array, "seqs before channels"]
    recurrent: Float32[jax.Array, "seqs state_heads key_dim value_dim"]


def gate_count(config: ModelConfig) -> int:
    """Gates of a token, see `Projected`."""
    assert config.recurrent is not None
    return config.recurrent.heads * (2 if any(kind.mixer == DELTA_NET for kind in config.layers) else 1)


def project(layer: Recurrent, x: Float[jax.Array, "tokens embed"], sizes: RecurrentConfig) -> Projected:
    """The inputs of a layer's recurrence."""
    projected = linear(x, layer.proj_in, None).astype(jnp.float32)
    if layer.skip is not None:
        norm_gate, conv, gates = jnp.split(projected, [sizes.values, sizes.values + sizes.channels], axis=-1)
    else:
        conv, norm_gate, gates = jnp.split(projected, [sizes.channels, sizes.channels + sizes.values], axis=-1)
    return Projected(conv, gates, norm_gate)


def finish(
    layer: Recurrent,
    read: Float32[jax.Array, "tokens state_heads value_dim"],
    norm_gate: Float32[jax.Array, "tokens values"],
    sizes: RecurrentConfig,
    eps: float,
    dtype: jnp.dtype,
) -> Float[jax.Array, "tokens embed"]:
    """The layer's output, from what its recurrence has read: normed and gated, or gated and normed in Mamba-2."""
    gate, tokens = jax.nn.silu(norm_gate), len(read)
    if layer.skip is not None:
        grouped = (read.reshape(tokens, -1) * gate).reshape(tokens, sizes.key_heads, -1)
        normed = rms_norm(grouped, jnp.ones(grouped.shape[-1]), eps).reshape(tokens, -1) * layer.norm
    else:
        normed = rms_norm(read, layer.norm.astype(jnp.float32), eps).reshape(tokens, -1) * gate
    return linear(normed.astype(dtype), layer.proj_out, None)


def run(
    layer: Recurrent,
    conv: Float32[jax.Array, "tokens channels"],
    gates: Float32[jax.Array, "tokens gates"],
    batch: Batch,
    lengths: Int32[jax.Array, "seqs"],
    before: State,
    sizes: RecurrentConfig,
) -> tuple[Float32[jax.Array, "tokens state_heads value_dim"], State]:
    """What each token reads, and the states after the first `lengths` tokens of each sequence."""
    if not batch.decode_seqs:
        return run_alike(layer, conv, gates, batch, lengths, before, sizes)
    prefill, decode = split_prefill_decode(batch)
    cut = len(prefill.prefix)
    (of_prefill, first), (of_decode, last) = (
        run_alike(layer, conv, gates, part, lengths[seqs], State(*(each[seqs] for each in before)), sizes)
        for part, seqs in ((prefill, slice(0, cut)), (decode, slice(cut, None)))
    )
    in_prefill = (jnp.arange(len(conv)) < prefill.starts[-1])[:, None, None]
    after = State(*(jnp.concatenate(pair) for pair in zip(first, last, strict=True)))
    return jnp.where(in_prefill, of_prefill, of_decode), after


def run_alike(
    layer: Recurrent,
    conv: Float32[jax.Array, "tokens channels"],
    gates: Float32[jax.Array, "tokens gates"],
    batch: Batch,
    lengths: Int32[jax.Array, "seqs"],
    before: State,
    sizes: RecurrentConfig,
) -> tuple[Float32[jax.Array, "tokens state_heads value_dim"], State]:
    """The same for sequences that all decode, or all have chunks."""
    if batch.max_chunk == 1:
        return run_steps(layer, conv, gates, batch, before, sizes)
    convolved = jax.nn.silu(convolution(layer, conv, batch, before.conv))
    inputs = recurrence_inputs(layer, convolved, gates, sizes)
    read, recurrent = recurrence(inputs, batch, lengths, before.recurrent)
    return skipped(layer, read, convolved), State(last_inputs(conv, batch, lengths, before.conv), recurrent)


def run_steps(
    layer: Recurrent,
    conv: Float32[jax.Array, "tokens channels"],
    gates: Float32[jax.Array, "tokens gates"],
    batch: Batch,
    before: State,
    sizes: RecurrentConfig,
) -> tuple[Float32[jax.Array, "tokens state_heads value_dim"], State]:
    """The same for sequences with one token each; of one without, the state is anything."""
    at = jnp.clip(jnp.asarray(batch.starts)[:-1], 0, len(conv) - 1)
    window = jnp.concatenate([before.conv, conv[at][:, None]], axis=1)  # [seqs, width, channels]
    convolved = jnp.sum(window * layer.conv.astype(jnp.float32).T, axis=1)
    convolved = jax.nn.silu(convolved if layer.conv_bias is None else convolved + layer.conv_bias.astype(jnp.float32))
    read, recurrent = step(recurrence_inputs(layer, convolved, gates[at], sizes), before.recurrent)
    read = skipped(layer, read, convolved)
    return read[owners(batch, jnp.arange(len(conv), dtype=jnp.int32))], State(window[:, 1:], recurrent)


def skipped(
    layer: Recurrent,
    read: Float32[jax.Array, "tokens state_heads value_dim"],
    convolved: Float32[jax.Array, "tokens channels"],
) -> Float32[jax.Array, "tokens state_heads value_dim"]:
    """What was read, with a share of the token's own value in Mamba-2."""
    if layer.skip is None:
        return read
    values = convolved[:, : read.shape[1] * read.shape[2]].reshape(read.shape)
    return read + values * layer.skip[:, None]


def recurrence_inputs(
    layer: Recurrent,
    convolved: Float32[jax.Array, "tokens channels"],
    gates: Float32[jax.Array, "tokens gates"],
    sizes: RecurrentConfig,
) -> Inputs:
    """Queries, keys, values, decay and strength, from a token's convolved channels and its gates."""
    tokens, rate = len(convolved), -jnp.exp(layer.log_rate)
    if layer.skip is not None:
        values, keys, queries = jnp.split(convolved, [sizes.values, sizes.values + sizes.keys], axis=-1)
        steps = jnp.maximum(jax.nn.softplus(gates + layer.step_bias), sizes.min_step)
        decay, strength = steps * rate, None
    else:
        queries, keys, values = jnp.split(convolved, [sizes.keys, 2 * sizes.keys], axis=-1)
        strength, steps = jax.nn.sigmoid(gates[:, : sizes.heads]), gates[:, sizes.heads :]
        decay = jax.nn.softplus(steps + layer.step_bias) * rate
    queries, keys = (x.reshape(tokens, sizes.key_heads, sizes.key_dim) for x in (queries, keys))
    values = values.reshape(tokens, sizes.heads, sizes.value_dim)
    if layer.skip is not None:
        return Inputs(queries, keys, values * steps[..., None], decay, strength)
    return Inputs(unit(queries) * sizes.key_dim**-0.5, unit(keys), values, decay, strength)


def unit(x: Float32[jax.Array, "*rest size"]) -> Float32[jax.Array, "*rest size"]:
    """Vectors of length one, as Qwen3-Next has them: short ones stay shorter."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def convolution(
    layer: Recurrent,
    x: Float32[jax.Array, "tokens channels"],
    batch: Batch,
    before: Float32[jax.Array, "seqs before channels"],
) -> Float32[jax.Array, "tokens channels"]:
    """A weighted sum of each token's channels and those of the tokens before it; `before` come before the batch's."""
    weight = layer.conv.astype(jnp.float32).T  # [width, channels], the oldest first
    (tokens, _), (seqs, past, _) = x.shape, before.shape
    if seqs == 1:  # its tokens are the batch's first
        longer = jnp.concatenate([before[0], x])
        found = weight[past] * x
        for i in range(past):
            found += weight[i] * longer[i : i + tokens]
    else:
        seq = owners(batch, jnp.arange(tokens, dtype=jnp.int32))
        place = jnp.arange(tokens) - jnp.asarray(batch.starts)[seq]  # in its sequence
        found = weight[past] * x
        for back in range(1, past + 1):
            earlier = jnp.pad(x, ((back, 0), (0, 0)))[:tokens]
            kept = before[seq, jnp.clip(past + place - back, 0, past - 1)]
            found += weight[past - back] * jnp.where((place >= back)[:, None], earlier, kept)
    return found if layer.conv_bias is None else found + layer.conv_bias.astype(jnp.float32)


def last_inputs(
    x: Float32[jax.Array, "tokens channels"],
    batch: Batch,
    lengths: Int32[jax.Array, "seqs"],
    before: Float32[jax.Array, "seqs before channels"],
) -> Float32[jax.Array, "seqs before channels"]:
    """The convolution's last inputs after the first `lengths` tokens of each sequence."""
    past = before.shape[1]
    place = lengths[:, None] - past + jnp.arange(past)  # [seqs, before], in its sequence
    new = x[jnp.clip(jnp.asarray(batch.starts)[:-1, None] + place, 0, len(x) - 1)]
    old = jnp.take_along_axis(before, jnp.clip(past + place, 0, past - 1)[..., None], axis=1)
    return jnp.where((place >= 0)[..., None], new, old)


def read_states(states: States, layer: jax.Array | int, batch: Batch) -> State:
    """A layer's states that the sequences of a batch go on from: zeros before the first token.

    They are scattered to an array of their own, which XLA does not fuse with what uses them. If it read the slots again
    in each use, nothing would say that all of those come before the write, and XLA would copy all slots.
    """
    assert batch.reads is not None
    slots, prefix = jnp.asarray(batch.reads), jnp.asarray(batch.prefix)
    seqs, rows = len(slots), max(2, len(slots))  # a single row would not be scattered
    slots, prefix = (jnp.resize(each, (rows,)) for each in (slots, prefix))
    places = jnp.where(prefix > 0, jnp.arange(rows), rows)  # a row of zeros stays where nothing is put

    def taken(array: jax.Array) -> jax.Array:
        found = array.at[layer, slots].get(mode="clip")
        return jnp.zeros_like(found).at[places].set(found, mode="drop")[:seqs]

    return State(taken(states.conv), taken(states.recurrent))


def write_states(
    states: States, layer: jax.Array | int, batch: Batch, lengths: Int32[jax.Array, "seqs"], after: State
) -> States:
    """Write a layer's states to the slots of their sequences; a sequence without new tokens writes nothing."""
    assert batch.writes is not None
    slots = jnp.where(lengths > 0, batch.writes, states.num_slots)
    if len(slots) == 1:  # as two rows, so that it stays a scatter, which is a pass of its own
        slots = jnp.concatenate([slots, jnp.full(1, states.num_slots, slots.dtype)])
        after = State(*(jnp.concatenate([each, each]) for each in after))
    return States(
        states.conv.at[layer, slots].set(after.conv, mode="drop"),
        states.recurrent.at[layer, slots].set(after.recurrent, mode="drop"),
    )
