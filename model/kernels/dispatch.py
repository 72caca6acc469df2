"""Which kernel computes a batch, if any: by the device, and by what the kernel supports.

The wrappers refuse by the same rules, so a caller who skips the dispatcher gets the same reason.

Whether a token's result depends on the rest of its batch: the CPU kernels, which run the whole model, give the same
bits in any batch. XLA may round differently in each compiled shape: its norms of 1, 2 and 8 tokens do. The GPU kernels
also split keys by the number of sequences in the shape.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax

from model.batch import Batch
from model.kernels.cpu import build, packing, paged_attention
from model.kernels.limits import QUERY_ROWS, unsupported_reason
from model.kv import KVPool
from model.params import Params, unstacked

log = logging.getLogger("tokenzero.kernels")


def kernel_for(q: jax.Array, pool: KVPool, batch: Batch) -> Callable[..., jax.Array] | None:
    """The kernel to call with (q, pool, layer, batch, window, sinks) on this machine, or None for XLA.

    On a GPU, prefill and decode have different kernels, and a batch of both gets None. Each reason for None is logged
    once.
    """
    if on_cpu():
        if not build.available():
            return None
        if reason := paged_attention.unsupported_reason(q, pool):
            warn_once("CPU kernels", reason)
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


def arranged(params: Params, page_size: int, consume: bool = False) -> Params:
    """Stacked weights as this device reads them fastest, for a pool of this page size.

    On a CPU they are packed for its kernels, or taken apart for XLA where the kernels cannot run the model; the reason
    is logged once. Those kernels know of one device and of attention only, so weights that lie on several devices, and
    those of models with recurrent layers, are taken apart, too. With `consume`, the caller gives `params` up: what is
    packed is deleted, so that memory never holds all weights twice.
    """
    if not on_cpu():
        return params
    if not build.available() or len(params.final_norm.devices()) > 1:
        return unstacked(params)
    if any(run.qkv is None for run in params.runs):  # of a hybrid, the kernels compute attention alone
        return unstacked(params)
    if reason := packing.unsupported_reason(params, page_size):
        warn_once("CPU kernels", reason)
        return unstacked(params)
    return packing.pack(params, page_size, consume)


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
    """Log that XLA computes what kernels could, and why they do not."""
    log.warning("XLA computes attention, not the %s: %s", kernels, reason)
