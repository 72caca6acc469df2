"""Which kernel computes a batch, if any: by the device, and by what the kernel supports.

The wrappers refuse by the same rules, so a caller who skips the dispatcher gets the same reason.

Whether a token's result depends on the rest of its batch: the CPU kernels give the same bits in any batch. XLA, which
does the rest and all products of more than `linear.MAX_TOKENS` tokens, may round differently in each compiled shape:
its products differ from the kernel's in the last bits, and so do its norms of 1, 2 and 8 tokens. So on a CPU a
sequence gets the same bits in any batch of the same compiled shape. The GPU kernels also split keys by the number of
sequences in the shape.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax

from model.batch import Batch
from model.kernels.cpu import build, linear, paged_attention
from model.kernels.limits import QUERY_ROWS, unsupported_reason
from model.kv import KVPool

log = logging.getLogger("tokenzero.kernels")


def kernel_for(q: jax.Array, pool: KVPool, batch: Batch) -> Callable[..., jax.Array] | None:
    """The kernel to call with (q, pool, layer, batch) on this machine, or None for XLA.

    On a GPU, prefill and decode have different kernels, and a batch of both gets None. Each reason for None is logged
    once.
    """
    if on_cpu():
        if not build.available():
            return None
        if reason := paged_attention.unsupported_reason(q, pool):
            warn_once("CPU kernel", reason)
            return None
        return paged_attention.paged_attention
    if not on_hopper() or batch.decode_seqs:
        return None
    if reason := unsupported_reason(q, pool):
        warn_once("GPU kernels", reason)
        return None
    # Imported late: these import Mosaic.
    from model.kernels.hopper.decode import paged_decode
    from model.kernels.hopper.prefill import paged_prefill

    return paged_decode if batch.max_chunk * q.shape[2] <= QUERY_ROWS else paged_prefill


def linear_for(x: jax.Array, weight: jax.Array) -> Callable[..., jax.Array] | None:
    """The kernel to call with (x, weight) for few tokens on a CPU, or None for XLA."""
    if not on_cpu():
        return None
    if x.shape[0] > linear.MAX_TOKENS or linear.unsupported_reason(x, weight) or not build.available():
        return None
    return linear.linear


def on_cpu() -> bool:
    """Whether the device is a CPU."""
    return bool(jax.devices()[0].platform == "cpu")


@functools.cache
def on_hopper() -> bool:
    """Whether the device is an sm90 GPU, the only kind that has `wgmma`."""
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0"


@functools.cache
def warn_once(kernels: str, reason: str) -> None:
    """Log that XLA computes attention, and why."""
    log.warning("attention runs on XLA's blockwise path, not on the %s: %s", kernels, reason)
