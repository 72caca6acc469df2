"""Random weights of any model's shape, made on the device."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.layout import Leaf, layout
from model.params import Params


def random_params(config: ModelConfig, dtype: jnp.dtype) -> Params:
    """Random weights made on the device, which takes no memory but theirs; norms are one, biases and sinks zero."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(layout(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [filled(path[-1].name, leaf, key, dtype) for (path, leaf), key in zip(leaves, keys, strict=True)]
    params: Params = jax.tree.unflatten(structure, made)
    return params


def filled(name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
    """One array of Params, by the name of its field."""
    dtype = leaf.dtype or dtype
    if "norm" in name:
        return jnp.ones(leaf.shape, dtype)
    if "bias" in name or name in ("sinks", "correction"):
        return jnp.zeros(leaf.shape, dtype)
    inputs = math.prod(leaf.shape[-3:]) if name == "out" else leaf.shape[-1]
    made: jax.Array = jax.jit(partial(drawn, shape=leaf.shape, inputs=inputs, dtype=dtype))(key)
    return made


def drawn(key: jax.Array, shape: tuple[int, ...], inputs: int, dtype: Any) -> jax.Array:
    """Weights whose products with inputs of variance one have it, too."""
    weights: jax.Array = jax.random.normal(key, shape, dtype) * inputs**-0.5
    return weights
