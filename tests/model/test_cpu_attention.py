"""The CPU kernel beyond the numbers that test_attention compares: bits, memory and shapes."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.batch import Batch
from model.kernels.cpu import build
from model.kernels.cpu.paged_attention import paged_attention
from model.kv import KVPool
from tests.helpers import batches
from tests.helpers.attention_oracle import attention as reference

needs_kernel = pytest.mark.skipif(not build.available(), reason="the CPU kernel cannot be built here")
ragged = partial(batches.ragged, kv_heads=2, group=3, head_dim=16, page=16, dtype=jnp.float32)
compiled = jax.jit(paged_attention)
FOLDER = Path(__file__).parent


@needs_kernel
@pytest.mark.parametrize("seed", range(12))
def test_heads_groups_and_pages_of_any_shape_match_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    shape = {
        "kv_heads": int(rng.integers(1, 5)),
        "group": int(rng.choice([1, 2, 3, 4, 7, 8, 16])),
        "head_dim": int(rng.choice([4, 8, 20, 64, 80, 128])),
        "page": int(rng.choice([4, 12, 16, 64, 128, 256])),
        "spare_seqs": int(rng.integers(0, 3)),
        "spare_tokens": int(rng.integers(0, 9)),
    }
    prefixes = [int(n) for n in rng.choice([0, 1, 15, 63, 64, 65, 400, 1500], count)]
    chunks = [int(n) for n in rng.choice([1, 2, 3, 5, 33, 64, 300], count)]
    q, pool, batch = ragged(prefixes, chunks, **shape, seed=seed)
    actual, expected = (np.asarray(f(q, pool, 1, batch)) for f in (compiled, reference))
    real = int(batch.starts[-1])
    np.testing.assert_allclose(actual[:real], expected[:real], atol=2e-5)
    assert not actual[real:].any()


@needs_kernel
@pytest.mark.parametrize("seed", range(8))
def test_windows_and_sinks_match_the_reference_in_any_shape(seed: int) -> None:
    """With NaN in all pages that no query sees."""
    rng = np.random.default_rng(50 + seed)
    kv_heads, group = int(rng.integers(1, 5)), int(rng.choice([1, 2, 3, 8, 16]))
    prefixes = [int(n) for n in rng.choice([0, 1, 15, 63, 64, 65, 400, 3000], 3)]
    chunks = [int(n) for n in rng.choice([1, 2, 5, 33, 64, 150], 3)]
    head_dim, page = int(rng.choice([4, 20, 64, 128])), int(rng.choice([4, 12, 16, 64]))
    q, pool, batch = ragged(prefixes, chunks, kv_heads=kv_heads, group=group, head_dim=head_dim, page=page, seed=seed)
    sinks = jnp.asarray(rng.normal(size=(kv_heads, group), scale=4), jnp.float32)
    for window in (1, 7, 64, int(rng.integers(2, 200)), 2000):
        given = batches.without_unseen_pages(pool, batch, window)
        actual = np.asarray(compiled(q, given, 1, batch, window, sinks))
        np.testing.assert_allclose(actual, reference(q, pool, 1, batch, window, sinks), atol=2e-5, err_msg=str(window))


@needs_kernel
@pytest.mark.parametrize("scale", [1e-30, 30.0, 1e4])
def test_scores_of_any_size_neither_overflow_nor_vanish(scale):
    q, pool, batch = ragged([600, 0], [1, 200], seed=3)
    actual, expected = (np.asarray(f(q * scale, pool, 0, batch)) for f in (compiled, reference))
    assert np.isfinite(actual).all()
    # A score is rounded in proportion to its size, and the softmax turns that into a share of the probability.
    np.testing.assert_allclose(actual, expected, atol=max(2e-5, 2e-6 * scale))


@needs_kernel
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["q", "k", "v"])
@pytest.mark.parametrize("chunk", [1, 40])
def test_what_is_no_number_is_no_number_in_the_result(value, side, chunk):
    q, pool, batch = ragged([100], [chunk], seed=5)
    if side == "q":
        q = q.at[0, 1, 1, 3].set(value)
    else:
        pool = replace(pool, **{side: getattr(pool, side).at[0, batch.block_table[0, 2], 0, 7, 3].set(value)})
    actual, expected = (np.isfinite(f(q, pool, 0, batch)) for f in (compiled, reference))
    assert np.isinf(value) or not expected.all()
    assert np.array_equal(actual, expected)


@needs_kernel
def test_the_same_batch_gives_the_same_bits() -> None:
    q, pool, batch = ragged([3000, 700, 0], [1, 90, 300])
    first = np.asarray(compiled(q, pool, 0, batch))
    assert all(np.array_equal(first, np.asarray(compiled(q, pool, 0, batch))) for _ in range(20))


def alone(q, batch, s):
    """The queries and the batch of one sequence of a batch."""
    start, stop = (int(n) for n in batch.starts[s : s + 2])
    one = replace(
        batch,
        tokens=batch.tokens[start:stop],
        starts=jnp.asarray([0, stop - start], jnp.int32),
        prefix=batch.prefix[s : s + 1],
        block_table=batch.block_table[s : s + 1],
        max_chunk=stop - start,
    )
    return q[start:stop], one


@needs_kernel
def test_a_window_as_long_as_the_sequence_changes_no_bit() -> None:
    q, pool, batch = ragged([3000, 700, 0], [1, 90, 300])
    plain = np.asarray(compiled(q, pool, 0, batch))
    for window in (3001, 2**31 - 1):
        assert np.array_equal(plain, np.asarray(compiled(q, pool, 0, batch, window)))


@needs_kernel
@pytest.mark.parametrize("sink", [-np.inf, -1e30, 1e4])
def test_sinks_of_any_size_take_their_share_and_no_more(sink):
    q, pool, batch = ragged([60, 1500], [30, 1])
    sinks = jnp.full((2, 3), sink, jnp.float32)
    found = np.asarray(compiled(q, pool, 0, batch, 50, sinks))
    expected = np.zeros(q.shape) if sink > 0 else np.asarray(compiled(q, pool, 0, batch, 50))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@needs_kernel
@pytest.mark.parametrize("window", [None, 1, 100, 3000])
@pytest.mark.parametrize(
    ("prefixes", "chunks"),
    [
        ([3000] * 8, [1] * 8),
        ([5000, 40, 2047, 2048, 1023, 0], [1, 1, 1, 1, 1, 1]),
        ([9000, 3000, 700, 4096], [3, 2, 100, 1]),
        ([6000, 2500, 0], [300, 1, 700]),
    ],
)
def test_a_sequence_gets_the_same_bits_in_any_company(prefixes, chunks, window):
    q, pool, batch = ragged(prefixes, chunks, page=64, spare_seqs=1, spare_tokens=3)
    sinks = None if window is None else jnp.linspace(-2, 2, 6).reshape(2, 3)
    together = np.asarray(compiled(q, pool, 0, batch, window, sinks))
    for s in range(len(prefixes)):
        queries, one = alone(q, batch, s)
        start, stop = batch.starts[s : s + 2]
        found = np.asarray(compiled(queries, pool, 0, one, window, sinks))
        assert np.array_equal(found, together[start:stop]), s


THREADS = """
import sys
import jax, numpy as np
from tests.helpers import batches
from model.kernels.cpu.paged_attention import paged_attention
q, pool, batch = batches.ragged(
    [6000, 2500, 0], [300, 1, 700], kv_heads=2, group=3, head_dim=16, page=64, dtype=jax.numpy.float32
)
from model.kernels.cpu import build
assert build.available()
np.save(sys.argv[1], np.asarray(jax.jit(paged_attention)(q, pool, 0, batch)))
"""


@needs_kernel
def test_the_bits_are_the_same_with_any_number_of_threads(tmp_path: Path) -> None:
    found = []
    for threads in ("1", "3"):
        path = tmp_path / f"{threads}.npy"
        places = os.pathsep.join([str(FOLDER), str(FOLDER.parent.parent)])
        environment = os.environ | {"NPROC": threads, "JAX_PLATFORMS": "cpu", "PYTHONPATH": places}
        subprocess.run([sys.executable, "-c", THREADS, str(path)], env=environment, check=True, timeout=300)
        found.append(np.load(path))
    assert np.array_equal(*found)


@needs_kernel
def test_the_pool_is_read_where_it_lies() -> None:
    pool = KVPool(*(jnp.zeros((2, 256, 2, 16, 16)) for _ in range(2)))
    q, _, batch = ragged([90], [40])

    def layers(pool: KVPool, q: jax.Array, batch: Batch) -> tuple[jax.Array, KVPool]:
        """Two layers as in the decoder: each writes its keys, then reads the pool."""

        def layer(state: tuple[jax.Array, KVPool], index: jax.Array) -> tuple[tuple[jax.Array, KVPool], None]:
            x, pool = state
            pool = KVPool(*(side.at[index, 7, :, 3].set(x[0, :, 0]) for side in (pool.k, pool.v)))
            return (x + paged_attention(x, pool, index, batch), pool), None

        return jax.lax.scan(layer, (q, pool), jnp.arange(2))[0]

    program = jax.jit(layers, donate_argnums=0).lower(pool, q, batch).compile()
    assert program.memory_analysis().temp_size_in_bytes < pool.k.nbytes / 4
    copies = [line for line in program.as_text().splitlines() if " copy(" in line and "2,256,2,16,16" in line]
    assert not copies


@needs_kernel
def test_what_it_cannot_take_is_refused_by_name() -> None:
    q, pool, batch = ragged([3], [2])
    with pytest.raises(ValueError, match="dtype of q is bfloat16, supported is float32"):
        paged_attention(q.astype(jnp.bfloat16), pool, 0, batch)
    with pytest.raises(ValueError, match="head_dim is 18, supported are multiples of 4"):
        paged_attention(*(ragged([3], [2], head_dim=18)[i] for i in (0, 1)), 0, batch)
    with pytest.raises(ValueError, match="page_size is 1, supported are multiples of 4"):
        paged_attention(*(ragged([3], [2], page=1)[i] for i in (0, 1)), 0, batch)
    with pytest.raises(ValueError, match="KV heads of q is 1, the pool's is 2"):
        paged_attention(q[:, :1], pool, 0, batch)
    with pytest.raises(ValueError, match="head_dim of q is 8, the pool's is 16"):
        paged_attention(q[..., :8], pool, 0, batch)
    with pytest.raises(ValueError, match="shape of v"):
        paged_attention(q, replace(pool, v=pool.v[:1]), 0, batch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="layer is 2, the pool has 2"):
        compiled(q, pool, 2, batch).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="window is 0, expected at least 1"):
        compiled(q, pool, 1, batch, 0).block_until_ready()
