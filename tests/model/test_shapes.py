"""Shapes: what the annotations of model/ state is checked in tests, and only there."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from model.attention import paged_attention
from model.batch import Batch
from model.kv import KVPool, gather_pages
from model.linear import linear
from model.rope import rotate
from tests.helpers.batches import ragged
from tests.helpers.shapes import assert_fields


def small() -> tuple[jax.Array, KVPool, Batch]:
    return ragged([3, 40], [5, 1], kv_heads=2, group=2, head_dim=16, page=16, dtype=jnp.float32)


def test_the_arrays_of_a_batch_and_a_pool_have_the_shapes_of_their_fields() -> None:
    _, pool, batch = small()
    assert_fields(batch)
    assert_fields(pool)


@pytest.mark.parametrize(
    "wrong",
    [
        {"starts": jnp.zeros(2, jnp.int32)},  # one fewer than sequences and their end
        {"prefix": jnp.zeros(3, jnp.int32)},
        {"block_table": jnp.zeros(2, jnp.int32)},
        {"tokens": jnp.zeros(6, jnp.float32)},
    ],
)
def test_a_batch_with_a_field_of_another_shape_or_dtype_is_found(wrong: dict[str, jax.Array]) -> None:
    with pytest.raises(AssertionError):
        assert_fields(small()[2].replace(**wrong))


def test_keys_and_values_of_other_axes_than_the_queries_are_refused() -> None:
    q, pool, batch = small()
    keys = jnp.zeros((q.shape[0], 2, 16))
    paged_attention(q, keys, keys, pool, 0, batch)
    for wrong in (keys[:-1], keys[:, :1], keys[..., :8], keys[0], keys.astype(jnp.int32)):
        with pytest.raises(TypeCheckError):
            paged_attention(q, keys, wrong, pool, 0, batch)


def test_wrong_shapes_are_refused_while_a_function_is_traced_too() -> None:
    x, weight = jnp.zeros((3, 8)), jnp.zeros((2, 5, 8))
    assert jax.jit(linear)(x, weight, jnp.zeros((2, 5))).shape == (3, 2, 5)
    with pytest.raises(TypeCheckError):
        jax.jit(linear)(x, weight, jnp.zeros((5, 2)))
    with pytest.raises(TypeCheckError):
        jax.jit(rotate)(jnp.zeros((3, 2, 8)), jnp.zeros((4, 4)), jnp.zeros((4, 4)))


def test_page_numbers_may_be_of_numpy_but_must_be_whole() -> None:
    _, pool, batch = small()
    assert gather_pages(pool, jax.device_get(batch.block_table[0])).shape[1:] == (2, 2, 2, 16, 16)
    with pytest.raises(TypeCheckError):
        gather_pages(pool, jnp.zeros(2))


def test_nothing_is_checked_outside_of_tests() -> None:
    code = "import jax.numpy as jnp; from model.decoder import rms_norm; rms_norm(jnp.ones((2, 4)), jnp.ones(1), 1e-6)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
