"""Which tensors of a checkpoint fill which array of Params: shapes from the config, names from its family.

Nothing is read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from model.config import ModelConfig
from model.families import FAMILIES
from model.params import Layer, Params

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Part(NamedTuple):
    """One tensor of a checkpoint and its place in a leaf."""

    name: str
    shape: tuple[int, ...]  # in the file
    at: tuple[int | slice, ...]  # its place in the leaf, which has the same elements in the same order


@dataclass(frozen=True)
class Leaf:
    """One array of Params and the tensors that fill it."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


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


def run_layout(config: ModelConfig, run: range) -> Layer:
    """The Leaf of every array of a run of layers."""
    names = FAMILIES[config.family].names
    k, g, d, e, f = config.num_kv_heads, config.group, config.head_dim, config.embed_size, config.ffn_size
    queries, key, value = np.s_[:, :g], np.s_[:, g], np.s_[:, g + 1]

    def stack(shape: tuple[int, ...], *parts: Part) -> Leaf:
        """One array for all layers of the run, from the parts of each."""
        of_layers = ((n, f"model.layers.{i}", part) for n, i in enumerate(run) for part in parts)
        named = (part._replace(name=f"{layer}.{part.name}", at=(n, *part.at)) for n, layer, part in of_layers)
        return Leaf((len(run), *shape), tuple(named))

    def qkv(kind: str, *inputs: int) -> Leaf:
        return stack(
            (k, g + 2, d, *inputs),
            Part(f"{names['query']}.{kind}", (k * g * d, *inputs), queries),
            Part(f"{names['key']}.{kind}", (k * d, *inputs), key),
            Part(f"{names['value']}.{kind}", (k * d, *inputs), value),
        )

    def gate_up(kind: str, *inputs: int) -> Leaf:
        parts = (Part(f"{names[name]}.{kind}", (f, *inputs), (i,)) for i, name in enumerate(("gate", "up")))
        return stack((2, f, *inputs), *parts)

    def same(name: str, *shape: int) -> Leaf:
        return stack(shape, Part(name, shape, ()))

    layer = {
        "attn_norm": same(names["attn_norm"], e),
        "qkv": qkv("weight", e),
        "out": stack((e, k, g, d), Part(f"{names['out']}.weight", (e, k * g * d), ())),
        "mlp_norm": same(names["mlp_norm"], e),
        "gate_up": gate_up("weight", e),
        "down": same(f"{names['down']}.weight", e, f),
    }
    if config.qkv_bias:
        layer["qkv_bias"] = qkv("bias")
    if config.out_bias:
        layer["out_bias"] = same(f"{names['out']}.bias", e)
    if config.qk_norm:
        layer |= {"q_norm": same(names["q_norm"], d), "k_norm": same(names["k_norm"], d)}
    if config.mlp_bias:
        layer |= {"gate_up_bias": gate_up("bias"), "down_bias": same(f"{names['down']}.bias", e)}
    return Layer(**layer)  # type: ignore[arg-type]
