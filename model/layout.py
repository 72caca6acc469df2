"""Which tensors of a checkpoint fill which array of Params: shapes from the config, names from its family.

Nothing is read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from model.config import ATTENTION, MAMBA2, LayerKind, ModelConfig
from model.families import FAMILIES
from model.params import Experts, Layer, Params, Recurrent

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOAT32 = np.dtype(np.float32)


class Part(NamedTuple):
    """One tensor of a checkpoint and its place in a leaf."""

    name: str
    shape: tuple[int, ...]  # in the file
    at: tuple[int | slice, ...]  # its place in the leaf, which has the same elements in the same order, but for `axes`
    # Where the tensor has the leaf's axes in another order, but for the first: which of its axes each of the leaf's is.
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Leaf:
    """One array of Params and the tensors that fill it."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dtype: np.dtype | None = None  # where it is not that of the params


def layout(config: ModelConfig) -> Params:
    """Params with a Leaf in place of every array: its shape as in `model/params.py`, and the tensors that fill it."""
    vocab, e = (config.vocab_size, config.embed_size), config.embed_size
    model: dict[str, Any] = {
        "embed": Leaf(vocab, (Part(EMBED, vocab, ()),)),
        "layers": tuple(run_layout(config, run) for run in config.runs),
        "final_norm": Leaf((e,), (Part("model.norm.weight", (e,), ()),)),
        "lm_head": None if config.tie_embeddings else Leaf(vocab, (Part(HEAD, vocab, ()),)),
    }
    return Params(**model)


class Stack:
    """Makes the leaves of a run of layers: arrays with an axis for the layers, from the parts of each."""

    def __init__(self, config: ModelConfig, run: range) -> None:
        self.names, self.run = FAMILIES[config.family].names, run

    def leaf(self, shape: tuple[int, ...], *parts: Part, dtype: Any = None) -> Leaf:
        """An array of this shape in each layer, from the layer's parts."""
        of_layers = ((n, f"model.layers.{i}", part) for n, i in enumerate(self.run) for part in parts)
        named = (part._replace(name=f"{layer}.{part.name}", at=(n, *part.at)) for n, layer, part in of_layers)
        return Leaf((len(self.run), *shape), tuple(named), dtype)

    def same(self, name: str, *shape: int, dtype: Any = None) -> Leaf:
        """An array that is one tensor in each layer."""
        return self.leaf(shape, Part(name, shape, ()), dtype=dtype)

    def gate_up(self, kind: str, gate: str, up: str, *shape: int) -> Leaf:
        """Gate, if the family has one, and up, one after the other, each of this shape."""
        names = [self.names[name] for name in (gate, up) if name in self.names]
        parts = (Part(f"{name}.{kind}", shape, (i,)) for i, name in enumerate(names))
        return self.leaf((len(names), *shape), *parts)

    def rows(self, *tensors: tuple[str, int], inputs: int) -> Leaf:
        """A matrix of the rows of some tensors, so many each, one tensor after the other."""
        ends = list(accumulate(count for _, count in tensors))
        parts = [
            Part(name, (count, inputs), np.s_[end - count : end,])
            for (name, count), end in zip(tensors, ends, strict=True)
        ]
        return self.leaf((ends[-1], inputs), *parts)


def run_layout(config: ModelConfig, run: range) -> Layer:
    """The Leaf of every array of a run of layers."""
    stack, kind = Stack(config, run), config.layers[run.start]
    layer: dict[str, Any] = dict.fromkeys(("attn_norm", "qkv", "out", "mlp_norm"))
    if kind.mixer is not None:
        layer["attn_norm"] = stack.same(stack.names["attn_norm"], config.embed_size)
    if kind.mixer == ATTENTION:
        layer |= attention_layout(config, stack)
    elif kind.recurrent:
        layer["recurrent"] = recurrent_layout(config, stack, kind)
    if kind.feed_forward:
        layer["mlp_norm"] = stack.same(stack.names["mlp_norm"], config.embed_size)
        layer |= {"experts": experts_layout(config, stack)} if kind.experts else dense_layout(config, stack)
    return Layer(**layer)


def attention_layout(config: ModelConfig, stack: Stack) -> dict[str, Leaf]:
    """The Leaf of every array of attention in a run of layers."""
    names, e = stack.names, config.embed_size
    k, g, d = config.num_kv_heads, config.group, config.head_dim
    rows = 2 * g if config.query_gate else g  # of queries, in heads
    queries, key, value = np.s_[:, :rows], np.s_[:, rows], np.s_[:, rows + 1]

    def qkv(kind: str, *inputs: int) -> Leaf:
        return stack.leaf(
            (k, rows + 2, d, *inputs),
            Part(f"{names['query']}.{kind}", (k * rows * d, *inputs), queries),
            Part(f"{names['key']}.{kind}", (k * d, *inputs), key),
            Part(f"{names['value']}.{kind}", (k * d, *inputs), value),
        )

    out = Part(f"{names['out']}.weight", (e, k * g * d), ())
    layer = {"qkv": qkv("weight", e), "out": stack.leaf((e, k, g, d), out)}
    if config.qkv_bias:
        layer["qkv_bias"] = qkv("bias")
    if config.out_bias:
        layer["out_bias"] = stack.same(f"{names['out']}.bias", e)
    if config.qk_norm:
        layer |= {"q_norm": stack.same(names["q_norm"], d), "k_norm": stack.same(names["k_norm"], d)}
    if config.sinks:
        layer["sinks"] = stack.leaf((k, g), Part(names["sinks"], (k * g,), ()), dtype=FLOAT32)
    return layer


def dense_layout(config: ModelConfig, stack: Stack) -> dict[str, Leaf]:
    """The Leaf of every array of a dense feed-forward block in a run of layers."""
    names, e, f = stack.names, config.embed_size, config.ffn_size
    layer = {
        "gate_up": stack.gate_up("weight", "gate", "up", f, e),
        "down": stack.same(f"{names['down']}.weight", e, f),
    }
    if config.mlp_bias:
        layer["gate_up_bias"] = stack.gate_up("bias", "gate", "up", f)
        layer["down_bias"] = stack.same(f"{names['down']}.bias", e)
    return layer


def recurrent_layout(config: ModelConfig, stack: Stack, kind: LayerKind) -> Recurrent:
    """The Leaf of every array of recurrent layers in a run."""
    sizes, names, e = config.recurrent, stack.names, config.embed_size
    assert sizes is not None
    h, channels, values, mamba = sizes.heads, sizes.channels, sizes.values, kind.mixer == MAMBA2
    if mamba:
        proj_in = stack.same(names["proj_in"], values + channels + h, e)
    else:
        of_inputs = (("proj_qkv", channels), ("proj_z", values), ("proj_b", h), ("proj_a", h))
        proj_in = stack.rows(*((names[name], count) for name, count in of_inputs), inputs=e)
    conv = Part(names["conv"], (channels, 1, sizes.conv_width), ())
    arrays = {
        "proj_in": proj_in,
        "conv": stack.leaf((channels, sizes.conv_width), conv),
        "log_rate": stack.same(names["log_rate"], h, dtype=FLOAT32),
        "step_bias": stack.same(names["step_bias"], h, dtype=FLOAT32),
        "norm": stack.same(names["state_norm"], values if mamba else sizes.value_dim),
        "proj_out": stack.same(names["proj_out"], e, values),
    }
    if sizes.conv_bias:
        arrays["conv_bias"] = stack.same(names["conv_bias"], channels)
    if mamba:
        arrays["skip"] = stack.same(names["skip"], h, dtype=FLOAT32)
    return Recurrent(**arrays)  # type: ignore[arg-type]


def experts_layout(config: ModelConfig, stack: Stack) -> Experts:
    """The Leaf of every array of the experts in a run of layers."""
    experts, names, e = config.experts, stack.names, config.embed_size
    assert experts is not None
    x, f, shared = experts.count, experts.ffn_size, experts.shared_ffn_size
    inner = experts.latent_size or e
    mixture: dict[str, Leaf] = {"router": stack.same(f"{names['router']}.weight", x, e)}
    if "experts_down" in names:  # gpt-oss: all in one tensor, inputs before outputs, gate and up by turns
        gate_up, down = names["experts_gate_up"], names["experts_down"]
        mixture["gate_up"] = stack.leaf((x, 2, f, e), Part(gate_up, (x, e, 2 * f), (), (0, 3, 2, 1)))
        mixture["down"] = stack.leaf((x, e, f), Part(down, (x, f, e), (), (0, 2, 1)))
        if experts.biases:
            mixture["gate_up_bias"] = stack.leaf((x, 2, f), Part(f"{gate_up}_bias", (x, 2 * f), (), (0, 2, 1)))
            mixture["down_bias"] = stack.same(f"{down}_bias", x, e)
    else:
        gates = [names[name] for name in ("expert_gate", "expert_up") if name in names]
        each = [(number, i, name) for number in range(x) for i, name in enumerate(gates)]
        parts = [Part(name.format(number), (f, inner), (number, i)) for number, i, name in each]
        mixture["gate_up"] = stack.leaf((x, len(gates), f, inner), *parts)
        parts = [Part(names["expert_down"].format(number), (inner, f), (number,)) for number in range(x)]
        mixture["down"] = stack.leaf((x, inner, f), *parts)
    if experts.router_bias:
        mixture["router_bias"] = stack.same(f"{names['router']}.bias", x)
    if experts.correction:
        mixture["correction"] = stack.same(names["correction"], x, dtype=FLOAT32)
    if shared:
        mixture["shared_gate_up"] = stack.gate_up("weight", "shared_gate", "shared_up", shared, e)
        mixture["shared_down"] = stack.same(f"{names['shared_down']}.weight", e, shared)
    if experts.shared_gate:
        mixture["shared_gate"] = stack.same(names["shared_weight"], 1, e)
    if experts.latent_size:
        mixture["latent_in"] = stack.same(names["latent_in"], inner, e)
        mixture["latent_out"] = stack.same(names["latent_out"], e, inner)
    return Experts(**mixture)  # type: ignore[arg-type]
