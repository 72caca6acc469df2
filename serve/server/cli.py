"""`python -m serve --model DIR`: load a checkpoint, compile the engine's steps, and serve until interrupted.

What imports JAX is imported after the arguments are checked, so that `--help` and a refusal come at once.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve.engine.runtime import set_up_jax, user_cache
from serve.server.config import ServerConfig, parse_config

if TYPE_CHECKING:
    import argparse

    import jax

    from cache.tiers import Tiers
    from model.config import ModelConfig
    from model.params import Params
    from serve.audit.auditor import AuditSettings
    from serve.engine.engine import Engine
    from serve.engine.settings import EngineSettings
    from serve.prompt.tokenizer import Tokenizer
    from serve.server.context import ServerContext

log = logging.getLogger("tokenzero")

# On a GPU: memory left free for activations and the compiler's scratch space, besides weights and pool.
DEVICE_MARGIN_BYTES = 3 * 2**30
CPU_POOL_BYTES = 2**30
HOST_BYTES = 4 * 10**9

OnProgress = Callable[[int, int], None]  # is called with what is done and the total


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory."""

    config: ModelConfig
    params: Params
    fingerprint: bytes
    tokenizer: Tokenizer
    dtype: str  # of weights and KV pages


def main(argv: Sequence[str], cli: argparse.ArgumentParser | None = None) -> None:
    """Parse, load, compile, and serve until interrupted."""
    config = parse_config(argv, cli)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # It logs a line for each kind of accelerator that the machine does not have.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    set_up_jax()

    import jax
    from rich.console import Console

    from cache.lmdb_env import StoreError

    console = Console(stderr=True)
    try:
        context = start(config, console)
    except (ValueError, OSError, StoreError) as error:
        sys.exit(f"tokenzero: {error}")
    sizes = context.engine.settings
    console.print(
        f"{config.model}: {sizes.dtype} on {jax.devices()[0].device_kind}, "
        f"{sizes.num_pages} pages of {sizes.page_size} tokens, context {sizes.max_model_len}"
    )
    serve(context)


def start(config: ServerConfig, console: Any) -> ServerContext:
    """Load and compile, with progress on a rich console. Raises ValueError, OSError and StoreError."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from serve.server.context import make_context

    columns = (TextColumn("{task.description:<20}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def bar(title: str) -> OnProgress:
            task = progress.add_task(title, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        model = load_model(config, bar("loading weights"))
        engine = build_engine(config, model, bar("compiling steps"))
        report_template(config.model, model.tokenizer)
        stops = stop_ids(model.config.eos_token_ids, model.tokenizer.hf)
        return make_context(engine, model.tokenizer, stops, config)


def load_model(config: ServerConfig, on_progress: OnProgress) -> LoadedModel:
    """Read the checkpoint and its tokenizer. Raises ValueError and OSError for what is not a checkpoint."""
    import jax

    from model import checkpoint
    from model.kernels.dispatch import arranged
    from serve.prompt.tokenizer import load_tokenizer

    on_cpu = jax.default_backend() == "cpu"
    dtype = config.dtype if config.dtype != "auto" else ("float32" if on_cpu else "bfloat16")
    folder = checkpoint.resolve(config.model)
    tokenizer = load_tokenizer(str(folder), config.tool_parser, config.state_dir, config.bounds.segments)
    model_config, params = checkpoint.load(folder, jax.numpy.dtype(dtype), on_progress)
    fingerprint = checkpoint.fingerprint(model_config, params)
    return LoadedModel(model_config, arranged(params, config.page_size), fingerprint, tokenizer, dtype)


def report_template(name: str, tokenizer: Tokenizer) -> None:
    """Log what does not work with the checkpoint's chat template, and what follows from it."""
    from serve.prompt.check import check_template

    for finding in check_template(tokenizer):
        log.warning("chat template of %s: %s", name, finding)


def build_engine(config: ServerConfig, model: LoadedModel, on_progress: OnProgress) -> Engine:
    """The engine with its tiers, compiled steps and auditor; it is not started yet.

    Raises StoreError for a store that cannot be used, ValueError and OSError for a cost model that cannot be read.
    """
    import jax

    from serve.audit.auditor import attach
    from serve.engine.cost import load_constants
    from serve.engine.engine import Engine

    sizes = engine_settings(config, model.config, model.params, model.dtype)
    costs = load_constants(config.cost_model, model.config) if config.cost_model else None
    tiers = open_tiers(config, jax.default_backend() == "cpu")
    engine = Engine(model.params, model.config, sizes, model.fingerprint, tiers, on_progress=on_progress, costs=costs)
    attach(engine, audit_settings(config))
    return engine


def serve(context: ServerContext) -> None:
    """Listen until interrupted."""
    import uvicorn

    from serve.server.app import create_app

    config = context.config
    app = create_app(context)
    # What is loaded stays: each full garbage collection that looks through it would stop all threads for up to 0.3 s.
    gc.collect()
    gc.freeze()
    uvicorn.run(
        app, host=config.host, port=config.port, log_level="info", access_log=False, timeout_graceful_shutdown=10
    )


def engine_settings(config: ServerConfig, model: ModelConfig, params: Params, dtype: str) -> EngineSettings:
    """The engine's sizes: as many pages as fit, and a context no longer than they hold. Raises SystemExit if not."""
    import jax
    import numpy as np

    from model.kv import bytes_per_token
    from serve.audit.auditor import audit_pages
    from serve.engine.settings import EngineSettings

    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    taken = weights + config.restore_bytes + config.write_queue_bytes
    budget = pool_bytes(jax.devices()[0], taken) if config.kv_pool_bytes is None else config.kv_pool_bytes
    page = config.page_size * bytes_per_token(model, np.dtype(jax.numpy.dtype(dtype)))
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
        speculative_tokens=config.speculative_tokens,
        restore_bytes=config.restore_bytes,
        stop_seconds=config.stop_seconds,
        dtype=dtype,
        audit_pages=own,
    )


def audit_settings(config: ServerConfig) -> AuditSettings:
    """What the auditor may use."""
    from serve.audit.auditor import AuditSettings

    folder = config.audit_dir or (config.state_dir or user_cache()) / "audits"
    return AuditSettings(config.audit_share, folder, sample_bytes=config.bounds.audits)


def pool_bytes(device: jax.Device, taken: int) -> int:
    """The default size of the KV pool in bytes.

    On a GPU, all memory except a margin and the `taken` bytes: the weights, and pages on their way between the pool and
    the tiers. On a CPU, 1 GiB, or half of the available memory if that is less.
    """
    stats = device.memory_stats()
    if device.platform != "cpu" and stats:
        return max(0, int(stats["bytes_limit"]) - taken - DEVICE_MARGIN_BYTES)
    import psutil

    return min(CPU_POOL_BYTES, int(psutil.virtual_memory().available) // 2)


def open_tiers(config: ServerConfig, on_cpu: bool) -> Tiers | None:
    """The tiers below the device, or None if the flags ask for none. Raises StoreError and ValueError, see Tiers."""
    import psutil

    from cache.tiers import Tiers

    spare = 0 if on_cpu else min(HOST_BYTES, psutil.virtual_memory().total // 4)
    host_bytes = spare if config.host_cache_bytes is None else config.host_cache_bytes
    if not config.store and not host_bytes:
        return None
    return Tiers(config.store, config.store_bytes, host_bytes, config.flush_seconds, config.write_queue_bytes)


def stop_ids(declared: tuple[int, ...], tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the model's declared ones, the tokenizer's own, and the ends of calls.

    Llama 3.1 ends a call with `<|eom_id|>`, gpt-oss with `<|call|>`.
    """
    ends = ("<|eom_id|>", "<|call|>")
    calls = [id for id, token in tokenizer.added_tokens_decoder.items() if str(token) in ends]
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return frozenset([*declared, *own, *calls])
