"""The sections of `experiments.gpu_bench`: each yields its measurements, one row at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu import baselines
from experiments.gpu.model import arms, forward_passes
from experiments.gpu.provenance import Json
from experiments.gpu.sizes import Sizes
from model.batch import Batch, locate
from model.kernels.dispatch import kernel_for
from model.kernels.reference import reference
from model.kernels.xla import blockwise
from model.kv import KVPool

# Two roundings to bf16 of values of about one; a wrong mask or page is off by far more.
TOLERANCE = 0.02
POOL_BYTES = 16 * 2**30  # of the pool that attention is timed on, at most


def seconds(function: Callable[..., Any], *arguments: Any, budget: float = 0.5) -> float:
    """Seconds of one call: the mean of as many as fit the budget, up to 100 and back to back, after two to warm up."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    repeats = max(3, min(100, int(budget / (time.perf_counter() - start))))
    start = time.perf_counter()
    for _ in range(repeats):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def ceilings(sizes: Sizes) -> Iterator[Json]:
    """This device's rates for one large matmul and one large copy: FLOP/s, and bytes read and written a second."""
    n = sizes.matmul
    a, b = (jax.random.normal(key, (n, n), jnp.dtype(sizes.dtype)) for key in jax.random.split(jax.random.key(0)))
    matmul = seconds(jax.jit(jnp.matmul), a, b)
    # An addition, because a bare copy would be optimised away; in place, because memory must be found for a new array.
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    array, repeats = jax.random.bits(jax.random.key(0), (sizes.copy_bytes // 4,)), 50
    array = jax.block_until_ready(copy(copy(array)))
    start = time.perf_counter()
    for _ in range(repeats):
        array = copy(array)
    jax.block_until_ready(array)
    taken = (time.perf_counter() - start) / repeats
    yield {"flops": 2 * n**3 / matmul, "bytes_per_s": 2 * sizes.copy_bytes / taken}


def paged(
    sizes: Sizes, prefixes: Sequence[int], chunks: Sequence[int], layers: int = 1
) -> tuple[jax.Array, KVPool, jax.Array, Batch]:
    """Random arguments of `paged_attention`; the pages of the sequences lie in shuffled order."""
    config, dtype = sizes.model, jnp.dtype(sizes.dtype)
    width = max(-(-(p + c) // sizes.page) for p, c in zip(prefixes, chunks, strict=True))
    pages = np.random.default_rng(0).permutation(len(chunks) * width).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (layers, len(pages), config.num_kv_heads, sizes.page, config.head_dim)
    pool = KVPool(k=jax.random.normal(keys[0], shape, dtype), v=jax.random.normal(keys[1], shape, dtype))
    q = jax.random.normal(keys[2], (sum(chunks), config.num_kv_heads, config.group, config.head_dim), dtype)
    batch = Batch(
        tokens=jnp.zeros(sum(chunks), jnp.int32),
        starts=jnp.asarray(np.cumsum([0, *chunks]), jnp.int32),
        prefix=jnp.asarray(prefixes, jnp.int32),
        block_table=jnp.asarray(pages.reshape(-1, width)),
        logit_indices=jnp.zeros(1, jnp.int32),
        max_chunk=max(chunks),
    )
    return q, pool, jnp.int32(layers - 1), batch


def poisoned(pool: KVPool, batch: Batch) -> KVPool:
    """The pool with NaN at every position that no query of the batch may see."""
    seen = np.zeros((pool.num_pages, pool.page_size), bool)
    for pages, length in zip(np.asarray(batch.block_table), np.asarray(batch.prefix + batch.lengths), strict=True):
        positions = np.arange(len(pages) * pool.page_size).reshape(len(pages), -1)
        seen[pages] = positions < length
    k, v = (jnp.where(seen[None, :, None, :, None], side, jnp.nan) for side in (pool.k, pool.v))
    return KVPool(k=k, v=v)


def attention(q: jax.Array, pool: KVPool, batch: Batch) -> tuple[Callable[..., Any], str]:
    """The attention that this machine uses for such a batch, compiled, and its name."""
    chosen = kernel_for(q, pool, batch)
    return (jax.jit(chosen), chosen.__name__) if chosen else (jax.jit(by_xla), blockwise.__name__)


def by_xla(q: jax.Array, pool: KVPool, layer: jax.Array, batch: Batch) -> jax.Array:
    """XLA's path, which takes the new keys and values as well as the pool that holds them."""
    _, pages, offsets = locate(batch, pool)
    k, v = (side[layer, pages, :, offsets] for side in (pool.k, pool.v))
    return blockwise(q, k, v, pool, layer, batch)


def correctness(sizes: Sizes) -> Iterator[Json]:
    """The largest difference from the float32 reference over ragged batches with NaN around them."""
    page, cpu = sizes.page, jax.devices("cpu")[0]
    prefixes = (20 * page, 0, page + 1, 1, page, page - 1)
    for chunks in sizes.checks:
        prefix_lengths = [prefixes[i % len(prefixes)] for i in range(len(chunks))]
        q, pool, layer, batch = paged(sizes, prefix_lengths, chunks, layers=2)
        pool = poisoned(pool, batch)
        function, name = attention(q, pool, batch)
        actual = np.asarray(function(q, pool, layer, batch).astype(jnp.float32))
        with jax.default_device(cpu):  # the reference is many small steps
            wide_q, wide_pool = jax.tree.map(lambda x: jax.device_put(x, cpu).astype(jnp.float32), (q, pool))
            expected = np.asarray(reference(wide_q, wide_pool, 1, jax.device_put(batch, cpu)))
        error = float(np.abs(actual - expected).max())
        wrong = (
            {}
            if error < TOLERANCE
            else {"wrong": f"{name} is off by {error} at chunks {chunks} after prefixes {prefix_lengths}"}
        )
        row = {"kernel": name, "smallest_chunk": min(chunks), "largest_chunk": max(chunks), "sequences": len(chunks)}
        yield row | {"largest_error": error} | wrong


def over_layers(function: Callable[..., Any], layers: int) -> Callable[..., Any]:
    """One program that attends in each layer of a pool, as a model does.

    A short kernel takes less time than its launch, and one layer's keys and values may still lie in the chip's cache.
    """
    return jax.jit(lambda q, pool, batch: [function(q, pool, jnp.int32(layer), batch) for layer in range(layers)])


def layers_for(sizes: Sizes, tokens: int) -> int:
    """Layers of a pool of so many tokens that `over_layers` takes: as many as fit the memory, up to eight."""
    layer = 2 * tokens * sizes.model.num_kv_heads * sizes.model.head_dim * jnp.dtype(sizes.dtype).itemsize
    return max(1, min(8, POOL_BYTES // layer))


def prefill(sizes: Sizes) -> Iterator[Json]:
    """FLOP/s of attention over a prompt of which a share is cached, ours and the baselines'."""
    config = sizes.model
    shape = (config.num_heads, config.num_kv_heads, config.head_dim)
    for length in sizes.prompts:
        for share in sizes.prefix_shares:
            prefix = int(length * share) // sizes.page * sizes.page
            chunk = length - prefix
            layers = layers_for(sizes, length)
            q, pool, _, batch = paged(sizes, [prefix], [chunk], layers)
            function, name = attention(q, pool, batch)
            # Each query multiplies with the keys that it sees, and their values, once.
            flop = 4 * config.num_heads * config.head_dim * (chunk * prefix + chunk * (chunk + 1) / 2)
            taken = seconds(over_layers(function, layers), q, pool, batch) / layers
            row: Json = {"length": length, "prefix": prefix, "kernel": name, "seconds": taken, "flops": flop / taken}
            del q, pool, batch
            row["torch"] = baselines.torch_attention(chunk, length, 1, *shape)
            if prefix == 0:
                row["jax"] = baselines.jax_attention(length, *shape, seconds)
            for other, key in (("torch", "best"), ("jax", "seconds")):
                if key in row.get(other, {}):
                    row[other]["flops"] = flop / row[other][key]
            yield row


def decode(sizes: Sizes) -> Iterator[Json]:
    """Bytes of keys and values that attention reads a second, one new token per sequence, ours and torch's."""
    config = sizes.model
    for seqs in sizes.decode_batches:
        layers = layers_for(sizes, seqs * sizes.context)
        q, pool, _, batch = paged(sizes, [sizes.context - 1] * seqs, [1] * seqs, layers)
        function, name = attention(q, pool, batch)
        taken = seconds(over_layers(function, layers), q, pool, batch) / layers
        read = (pool.k.nbytes + pool.v.nbytes) / layers
        row: Json = {
            "batch": seqs,
            "context": sizes.context,
            "kernel": name,
            "seconds": taken,
            "bytes_per_s": read / taken,
        }
        del q, pool, batch
        row["torch"] = baselines.torch_attention(
            1, sizes.context, seqs, config.num_heads, config.num_kv_heads, config.head_dim
        )
        if "best" in row["torch"]:
            row["torch"]["bytes_per_s"] = read / row["torch"]["best"]
        yield row


SECTIONS: dict[str, Callable[[Sizes], Iterator[Json]]] = {
    "ceilings": ceilings,
    "correctness": correctness,
    "prefill": prefill,
    "decode": decode,
    "forward": forward_passes,
    "arms": arms,
}


def add_shares(row: Json, limits: Json | None = None) -> None:
    """Add shares of the ceilings to a measurement and its baselines: `mfu` and `of_copy_bandwidth`."""
    for measured in (row, row.get("torch", {}), row.get("jax", {})):
        for key, share in (("flops", "mfu"), ("bytes_per_s", "of_copy_bandwidth")):
            if limits and key in measured and key in limits:
                measured[share] = measured[key] / limits[key]
