"""How large the engine is: KV pages, context and devices, from the flags and what this machine has of memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serve.engine.runtime import user_cache
from serve.server.config import ServerConfig

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from model.config import ModelConfig
    from model.params import Params
    from serve.audit.auditor import AuditSettings
    from serve.engine.settings import EngineSettings

log = logging.getLogger("tokenzero")

# On a GPU: memory left free for activations and the compiler's scratch space, besides weights and pool.
DEVICE_MARGIN_BYTES = 3 * 2**30
CPU_POOL_BYTES = 2**30


def mesh_of(model: ModelConfig, count: int) -> Mesh | None:
    """The devices of `--tp`; None for one. Raises ValueError for a number that the heads or this machine rule out."""
    from model.sharding import make_mesh

    try:
        return make_mesh(model, count)
    except ValueError as error:
        raise ValueError(f"--tp: {error}") from error


def engine_settings(
    config: ServerConfig, model: ModelConfig, params: Params, dtype: str, mesh: Mesh | None = None
) -> EngineSettings:
    """The engine's sizes: as many pages as fit, and a context no longer than they hold. Raises SystemExit if not."""
    import jax

    from cache.retained_file import FOLDER
    from model.kv import bytes_per_token
    from model.kv_rows import pool_dtype
    from model.sharding import pool_heads
    from serve.audit.auditor import audit_pages
    from serve.engine.settings import EngineSettings

    devices = jax.devices()[: config.tp]
    # Of each page, since several devices have the same head where there are more of them than heads.
    copies = len(devices) * pool_heads(model, mesh) // model.num_kv_heads
    taken = weight_bytes(params) + copies * (config.restore_bytes + config.write_queue_bytes) // len(devices)
    budget = pool_bytes(devices, taken) if config.kv_pool_bytes is None else config.kv_pool_bytes
    page = copies * config.page_size * bytes_per_token(model, pool_dtype(config.kv_dtype or dtype))
    pages = budget // page
    if pages < 2:
        raise SystemExit(f"--kv-pool-bytes: {budget} bytes hold {pages} pages of {page} bytes, expected at least 2")
    longest = (pages - 1) * config.page_size
    if config.max_model_len and config.max_model_len > min(longest, model.max_position):
        raise SystemExit(
            f"--max-model-len: got {config.max_model_len}, but the model takes {model.max_position} tokens "
            f"and the KV pool of {budget} bytes holds {longest}"
        )
    own = audit_pages(pages, config.page_size, audit_settings(config))
    if config.max_model_len and config.max_model_len > longest - own * config.page_size:
        own = 0  # the requested context has priority
    if config.audit_share and not own:
        log.info("auditing is off: the KV pool of %d pages has none to spare for it; see --kv-pool-bytes", pages)
    return EngineSettings(
        num_pages=pages - own,
        max_model_len=min(config.max_model_len or model.max_position, longest - own * config.page_size),
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        max_queue=config.max_queue,
        max_prefill_tokens=config.max_prefill_tokens,
        tensor_parallel=config.tp,
        speculative_tokens=config.speculative_tokens,
        restore_bytes=config.restore_bytes,
        preload_bytes=config.preload_bytes,
        retain_pages=(pages - own) // 4 if config.retain_bytes is None else config.retain_bytes // page,
        retained_folder=config.state_dir and config.state_dir / FOLDER,
        stop_seconds=config.stop_seconds,
        dtype=dtype,
        quantize=config.quantize,
        kv_dtype=config.kv_dtype,
        audit_pages=own,
        compile_in_background=True,
    )


def audit_settings(config: ServerConfig) -> AuditSettings:
    """What the auditor may use."""
    from serve.audit.auditor import AuditSettings

    folder = config.audit_dir or (config.state_dir or user_cache()) / "audits"
    return AuditSettings(config.audit_share, folder, sample_bytes=config.bounds.audits)


def weight_bytes(params: Params) -> int:
    """The bytes of the weights that each device has."""
    import jax

    return sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards[:1])


def pool_bytes(devices: Sequence[jax.Device], taken: int) -> int:
    """The default size of the KV pool in bytes, on all devices together.

    On GPUs, as much on each as the one with the least has: its memory except a margin and the `taken` bytes, which are
    the weights, and pages on their way between the pool and the tiers. On a CPU, 1 GiB, or half of the available memory
    if that is less.
    """
    if (limit := gpu_memory(devices)) is not None:
        return len(devices) * max(0, limit - taken - DEVICE_MARGIN_BYTES)
    import psutil

    return min(CPU_POOL_BYTES, int(psutil.virtual_memory().available) // 2)


def device_bytes(devices: Sequence[jax.Device]) -> int:
    """What each device has for weights and KV pages: on a GPU its memory but a margin, on a CPU what is available."""
    if (limit := gpu_memory(devices)) is not None:
        return max(0, limit - DEVICE_MARGIN_BYTES)
    import psutil

    return int(psutil.virtual_memory().available) // len(devices)


def gpu_memory(devices: Sequence[jax.Device]) -> int | None:
    """The bytes of the GPU with the least memory; None where there is no GPU, or none that tells."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices if device.platform != "cpu"]
    return min((int(limit) for limit in limits if limit), default=None)
