"""How recomputed pages and logits are compared with cached ones, and what difference is too large."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cache.tier import Payload
from model.kv import KVPool, gather_pages
from model.kv_rows import decode
from serve.audit.findings import Mismatch
from serve.engine.page_copies import pages_sharding
from serve.engine.programs import LAST_RANK, Programs

# The largest allowed difference, as a share of the largest value of the same token: in a page's keys or values of one
# layer, or in the logits. In float32 it is the project's bound on exactness. In bfloat16, whose steps are 2^-8 of a
# value, chunks of different lengths of one prompt differ by less than a quarter of this (two layers, on a CPU).
# Where pages are quantised, rounding that differs a little may take a number to the next step, 1/127 of its row's
# largest or 1/8 of itself, and later layers build on it.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.1, "fp8": 0.5}
# Pages that are compared at once, and read from the tiers at once.
COMPARED = 4


@dataclass(frozen=True)
class PageComparison:
    """Programs: `gather(pool, pages)` copies COMPARED pages, `measure(ours, theirs)` is `distances` of such copies."""

    gather: Callable[..., jax.Array]
    measure: Callable[..., tuple[jax.Array, jax.Array]]
    shape: tuple[int, ...]  # COMPARED, k and v, layers, kv_heads, page_size, row
    dtype: np.dtype
    bound: float  # as in TOLERANCE

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.shape[4]

    def copies(self, pool: KVPool, pages: Sequence[int]) -> jax.Array:
        """Copies of up to COMPARED pages of the pool, [COMPARED, *page_shape]; the last one fills what is left."""
        padded = [*pages, *[pages[-1]] * (COMPARED - len(pages))]
        return self.gather(pool, np.asarray(padded, np.int32))

    def decode(self, payloads: Sequence[Payload | None]) -> tuple[list[int], np.ndarray]:
        """Stored pages as arrays, [COMPARED, *page_shape], and which of the payloads they are.

        Payloads that are missing, or have a length of their own, are left out.
        """
        shape = self.shape[1:]
        size = math.prod(shape) * self.dtype.itemsize
        found = [i for i, data in enumerate(payloads) if data is not None and memoryview(data).nbytes == size]
        stored = np.zeros(self.shape, self.dtype)
        for place, i in enumerate(found):
            stored[place] = np.frombuffer(payloads[i], self.dtype).reshape(shape)  # type: ignore[arg-type]
        return found, stored

    def first_difference(
        self,
        source: str,
        indices: Sequence[int],  # of the pages in their sequence
        ours: jax.Array,  # [COMPARED, *page_shape]
        theirs: jax.Array | np.ndarray,  # the same
        tokens: range,  # of the sequence; the others are not compared
    ) -> Mismatch | None:
        """The first token whose keys or values differ by too much; its page and all after it are not to be trusted."""
        errors, sizes = (np.asarray(each) for each in self.measure(ours, theirs))
        for index, error, size in zip(indices, errors, sizes, strict=False):  # [k and v, layers, page_size]
            first = index * self.page_size
            filled = slice(max(0, tokens.start - first), min(self.page_size, tokens.stop - first))
            scale = size[..., filled].max(-1, keepdims=True)
            wrong = ~(error[..., filled] <= self.bound * scale) & np.isfinite(scale)
            if wrong.any():
                offset, layer, part = (int(i) for i in np.argwhere(wrong.transpose(2, 1, 0))[0])
                return Mismatch(
                    "page",
                    source,
                    position=first + filled.start + offset,
                    drop=first,
                    layer=layer,
                    part=("keys", "values")[part],
                    error=float(error[part, layer, filled][offset]),
                    scale=float(scale[part, layer, 0]),
                )
        return None

    def too_large(self, error: float, scale: float) -> bool:
        """Whether a difference of logits is too large; logits that are not finite by themselves prove nothing."""
        return math.isfinite(scale) and not error <= self.bound * scale


def distances(
    ours: jax.Array,  # [pages, k and v, layers, kv_heads, page_size, row]
    theirs: jax.Array,  # the same
) -> tuple[jax.Array, jax.Array]:
    """Each token's largest difference, and its largest value in `ours`: [pages, k and v, layers, page_size] float32."""
    a, b = (decode(rows, jnp.float32).astype(jnp.float32) for rows in (ours, theirs))
    return jnp.abs(a - b).max((3, 5)), jnp.abs(a).max((3, 5))


def make_comparison(programs: Programs, pool: KVPool, bound: float) -> PageComparison:
    """Declare the comparison for pages of a pool of this shape; nothing is compiled yet."""
    layers, _, *tile = pool.k.shape
    shape, place = (COMPARED, 2, layers, *tile), pages_sharding(pool, programs.mesh)
    pages, data = (
        jax.ShapeDtypeStruct((COMPARED,), jnp.int32),
        jax.ShapeDtypeStruct(shape, pool.k.dtype, sharding=place),
    )
    gather = programs.add(LAST_RANK, "gather of an audit", gather_pages, (pool, pages), data)
    measure = programs.add(LAST_RANK, "comparison of an audit", distances, (data, data), (0, 0))
    return PageComparison(gather, measure, shape, np.dtype(pool.k.dtype), bound)
