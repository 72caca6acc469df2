"""The device page pool as arrays: its layout, and the only functions that write to it outside the forward pass.

Which page belongs to whom is the business of `cache`; here a page is just a number.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Int32, Shaped

from model.config import ModelConfig
from model.kv_rows import encode, head_dim_of, row_size

Pages = Int[jax.Array | np.ndarray, "count"]  # page numbers


@struct.dataclass
class KVPool:
    """Keys and values of every page: the one large buffer, donated from step to step.

    Layers are numbered among those with attention.

    A (page, KV head) pair is one contiguous [page_size, row] tile: what a TMA box loads in one copy, and what the
    blockwise XLA path feeds to a matmul without a transpose. A row has head_dim elements, or more if it is quantised
    (`model/kv_rows.py`).
    """

    k: Shaped[jax.Array, "layers pages kv_heads page_size row"]
    v: Shaped[jax.Array, "layers pages kv_heads page_size row"]

    @property
    def num_pages(self) -> int:
        """Pages in the pool; writes to a page number from this one on are dropped."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.k.shape[3]

    @property
    def head_dim(self) -> int:
        """Numbers of a key or value."""
        return head_dim_of(self.k.shape[4], self.k.dtype)


def bytes_per_token(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes that one token's keys and values take over all layers, in a pool of this dtype."""
    row = row_size(config.head_dim, dtype) * jnp.dtype(dtype).itemsize
    return 2 * config.attention_layers * config.num_kv_heads * row


def empty_pool(
    config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike, sharding: jax.sharding.Sharding | None = None
) -> KVPool:
    """A pool of zeros for `num_pages` pages of `page_size` tokens, made where it belongs: on each device its part."""
    shape = (config.attention_layers, num_pages, config.num_kv_heads, page_size, row_size(config.head_dim, dtype))
    return KVPool(k=jnp.zeros(shape, dtype, device=sharding), v=jnp.zeros(shape, dtype, device=sharding))


def write(
    pool: KVPool,
    layer: jax.Array | int,
    k: Float[jax.Array, "tokens kv_heads head_dim"],
    v: Float[jax.Array, "tokens kv_heads head_dim"],
    pages: Int32[jax.Array, "tokens"],
    offsets: Int32[jax.Array, "tokens"],
) -> KVPool:
    """Scatter one layer's new keys and values to their slots; tokens with an out-of-range page are dropped.

    A kernel of our own would gain next to nothing on a GPU: XLA rotates the keys inside the scatter, so they go
    straight from the projection into the page (`experiments.gpu.aot` checks that). Bytes moved per token in one layer
    of the shape of Llama 3.1 8B, in bf16, as compiled:

        projection in and out          8,192 + 12,288
        keys and values into pages     4,096 +  4,096   (6,144 + 6,144 if the keys were rotated separately)
        the whole layer, without the cached keys and values that attention reads       331,776

    A projection that wrote to the pages itself would save a read of 4,096 bytes, 1.2% of the layer: 7 GB, or 1.5 ms at
    4.8 TB/s, for a cold prompt of 53,248 tokens, which takes 1.4e15 floating-point operations.
    """
    return KVPool(
        k=pool.k.at[layer, pages, :, offsets].set(encode(k, pool.k.dtype), mode="drop"),
        v=pool.v.at[layer, pages, :, offsets].set(encode(v, pool.v.dtype), mode="drop"),
    )


def gather_pages(pool: KVPool, pages: Pages) -> Shaped[jax.Array, "count 2 layers kv_heads page_size row"]:
    """A copy of whole pages, keys before values: each page is one run of bytes."""
    return jnp.moveaxis(jnp.stack([pool.k[:, pages], pool.v[:, pages]]), 2, 0)


def scatter_pages(
    pool: KVPool,
    pages: Pages,
    data: Shaped[jax.Array | np.ndarray, "count 2 layers kv_heads page_size row"],
) -> KVPool:
    """Write pages that `gather_pages` copied to `pages` of the pool; an out-of-range page is dropped."""
    k, v = jnp.moveaxis(data, 0, 2)  # [layers, count, kv_heads, page_size, row]
    return KVPool(k=pool.k.at[:, pages].set(k, mode="drop"), v=pool.v.at[:, pages].set(v, mode="drop"))


def copy_pages(
    pool: KVPool,
    sources: Pages,
    targets: Pages,  # out of range where there is nothing to copy
) -> KVPool:
    """Copy whole pages over all layers: a sequence that shares only the start of a page continues in a copy of it."""
    return KVPool(
        k=pool.k.at[:, targets].set(pool.k[:, sources], mode="drop"),
        v=pool.v.at[:, targets].set(pool.v[:, sources], mode="drop"),
    )
