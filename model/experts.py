"""A mixture of experts: each token goes through a few of many feed-forward blocks, which a router chooses for it.

Sparsely gated experts are Shazeer et al., 2017, https://arxiv.org/abs/1701.06538; the sigmoid's scores, the correction
of the choice and the groups are DeepSeek-V3's, https://arxiv.org/abs/2412.19437, section 2.1.2. Tokens are sorted by
expert, and a block of them is multiplied by the weights of its expert alone. `jax.lax.ragged_dot` does that on TPUs;
on CPUs and, unless told otherwise, on GPUs JAX lowers it to a product of every token with every expert.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int32

from model.config import ExpertsConfig
from model.kernels.dispatch import on_cpu
from model.linear import linear, product
from model.params import Experts

BLOCK = 128  # tokens of one expert that are multiplied together, at most


class Choice(NamedTuple):
    """The experts that each token goes through."""

    experts: Int32[jax.Array, "tokens per_token"]
    weights: Float32[jax.Array, "tokens per_token"]


class Blocks(NamedTuple):
    """Pairs of a token and one of its experts, sorted by expert, in blocks of one expert each."""

    pairs: Int32[jax.Array, "pairs"]  # the number of each, token * per_token + which of the token's; padding is last
    experts: Int32[jax.Array, "blocks"]
    # The first pair of each; a block may end among pairs of the next, and one that is not used is after all pairs.
    starts: Int32[jax.Array, "blocks"]
    used: Int32[jax.Array, ""]  # blocks


def mixture(
    experts: Experts,
    x: Float[jax.Array, "tokens embed"],
    real: Bool[jax.Array, "tokens"],
    config: ExpertsConfig,
) -> tuple[Float[jax.Array, "tokens embed"], Choice]:
    """What a token's experts make of it, by their weights, with what the shared ones do; and the choice.

    Without the biases of `down`, which `chosen_bias` adds after the sum over devices. Tokens that are not real take no
    expert's place; they get anything finite.
    """
    choice = choose(experts, x, config)
    tokens, per_token = choice.experts.shape
    blocks = in_blocks(jnp.where(real[:, None], choice.experts, config.count), config.count)
    size = block_size(tokens * per_token, config.count)
    inner = x if experts.latent_in is None else linear(x, experts.latent_in, None)
    rows = jnp.pad(inner[blocks.pairs // per_token], ((0, size), (0, 0)))  # so that the last block has as many

    def block(number: jax.Array, made: jax.Array) -> jax.Array:
        start = blocks.starts[number]
        found = expert(experts, blocks.experts[number], jax.lax.dynamic_slice_in_dim(rows, start, size), config)
        # What is beyond the expert's last pair is overwritten by the next block.
        return jax.lax.dynamic_update_slice_in_dim(made, found, start, 0)

    # A GPU would wait for its host in each turn of a loop whose length is not known before; a CPU computes less.
    count = blocks.used if on_cpu() else len(blocks.experts)
    made = jax.lax.fori_loop(0, count, block, jnp.zeros_like(rows))
    order = jnp.zeros_like(blocks.pairs).at[blocks.pairs].set(jnp.arange(tokens * per_token, dtype=jnp.int32))
    by_token = made[order].reshape(tokens, per_token, -1)
    mixed = jnp.einsum("tn,tne->te", choice.weights, by_token.astype(jnp.float32)).astype(x.dtype)
    if experts.latent_out is not None:
        mixed = linear(mixed, experts.latent_out, None)
    if experts.shared_gate_up is not None and experts.shared_down is not None:
        shared = linear(gated(linear(x, experts.shared_gate_up, None)), experts.shared_down, None)
        if experts.shared_gate is not None:
            shared *= jax.nn.sigmoid(linear(x, experts.shared_gate, None))
        mixed += shared
    return mixed, choice


def choose(experts: Experts, x: Float[jax.Array, "tokens embed"], config: ExpertsConfig) -> Choice:
    """The best experts of each token by the router's scores, in float32; of equal ones, the first."""
    logits = product(x.astype(jnp.float32), experts.router.astype(jnp.float32), jnp.float32)
    if experts.router_bias is not None:
        logits += experts.router_bias.astype(jnp.float32)
    scores = jax.nn.sigmoid(logits) if config.scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    ranked = scores if config.scoring == "sigmoid" else logits  # whose order softmax keeps, but for rounding
    if experts.correction is not None:
        ranked = scores + experts.correction
    if config.groups > 1:
        ranked = jnp.where(in_best_groups(ranked, config), ranked, -jnp.inf)
    _, chosen = jax.lax.top_k(ranked, config.per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.renormalize:
        weights /= jnp.sum(weights, axis=-1, keepdims=True) + (1e-20 if config.scoring == "sigmoid" else 0)
    return Choice(chosen.astype(jnp.int32), weights * config.scaling)


def in_best_groups(
    ranked: Float32[jax.Array, "tokens experts"], config: ExpertsConfig
) -> Bool[jax.Array, "tokens experts"]:
    """Whether an expert is in one of its token's best groups: those whose best two have the largest sum."""
    grouped = ranked.reshape(len(ranked), config.groups, -1)
    of_groups = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
    _, best = jax.lax.top_k(of_groups, config.chosen_groups)
    allowed = (best[:, :, None] == jnp.arange(config.groups)).any(1)  # [tokens, groups]
    return jnp.repeat(allowed, grouped.shape[-1], axis=-1)


def in_blocks(experts: Int32[jax.Array, "tokens per_token"], count: int) -> Blocks:
    """The pairs sorted by expert, and the blocks that they make; an expert of number `count` is none."""
    pairs = experts.size
    flat = experts.reshape(-1)
    of_expert = jnp.sum(flat[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    size = block_size(pairs, count)
    blocks = -(-of_expert // size)  # of each expert
    ends = jnp.cumsum(blocks)
    most = min(pairs, pairs // size + count)
    numbers = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends, numbers, side="right", method="compare_all"), count - 1)
    firsts = jnp.cumsum(of_expert) - of_expert
    starts = firsts[expert] + (numbers - (ends - blocks)[expert]) * size
    return Blocks(
        pairs=jnp.argsort(flat, stable=True).astype(jnp.int32),
        experts=expert.astype(jnp.int32),
        starts=jnp.where(numbers < ends[-1], starts, pairs).astype(jnp.int32),
        used=ends[-1].astype(jnp.int32),
    )


def block_size(pairs: int, count: int) -> int:
    """Pairs of a block: about as many as an expert gets, a power of two, so that few are wasted."""
    size = 1
    while size < BLOCK and size * count < pairs:
        size *= 2
    return size


def expert(
    experts: Experts, number: Int32[jax.Array, ""], x: Float[jax.Array, "rows inner"], config: ExpertsConfig
) -> Float[jax.Array, "rows inner"]:
    """What one expert makes of rows, without the bias of `down`."""
    gate_up, down, bias = jax.tree.map(lambda each: each[number], (experts.gate_up, experts.down, experts.gate_up_bias))
    return linear(gated(linear(x, gate_up, bias), config.clamp), down, None)


def gated(
    gate_up: Float[jax.Array, "rows gates ffn"], clamp: tuple[float, float] | None = None
) -> Float[jax.Array, "rows ffn"]:
    """The gate's SiLU times up (SwiGLU, Shazeer, 2020, https://arxiv.org/abs/2002.05202).

    Without a gate it is the square of up where that is positive (So et al., 2021, https://arxiv.org/abs/2109.08668).
    With `clamp` (a factor within the sigmoid, and a limit) it is gpt-oss': both are limited, and up is one more
    (https://huggingface.co/docs/transformers/model_doc/gpt_oss).
    """
    if gate_up.shape[1] == 1:
        return jnp.square(jax.nn.relu(gate_up[:, 0]))
    gate, up = gate_up[:, 0], gate_up[:, 1]
    if clamp is None:
        return jax.nn.silu(gate) * up
    factor, limit = clamp
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(factor * gate)


def chosen_bias(
    bias: Float[jax.Array, "experts embed"] | None, choice: Choice, dtype: DTypeLike
) -> Float[jax.Array, "tokens embed"] | float:
    """The biases of the chosen experts' `down`, by their weights."""
    if bias is None:
        return 0.0
    return jnp.einsum("tn,tne->te", choice.weights, bias.astype(jnp.float32)[choice.experts]).astype(dtype)
