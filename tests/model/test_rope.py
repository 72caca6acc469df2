"""Rotary embedding: frequencies, angles and rotation against those of transformers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model import rope
from model.config import RopeConfig

MAX_POSITION = 131072
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
KINDS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "llama3", **LLAMA3, "factor": 32.0},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"rope_type": "yarn", **YARN, "attention_factor": 1.5},
]


def both(fields: dict[str, Any], theta: float, head_dim: int) -> tuple[RopeConfig, LlamaRotaryEmbedding]:
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={**fields, "rope_theta": theta},
    )
    return RopeConfig.from_hf(config.to_dict(), MAX_POSITION), LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("fields", KINDS, ids=lambda f: f["rope_type"])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
def test_frequencies_equal_those_of_transformers(fields, theta, head_dim):
    ours, theirs = both(fields, theta, head_dim)
    inv_freq, scaling = rope.inverse_frequencies(ours, head_dim)
    expected = theirs.inv_freq.numpy()
    assert inv_freq.dtype == np.float32
    np.testing.assert_allclose(inv_freq, expected, rtol=2.5e-7)
    # Torch's own power misses the rounding of a rare element; ours must miss no more than that.
    assert (inv_freq != expected).sum() <= 1
    assert scaling == theirs.attention_scaling


@pytest.mark.parametrize("jit", [False, True])
def test_angles_equal_those_of_transformers_up_to_position_262144(jit):
    ours, theirs = both({"rope_type": "yarn", **YARN}, 1e6, 64)
    positions = np.concatenate([np.arange(0, 262144, 199), np.arange(262080, 262145)]).astype(np.int32)
    expected = theirs(torch.zeros(1), torch.from_numpy(positions).long()[None])
    _, scaling = rope.inverse_frequencies(ours, 64)
    angles = jax.jit(rope.angles, static_argnums=2) if jit else rope.angles
    found = angles(jnp.asarray(positions), theirs.inv_freq.numpy(), scaling)
    for mine, torchs in zip(found, expected, strict=True):
        assert mine.dtype == jnp.float32
        assert mine.shape == (len(positions), 32)
        np.testing.assert_allclose(mine, torchs[0, :, :32].numpy(), atol=3e-7)


@pytest.mark.parametrize("heads", [(3,), (2, 3)])
def test_rotation_equals_apply_rotary_pos_emb(heads):
    ours, theirs = both({"rope_type": "default"}, 1e4, 16)
    positions = np.array([0, 1, 5, 200, 4099], np.int32)
    x = np.random.default_rng(0).standard_normal((5, *heads, 16)).astype(np.float32)
    cos, sin = rope.angles(jnp.asarray(positions), *rope.inverse_frequencies(ours, 16))
    flat = torch.from_numpy(x.reshape(1, 5, -1, 16))
    expected, _ = apply_rotary_pos_emb(
        flat, flat, *theirs(flat, torch.from_numpy(positions).long()[None]), unsqueeze_dim=2
    )
    found = rope.rotate(jnp.asarray(x), cos, sin)
    np.testing.assert_allclose(found, expected.numpy().reshape(x.shape), atol=1e-6)


def test_rotation_computes_in_float32_and_returns_the_dtype_it_got() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 16)), jnp.bfloat16)
    cos, sin = rope.angles(jnp.arange(4, dtype=jnp.int32) * 1001, *rope.inverse_frequencies(RopeConfig(), 16))
    found = rope.rotate(x, cos, sin)
    assert found.dtype == jnp.bfloat16
    assert (found == rope.rotate(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16)).all()
