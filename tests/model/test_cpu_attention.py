"""The CPU kernel beyond the numbers that test_attention compares: bits, memory, shapes, and how it is built."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import Batch, reference
from model.kernels.cpu import build
from model.kernels.cpu.paged_attention import paged_attention
from model.kv import KVPool

needs_kernel = pytest.mark.skipif(not build.available(), reason="the CPU kernel cannot be built here")
ragged = partial(batches.ragged, kv_heads=2, group=3, head_dim=16, page=16, dtype=jnp.float32)
compiled = jax.jit(paged_attention)


@needs_kernel
@pytest.mark.parametrize("seed", range(12))
def test_heads_groups_and_pages_of_any_shape_match_the_reference(seed):
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
@pytest.mark.parametrize("scale", [1e-30, 30.0, 1e4])
def test_scores_of_any_size_neither_overflow_nor_vanish(scale):
    q, pool, batch = ragged([600, 0], [1, 200], seed=3)
    actual, expected = (np.asarray(f(q * scale, pool, 0, batch)) for f in (compiled, reference))
    assert np.isfinite(actual).all()
    # A score is rounded in proportion to its size, and the softmax turns that into a share of the probability.
    np.testing.assert_allclose(actual, expected, atol=max(2e-5, 2e-6 * scale))


@needs_kernel
def test_the_same_batch_gives_the_same_bits():
    q, pool, batch = ragged([3000, 700, 0], [1, 90, 300])
    first = np.asarray(compiled(q, pool, 0, batch))
    assert all(np.array_equal(first, np.asarray(compiled(q, pool, 0, batch))) for _ in range(20))


@needs_kernel
def test_the_pool_is_read_where_it_lies():
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
def test_what_it_cannot_take_is_refused_by_name():
    q, pool, batch = ragged([3], [2])
    with pytest.raises(ValueError, match="dtype of q is bfloat16, supported is float32"):
        paged_attention(q.astype(jnp.bfloat16), pool, 0, batch)
    with pytest.raises(ValueError, match="head_dim is 18, supported are multiples of 4"):
        paged_attention(*(ragged([3], [2], head_dim=18)[i] for i in (0, 1)), 0, batch)
    with pytest.raises(ValueError, match="page_size is 1, supported are multiples of 4"):
        paged_attention(*(ragged([3], [2], page=1)[i] for i in (0, 1)), 0, batch)


ATTEND = """
import logging
import jax.numpy as jnp
from model.attention import Batch, paged_attention
from model.kernels.cpu.build import available
from model.kv import KVPool
logging.basicConfig(format="%(message)s")
pool = KVPool(*(jnp.ones((1, 2, 1, 16, 16)) for _ in range(2)))
batch = Batch(*(jnp.asarray(x, jnp.int32) for x in ([1], [0, 1], [3], [[1]], [0])), max_chunk=1)
print(float(paged_attention(jnp.ones((1, 1, 2, 16)), *(jnp.ones((1, 1, 16)),) * 2, pool, 0, batch).sum()), available())
"""


def attend(cache, **variables):
    """What a process of its own says that attends once, with its kernels kept in `cache`: (output, errors)."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(
        [sys.executable, "-c", ATTEND], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CXX": "/nonexistent/c++"}, "CXX is '/nonexistent/c++', which is no program"),
        ({"CXX": "", "PATH": ""}, "no C++ compiler is installed: expected one of c++, g++, clang++"),
        ({"CXX": "false"}, "false failed"),
        ({"TOKENZERO_CPU_KERNEL": "off"}, None),
    ],
)
def test_without_a_kernel_xla_does_the_work_and_the_log_says_why(tmp_path, variables, said):
    output, errors = attend(tmp_path, **variables)
    assert output == "32.0 False"
    lines = [line for line in errors.splitlines() if "XLA alone" in line]
    assert len(lines) == (1 if said else 0)
    assert said is None or said in lines[0]
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written_costs_the_kernel_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("")
    output, errors = attend(tmp_path / "file")
    assert output == "32.0 False"
    assert "XLA alone" in errors


@needs_kernel
def test_processes_that_build_at_once_leave_one_library(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        outputs = [future.result()[0] for future in [pool.submit(attend, tmp_path) for _ in range(2)]]
    assert outputs == ["32.0 True"] * 2
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".so"]
