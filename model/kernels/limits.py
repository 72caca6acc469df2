"""What the GPU kernels support: one table, read by the dispatcher and by the kernels themselves."""

from __future__ import annotations

import jax

from model.kv import KVPool

SUPPORTED: dict[str, tuple[object, ...]] = {
    "head_dim": (64, 128),
    "page_size": (16, 32, 64, 128),  # whole pages make up a stage of the ring
    "dtype": ("bfloat16",),
}
QUERY_ROWS = 64  # of one wgmma tile, which holds all query heads of a KV head


def unsupported_reason(q: jax.Array, pool: KVPool) -> str | None:
    """Why the GPU kernels cannot compute this, and what they support; None if they can."""
    found: list[tuple[str, str, object]] = [
        ("head_dim", "head_dim", q.shape[-1]),
        ("page_size", "page_size", pool.page_size),
        *[("dtype", f"dtype of {name}", array.dtype.name) for name, array in (("q", q), ("k", pool.k), ("v", pool.v))],
    ]
    for kind, name, value in found:
        if value not in SUPPORTED[kind]:
            return f"{name} is {value}, supported are {', '.join(map(str, SUPPORTED[kind]))}"
    if q.shape[2] > QUERY_ROWS:
        return f"a KV head has {q.shape[2]} query heads, supported are up to {QUERY_ROWS}"
    return None


def refuse_unsupported(q: jax.Array, pool: KVPool) -> None:
    """Raise ValueError for what the kernels do not support, with the reason."""
    if reason := unsupported_reason(q, pool):
        raise ValueError(reason)
