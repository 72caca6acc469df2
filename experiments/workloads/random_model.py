"""Random weights of any model's shape, made on the device."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.params import Layer, Params


def random_params(config: ModelConfig, dtype: jnp.dtype) -> Params:
    """Random weights made on the device, which takes no memory but theirs; norms are one."""
    embed, ffn, layers = config.embed_size, config.ffn_size, config.num_layers
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def matrix(*shape: int, fan_in: int) -> jax.Array:
        made: jax.Array = jax.jit(lambda key: jax.random.normal(key, shape, dtype) * fan_in**-0.5)(next(keys))
        return made

    ones = partial(jnp.ones, dtype=dtype)
    heads = (config.num_kv_heads, config.group, config.head_dim)
    layer = Layer(
        attn_norm=ones((layers, embed)),
        qkv=matrix(layers, heads[0], heads[1] + 2, heads[2], embed, fan_in=embed),
        out=matrix(layers, embed, *heads, fan_in=config.num_heads * config.head_dim),
        mlp_norm=ones((layers, embed)),
        gate_up=matrix(layers, 2, ffn, embed, fan_in=embed),
        down=matrix(layers, embed, ffn, fan_in=ffn),
    )
    vocab = partial(matrix, config.vocab_size, embed, fan_in=embed)
    return Params(embed=vocab(), layers=(layer,), final_norm=ones((embed,)), lm_head=vocab())
