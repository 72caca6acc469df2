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

from model.batch import Batch
from model.kernels.cpu import build, linear, paged_attention
from model.kernels.limits import QUERY_ROWS, unsupported_reason
from model.kv import KVPool

log = logging.getLogger("tokenzero.kernels")


def kernel_for(q: jax.Array, pool: KVPool, batch: Batch) -> Callable[..., jax.Array] | None:
    """The kernel to call with (q, pool, layer, batch) on this machine, or None where XLA is to do it.

    The GPU's differ for chunks and single tokens: for a batch of both there is none. A device that has to do without
    a kernel is worth one line in the log for each reason.
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
    # Late, because these bring Mosaic along.
    from model.kernels.hopper.decode import paged_decode
    from model.kernels.hopper.prefill import paged_prefill

    return paged_decode if batch.max_chunk * q.shape[2] <= QUERY_ROWS else paged_prefill


def linear_for(x: jax.Array, weight: jax.Array) -> Callable[..., jax.Array] | None:
    """The kernel to call with (x, weight) for so few tokens on a CPU, or None where XLA is to do it."""
    if not on_cpu():
        return None
    if x.shape[0] > linear.MOST_TOKENS or linear.unsupported_reason(x, weight) or not build.available():
        return None
    return linear.linear


def on_cpu() -> bool:
    """Whether the device is a CPU."""
    return bool(jax.devices()[0].platform == "cpu")


@functools.cache
def on_hopper() -> bool:
    """Whether the device is an sm90 GPU: `wgmma` exists nowhere else."""
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0"


@functools.cache
def warn_once(kernels: str, reason: str) -> None:
    """Say that XLA computes attention, and why."""
    log.warning("attention runs on XLA's blockwise path, not on the %s: %s", kernels, reason)
