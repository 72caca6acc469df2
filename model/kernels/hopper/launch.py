"""What the wrappers of both kernels share: how the keys are split, and the launch itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from model.batch import Batch
from model.kernels.hopper.online_softmax import State
from model.kv import KVPool

COMPUTE = 2  # compute warpgroups of a thread block; the one after them loads
MAX_SPLITS = 16  # of the keys, unless fewer thread blocks than half a chip ask for more
MULTIPROCESSORS = 132

Shape = tuple[int, ...]


def key_splits(batch: Batch, pool: KVPool, block_kv: int, thread_blocks: int, waves: int = 1) -> int:
    """How many splits of its keys each sequence of a batch gets; depends on shapes alone. See `num_splits`."""
    return num_splits(thread_blocks, -(-batch.block_table.shape[1] * pool.page_size // block_kv), waves)


def num_splits(thread_blocks: int, key_blocks: int, waves: int = 1, multiprocessors: int = MULTIPROCESSORS) -> int:
    """How many splits of the keys make the whole chip finish soonest, each of at least four blocks of keys.

    `thread_blocks` is the size of the grid without splits, `key_blocks` how many blocks the longest sequence may have,
    `waves` how many thread blocks each multiprocessor should get. A grid that is large enough is not split. For a
    smaller one the last wave should be full: 144 thread blocks on 132 multiprocessors would take as long as 264. Each
    split costs a hundredth of the whole, to write and merge its state.
    """
    room = waves * multiprocessors
    if thread_blocks >= 2 * room:
        return 1

    def time(splits: int) -> float:
        return -(-thread_blocks * splits // room) / splits * (1 + splits / 100)

    most = max(MAX_SPLITS, room // thread_blocks)
    return min(range(1, max(1, min(most, key_blocks // 4)) + 1), key=time)


def output_types(q: jax.Array, splits: int, states: State) -> list[jax.ShapeDtypeStruct]:
    """What a kernel returns: the output, or with several splits the float32 state of each; `states` has its shapes."""
    if splits == 1:
        return [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in states]


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    grid: Mapping[str, int],
    out_type: list[jax.ShapeDtypeStruct],
    scratch_types: Mapping[str, Any],
    interpret: Any,
) -> Callable[..., list[jax.Array]]:
    """A Mosaic kernel with a thread block of COMPUTE warpgroups and one that loads for each point of the grid."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name=name,
    )


def layer_array(layer: jax.Array | int) -> jax.Array:
    """The layer's index as the kernels read it, [1] int32."""
    return jnp.asarray(layer, jnp.int32).reshape(1)
