"""What models take of memory: their published sizes, and contexts that fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from experiments.workloads.random_model import random_params
from model.kv import bytes_per_token, empty_pool
from model.memory import RESERVED, active_parameters, longest_context, parameters, weight_bytes
from model.published import MODELS, published
from model.states import bytes_per_state, empty_states
from tests.model.test_cpu_layers import EXPERTS

# Billions of parameters, all and active, as the makers state them on the models' pages.
STATED = {
    "Llama 3.1 8B": (8.03, 8.03),
    "Qwen3 8B": (8.2, 8.2),
    "Qwen3 32B": (32.8, 32.8),
    "Devstral Small, Mistral Small 3 (24B)": (23.6, 23.6),
    "Mixtral 8x7B": (46.7, 12.9),
    "Qwen3-Coder-30B-A3B": (30.5, 3.3),
    "Qwen3-235B-A22B-2507": (235, 22),
    "gpt-oss-20b": (20.9, 3.6),
    "gpt-oss-120b": (116.8, 5.1),
    "GLM-4.5-Air": (106, 12),
    "GLM-4.6, GLM-4.7": (355, 32),
    "Qwen3-Coder-Next (80B-A3B)": (80, 3),
    "Qwen3.5-35B-A3B": (35, 3),
    "Qwen3.5-27B": (27, 27),
    "Nemotron 3 Nano (30B-A3B)": (31.6, 3.5),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_many_as_the_makers_state(name):
    config, (all_of_them, active) = published(name), STATED[name]
    assert parameters(config) == pytest.approx(all_of_them * 1e9, rel=0.015)
    # Some makers leave the embedding or the head out of what is active.
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size * config.embed_size
    assert active * 1e9 * 0.93 - tables <= active_parameters(config) <= active * 1e9 * 1.1 + tables


def test_bytes_are_those_of_the_arrays() -> None:
    params, pool = random_params(EXPERTS, jnp.dtype("bfloat16")), empty_pool(EXPERTS, 3, 8, "bfloat16")
    assert weight_bytes(EXPERTS) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert bytes_per_token(EXPERTS, "bfloat16") * 24 == pool.k.nbytes + pool.v.nbytes


@pytest.mark.parametrize("name", [name for name in MODELS if published(name).recurrent_layers])
def test_a_state_takes_what_its_arrays_take_and_only_attention_has_pages(name):
    config = published(name)
    states = jax.eval_shape(lambda: empty_states(config, 3))
    assert 3 * bytes_per_state(config) == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))
    assert {leaf.dtype for leaf in jax.tree.leaves(states)} == {jnp.dtype("float32")}
    pool = jax.eval_shape(lambda: empty_pool(config, 3, 8, "bfloat16"))
    assert pool.k.shape[0] == config.attention_layers < config.num_layers
    assert bytes_per_token(config, "bfloat16") * 24 == 2 * 2 * pool.k.size
    half = longest_context(config, weight_bytes(config) + RESERVED + bytes_per_state(config) // 2)
    assert half == 0


def test_fewer_bits_leave_room_for_a_longer_context_up_to_the_models_own() -> None:
    config = published("Qwen3 32B")
    assert weight_bytes(config, 4) < weight_bytes(config, 8) < weight_bytes(config) / 1.8
    assert longest_context(config, 24 * 10**9) == 0
    at_4 = longest_context(config, 24 * 10**9, 4)
    assert 0 < at_4 < config.max_position
    taken = weight_bytes(config, 4) + RESERVED + at_4 * bytes_per_token(config, "bfloat16")
    assert 0 <= 24 * 10**9 - taken < bytes_per_token(config, "bfloat16")
    assert longest_context(config, 24 * 10**9, 4, "float8_e4m3fn") >= 2 * at_4
    assert longest_context(config, 141 * 10**9, 4) == config.max_position
