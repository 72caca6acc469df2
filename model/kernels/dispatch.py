"""Which kernel computes a batch, if any: what the GPU kernels take, in one table, and the device that each needs.

The wrappers refuse by the same rules, so that a caller who skips the dispatcher hears the same reason.

Whether a token's result depends on the rest of its batch: the CPU kernels give the same bits in any company. XLA, which
does the rest and all products of more than `linear.MOST_TOKENS` tokens, may round otherwise in each compiled shape: its
products differ from the kernel's in the last bits, and so do its norms of 1, 2 and 8 tokens. So on a CPU a sequence
gets the same bits in any company that fills the same compiled shape. The GPU kernels split keys by the number of
sequences in the shape, too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax

from model.attention import Batch
from model.kernels.cpu import build, linear, paged_attention
from model.kv import KVPool

log = logging.getLogger("tokenzero.kernels")

SUPPORTED: dict[str, tuple[object, ...]] = {
    "head_dim": (64, 128),
    "page_size": (16, 32, 64, 128),  # whole pages make up a stage of the ring
    "dtype": ("bfloat16",),
}
QUERY_ROWS = 64  # of one wgmma tile: it holds all query heads of a KV head


def kernel_for(q: jax.Array, pool: KVPool, batch: Batch) -> Callable[..., jax.Array] | None:
    """The kernel to call with (q, pool, layer, batch) on this machine, or None where XLA is to do it.

    The GPU's differ for chunks and single tokens: for a batch of both there is none. A device that has to do without
    a kernel is worth one line in the log for each reason.
    """
    if on_cpu():
        if not build.available():
            return None
        if reason := paged_attention.why_not(q, pool):
            warn_once("CPU kernel", reason)
            return None
        return paged_attention.paged_attention
    if not on_hopper() or batch.singles:
        return None
    if reason := why_not(q, pool):
        warn_once("GPU kernels", reason)
        return None
    # Late, because these bring Mosaic along.
    from model.kernels.paged_decode import paged_decode
    from model.kernels.paged_prefill import paged_prefill

    return paged_decode if batch.max_chunk * q.shape[2] <= QUERY_ROWS else paged_prefill


def linear_for(x: jax.Array, weight: jax.Array) -> Callable[..., jax.Array] | None:
    """The kernel to call with (x, weight) for so few tokens on a CPU, or None where XLA is to do it."""
    if not on_cpu():
        return None
    if x.shape[0] > linear.MOST_TOKENS or linear.why_not(x, weight) or not build.available():
        return None
    return linear.linear


def on_cpu() -> bool:
    """Whether the device is a CPU."""
    return jax.devices()[0].platform == "cpu"


@functools.cache
def on_hopper() -> bool:
    """Whether the device is an sm90 GPU: `wgmma` exists nowhere else."""
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0"


@functools.cache
def warn_once(kernels: str, reason: str) -> None:
    """Say that XLA computes attention, and why."""
    log.warning("attention runs on XLA's blockwise path, not on the %s: %s", kernels, reason)


def why_not(q: jax.Array, pool: KVPool) -> str | None:
    """Why the GPU kernels cannot compute this, with what they can; None if they can."""
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
    """Raise ValueError with what the kernels take, if this is not it."""
    reason = why_not(q, pool)
    if reason is not None:
        raise ValueError(reason)
