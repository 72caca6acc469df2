"""Pools of more than 2 ** 31 elements, where an offset of 32 bits would overflow."""

import math
import mmap
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kv
from model.batch import Batch
from model.kernels.cpu import build
from model.kernels.cpu.paged_attention import paged_attention
from model.kernels.reference import reference
from model.kv import KVPool
from model.kv_rows import encode, row_size

HEADS, PAGE, DIM = 8, 64, 128
PAGES = 2**31 // (2 * HEADS * PAGE * DIM) + 8  # of two layers
SHAPE = (2, PAGES, HEADS, PAGE, DIM)
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.11 has no name for Linux's flag

indices = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


def programs(dtype):
    """Each function of `model.kv` that touches pages, and the shapes that it takes for a large pool."""
    values = partial(jax.ShapeDtypeStruct, dtype=dtype)
    pool = KVPool(values(SHAPE), values(SHAPE))
    tokens, pages = values((3, HEADS, DIM)), values((4, 2, 2, HEADS, PAGE, DIM))
    return {
        "write": (kv.write, (pool, indices(()), tokens, tokens, indices((3,)), indices((3,)))),
        "gather_pages": (kv.gather_pages, (pool, indices((4,)))),
        "scatter_pages": (kv.scatter_pages, (pool, indices((4,)), pages)),
        "copy_pages": (kv.copy_pages, (pool, indices((2,)), indices((2,)))),
    }


@pytest.mark.parametrize("name", programs(jnp.float32))
def test_a_page_of_a_large_pool_is_found_by_its_place_on_each_axis(name):
    assert math.prod(SHAPE) > 2**31
    function, args = programs(jnp.float32)[name]
    donated = () if name == "gather_pages" else (0,)
    program = jax.jit(function, donate_argnums=donated).lower(*args).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**28
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", program.as_text())}
    # Were two axes merged, their index would be one number, and no longer small.
    assert {shape for shape in shapes if math.prod(shape) > 2**31} == {SHAPE}
    assert max(max(shape) for shape in shapes) == PAGES


@pytest.mark.slow
def test_the_last_pages_of_a_large_pool_are_written_copied_and_read() -> None:
    row = row_size(DIM, jnp.int8)
    pool = KVPool(*(jnp.zeros((*SHAPE[:-1], row), jnp.int8) for _ in range(2)))
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(3, HEADS, DIM)), jnp.float32) for _ in range(2))
    write = jax.jit(kv.write, donate_argnums=0)
    pages, offsets = jnp.asarray([PAGES - 1, PAGES - 1, PAGES]), jnp.asarray([5, PAGE - 1, 0])
    pool = write(pool, 1, k, v, pages, offsets)
    gather = jax.jit(kv.gather_pages)
    found = np.asarray(gather(pool, jnp.asarray([PAGES - 1, PAGES - 2, 0])))
    expected = np.zeros((2, 2, HEADS, PAGE, row), np.int8)  # k and v, layers, ...
    for side, values in enumerate((k, v)):
        for token, offset in enumerate((5, PAGE - 1)):
            expected[side, 1, :, offset] = encode(values[token], jnp.int8)
    assert np.array_equal(found[0], expected)
    assert not found[1:].any()

    pool = jax.jit(kv.copy_pages, donate_argnums=0)(pool, jnp.asarray([PAGES - 1, 0]), jnp.asarray([PAGES - 2, PAGES]))
    data = jnp.asarray(rng.integers(-128, 128, (1, *expected.shape)), jnp.int8)
    pool = jax.jit(kv.scatter_pages, donate_argnums=0)(pool, jnp.asarray([PAGES - 1]), data)
    found = np.asarray(gather(pool, jnp.asarray([PAGES - 2, PAGES - 1, 0])))
    assert np.array_equal(found[0], expected)
    assert np.array_equal(found[1], data[0])
    assert not found[2].any()


def untouched(shape):
    """Zeros in float32 that take no memory until they are written to, at the start of a memory page."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return np.frombuffer(mmap.mmap(-1, 4 * math.prod(shape), flags=flags), np.float32).reshape(shape)


@pytest.mark.slow
@pytest.mark.skipif(not build.available(), reason="the CPU kernel cannot be built here")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the pools would take 34 GB of memory here")
@pytest.mark.parametrize("chunk", [1, 40])
def test_the_kernel_reads_the_last_pages_of_a_large_pool(chunk):
    sample = untouched((1024,))
    if jax.device_put(sample, may_alias=True).unsafe_buffer_pointer() != sample.ctypes.data:
        pytest.skip("JAX copies arrays here: the pools would take 34 GB of memory")
    pages = 2 * PAGES  # more than 2 ** 31 elements in each layer
    rng = np.random.default_rng(chunk)
    small = [rng.normal(size=(2, 3, *SHAPE[2:])).astype(np.float32) for _ in range(2)]
    sides = []
    for values in small:
        side = untouched((2, pages, *SHAPE[2:]))
        side[:, -3:] = values
        sides.append(jax.device_put(side, may_alias=True))
    large, pool = KVPool(*sides), KVPool(*map(jnp.asarray, small))
    prefix = 2 * PAGE + 20
    batch = Batch(
        tokens=jnp.zeros(chunk, jnp.int32),
        starts=jnp.asarray([0, chunk]),
        prefix=jnp.asarray([prefix]),
        block_table=jnp.asarray([[2, 0, 1]]),
        logit_indices=jnp.zeros(1, jnp.int32),
        max_chunk=chunk,
    )
    q = jnp.asarray(rng.normal(size=(chunk, HEADS, 2, DIM)), jnp.float32)
    attend = jax.jit(paged_attention)
    found = attend(q, large, 1, batch.replace(block_table=batch.block_table + pages - 3))
    assert np.array_equal(found, attend(q, pool, 1, batch))
    np.testing.assert_allclose(found, reference(q, pool, 1, batch), atol=2e-5)
