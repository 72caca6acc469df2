"""Quantised KV pages: what a row holds, that every path of attention reads the same, and that copies keep its bits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kv
from model.attention import paged_attention
from model.batch import locate
from model.config import ModelConfig, RopeConfig
from model.decoder import forward
from model.kernels import limits
from model.kernels.cpu import build
from model.kernels.cpu import pages as cpu_pages
from model.kernels.reference import reference as in_jax
from model.kv import KVPool
from model.kv_rows import GROUP, QUANTIZED, decode, encode, head_dim_of, pool_dtype, row_size
from tests.helpers import batches
from tests.helpers.attention_oracle import attention as reference
from tests.model.test_cpu_layers import ODD, PAGES, batch_of, packed
from tests.model.test_cpu_layers import PAGE as CPU_PAGE

PAGE = 16
ragged = partial(batches.ragged, kv_heads=2, group=3, head_dim=16, page=PAGE, dtype=jnp.float32)
CONFIG = ModelConfig("llama", 128, 64, 96, 3, 4, 2, 16, 512, 1e-6, RopeConfig())
# Of a number's largest neighbour in its group: half a step of 1/127, and half a step of 2^-3 of itself.
STEP = {"int8": 0.5 / 127, "fp8": 2.0**-4}


@pytest.fixture(params=QUANTIZED)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of quantised pages in turn."""
    return request.param


def quantised(pool: KVPool, kind: str) -> tuple[KVPool, KVPool]:
    """The pool in this kind, and in float32 what it then holds."""
    sides = [encode(side, pool_dtype(kind)) for side in (pool.k, pool.v)]
    return KVPool(*sides), KVPool(*(decode(side, jnp.float32) for side in sides))


def test_numbers_are_rounded_to_the_nearest_of_their_row(kind):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(50, 72)) * 10.0 ** np.repeat(rng.integers(-6, 6, (50, 5)), GROUP, -1)[:, :72])
    rows = encode(x, pool_dtype(kind))
    assert rows.shape == (50, row_size(72, pool_dtype(kind))) == (50, 82)
    assert rows.dtype.itemsize == 1
    largest = np.stack([np.abs(x[:, i : i + GROUP]).max(-1) for i in range(0, 72, GROUP)], -1)
    largest = np.repeat(largest, GROUP, -1)[:, :72]
    error = np.abs(decode(rows, jnp.float32) - x)
    step = STEP[kind] * (1 + 2.0**-8)  # a scale is a bfloat16
    assert (error <= step * (largest if kind == "int8" else np.abs(x) + largest * 2.0**-12)).all()


def test_the_size_of_a_row_says_how_many_numbers_it_has(kind):
    dtype = pool_dtype(kind)
    assert [head_dim_of(row_size(n, dtype), dtype) for n in range(1, 300)] == list(range(1, 300))


@pytest.mark.parametrize("head_dim", [20, 64])
def test_the_cpu_kernel_writes_the_bytes_that_encode_does(kind, head_dim):
    if not build.available():
        pytest.skip("the CPU kernel cannot be built here: its log line says why")
    config, dtype = replace(ODD, num_layers=1, layers=(), head_dim=head_dim), pool_dtype(kind)
    batch = batch_of([20], [0])
    pools = [kv.empty_pool(config, PAGES, CPU_PAGE, of) for of in (jnp.float32, dtype)]
    full, rounded = (forward(packed(config), batch, pool, config)[1] for pool in pools)
    for side in ("k", "v"):
        np.testing.assert_array_equal(encode(getattr(full, side), dtype), getattr(rounded, side))


def test_a_row_of_zeros_stays_one_and_what_is_no_number_stays_none(kind):
    x = jnp.asarray([[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
    zeros, nan, inf = decode(encode(x, pool_dtype(kind)), jnp.float32)
    tiny = decode(encode(jnp.full((1, 20), 1e-38), pool_dtype(kind)), jnp.float32)
    np.testing.assert_array_equal(zeros, 0)
    np.testing.assert_array_equal(tiny, 0)
    assert np.isnan(nan).all()
    assert not np.isfinite(inf).any()


def test_a_pool_of_eight_bits_holds_three_and_a_half_times_the_tokens_of_float32():
    for head_dim in (32, 64, 128):
        config = ModelConfig("llama", 128, 64, 96, 3, 4, 2, head_dim, 512, 1e-6, RopeConfig())
        sizes = {name: kv.bytes_per_token(config, pool_dtype(name)) for name in ("float32", *QUANTIZED)}
        assert sizes["float32"] == 2 * 3 * 2 * head_dim * 4
        assert all(sizes["float32"] / sizes[kind] > 3.5 for kind in QUANTIZED)


def test_the_bytes_of_a_token_are_those_of_the_pool(kind):
    pool = kv.empty_pool(CONFIG, 5, PAGE, pool_dtype(kind))
    assert pool.k.nbytes + pool.v.nbytes == 5 * PAGE * kv.bytes_per_token(CONFIG, pool_dtype(kind))


@pytest.mark.parametrize("path", ["CPU kernel", "blockwise"])
@pytest.mark.parametrize(
    ("prefixes", "chunks", "spare"),
    [([0], [20], 0), ([700], [1], 0), ([33], [300], 0), ([0, 15, 17, 900], [5, 33, 64, 2], 2)],
)
def test_attention_reads_what_the_rows_hold(kind, path, prefixes, chunks, spare, monkeypatch):
    if path == "blockwise":
        monkeypatch.setattr("model.attention.kernel_for", lambda *_: None)
    elif not build.available():
        pytest.skip("the CPU kernel cannot be built here: its log line says why")
    q, full, batch = ragged(prefixes, chunks, spare_seqs=spare, spare_tokens=spare)
    _, pages, offsets = locate(batch, full)
    k, v = (side.at[1, pages, :, offsets].get(mode="fill", fill_value=0) for side in (full.k, full.v))
    pool, held = quantised(full, kind)
    real = int(batch.starts[-1])
    expected = np.asarray(reference(q, held, 1, batch))[:real]
    assert np.isfinite(expected).all()
    found = jax.jit(lambda *args: paged_attention(*args))(q, k, v, pool, 1, batch)
    np.testing.assert_allclose(found[:real], expected, atol=2e-5)
    if prefixes == [0] and path == "blockwise":
        np.testing.assert_allclose(in_jax(q, pool, 1, batch)[:real], expected, atol=2e-5)


def test_gpu_kernels_leave_quantised_pages_to_xla_and_say_why(kind):
    q, full, _ = ragged([0], [20], head_dim=64, dtype=jnp.bfloat16)
    pool, _ = quantised(full, kind)
    assert limits.unsupported_reason(q, full) is None
    assert limits.unsupported_reason(q, pool) == f"dtype of k is {pool.k.dtype.name}, supported are bfloat16"


def test_pages_are_written_read_and_copied_as_bytes(kind):
    rng, dtype = np.random.default_rng(0), pool_dtype(kind)
    pool = kv.empty_pool(CONFIG, 6, PAGE, dtype)
    k, v = (jnp.asarray(rng.normal(size=(3, 2, 16)), jnp.float32) for _ in range(2))
    pool = kv.write(pool, 1, k, v, jnp.asarray([2, 2, 6]), jnp.asarray([0, 5, 0]))
    found = np.asarray(kv.gather_pages(pool, jnp.asarray([2, 3])))
    assert found.shape == (2, 2, 3, 2, PAGE, 18)
    for side, values in enumerate((k, v)):
        np.testing.assert_array_equal(found[0, side, 1][:, [0, 5]].swapaxes(0, 1), encode(values[:2], dtype))
    assert not found[1].any()
    pool = kv.copy_pages(pool, jnp.asarray([2, 0]), jnp.asarray([4, 6]))
    np.testing.assert_array_equal(kv.gather_pages(pool, jnp.asarray([4]))[0], found[0])
    for scatter in (kv.scatter_pages, cpu_pages.scatter_pages):
        other = jax.jit(scatter)(kv.empty_pool(CONFIG, 6, PAGE, dtype), jnp.asarray([5, 1], jnp.int32), found)
        np.testing.assert_array_equal(kv.gather_pages(other, jnp.asarray([5, 1])), found)
