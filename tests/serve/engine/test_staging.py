import gc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels.cpu import build, pages
from model.kv import KVPool, gather_pages, scatter_pages
from serve.engine.page_copies import batch_sizes, make_page_copies
from serve.engine.staging import Staging

SIZE = 1 << 16


def address(array):
    return array.ctypes.data


def test_a_buffer_is_used_again_once_nothing_refers_to_it():
    staging = Staging(SIZE, kept=2)
    first = staging.buffer(SIZE)
    there, view = address(first), first[100:200].view(np.int32)
    del first
    assert address(staging.buffer(SIZE)) != there, "a view is left"
    del view
    assert there in {address(each) for each in [staging.buffer(SIZE), staging.buffer(SIZE)]}


def test_a_buffer_is_not_used_again_while_the_device_reads_it():
    staging = Staging(SIZE, kept=4)
    slow = jax.jit(lambda numbers, matrix: numbers + (matrix @ matrix @ matrix).sum() * 0)
    matrix = jnp.ones((700, 700))
    jax.block_until_ready(slow(jnp.zeros(SIZE // 4), matrix))
    results = []
    for number in range(20):
        buffer = staging.buffer(SIZE).view(np.float32)
        buffer[:] = number
        results.append(slow(jax.device_put(buffer), matrix))
        del buffer
    for number, result in enumerate(results):
        np.testing.assert_array_equal(result, number)


def test_so_many_buffers_are_kept_and_small_ones_are_not():
    staging = Staging(SIZE, kept=2)
    staging.prefault()
    assert len(staging.free) == 2
    several = [staging.buffer(SIZE) for _ in range(5)]
    del several
    gc.collect()
    assert len(staging.free) == 2
    small = staging.buffer(SIZE // 4)
    assert len(small) == staging.takes(len(small)) == SIZE // 4
    del small
    assert [len(memory) for memory in staging.free] == [SIZE, SIZE]
    assert staging.takes(SIZE // 2 + 1) == SIZE


def test_pages_are_a_sum_of_compiled_counts():
    assert batch_sizes(807, (64, 16, 4, 1)) == [64] * 12 + [16, 16, 4, 1, 1, 1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pages_are_copied_in_place_with_their_bits_and_those_out_of_range_dropped(dtype):
    if not build.available():
        pytest.skip("no C++ compiler")
    shape = (3, 10, 2, 4, 8)  # layers, pages, kv_heads, page_size, head_dim
    rng = np.random.default_rng(0)
    numbers = np.asarray([7, 0, 10, 3, -1], np.int32)
    data = rng.standard_normal((len(numbers), 2, 3, *shape[2:])).astype(dtype)

    def pool():
        keys = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        return KVPool(k=jnp.asarray(keys), v=jnp.asarray(-keys))

    kept = np.asarray([0, 1, 3])
    by_xla = scatter_pages(pool(), numbers[kept], data[kept])
    ours = pool()
    places = [ours.k.unsafe_buffer_pointer(), ours.v.unsafe_buffer_pointer()]
    copied = jax.jit(pages.scatter_pages, donate_argnums=0)(ours, numbers, data)
    assert [copied.k.unsafe_buffer_pointer(), copied.v.unsafe_buffer_pointer()] == places
    np.testing.assert_array_equal(copied.k, by_xla.k)
    np.testing.assert_array_equal(copied.v, by_xla.v)
    np.testing.assert_array_equal(gather_pages(copied, numbers[kept]), data[kept])
    with pytest.raises(ValueError, match="expected"):
        pages.scatter_pages(copied, numbers, data.astype(np.float16))


def test_small_pages_are_copied_many_at_a_time():
    def largest(head_dim):
        pool = SimpleNamespace(k=jax.ShapeDtypeStruct((4, 8, 2, 64, head_dim), jnp.float32))
        pool = KVPool(k=pool.k, v=pool.k)
        programs = SimpleNamespace(mesh=None, add=lambda *_, **__: None)
        return make_page_copies(programs, pool, 0).slice_pages

    assert (largest(32), largest(128)) == (64, 16)
