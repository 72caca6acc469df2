"""`python -m serve --model DIR`: listen, load a checkpoint, compile the engine's steps, and serve until interrupted.

The port is open while the rest is loaded, by two threads: one reads weights and compiles, the other makes what text
needs. What imports JAX is imported by these, so that `--help`, a refusal and `/health` come at once.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from serve.engine.runtime import leave_out_torch, set_up_jax, user_cache
from serve.server.config import ServerConfig, parse_config
from serve.server.threads import end_process, in_thread

if TYPE_CHECKING:
    import argparse
    from concurrent.futures import Future

    import jax
    from jax.sharding import Mesh
    from starlette.applications import Starlette

    from cache.tiers import Tiers
    from model.config import ModelConfig
    from model.params import Params
    from serve.audit.auditor import AuditSettings
    from serve.engine.engine import Engine
    from serve.engine.settings import EngineSettings
    from serve.prompt.tokenizer import Tokenizer
    from serve.server.progress import OnProgress, StartProgress

log = logging.getLogger("tokenzero")

C = TypeVar("C", bound=ServerConfig)
# On a GPU: memory left free for activations and the compiler's scratch space, besides weights and pool.
DEVICE_MARGIN_BYTES = 3 * 2**30
CPU_POOL_BYTES = 2**30
HOST_BYTES = 4 * 10**9
INTERRUPTED = 130  # the exit status of what Ctrl-C has ended, as shells count it


@dataclass(frozen=True)
class LoadedModel:
    """The weights of a checkpoint in memory."""

    config: ModelConfig
    params: Params
    fingerprint: bytes
    dtype: str  # of weights and KV pages
    mesh: Mesh | None  # the devices that it is divided over, if several


def main(argv: Sequence[str], cli: argparse.ArgumentParser | None = None) -> None:
    """Parse, listen, load, and serve until interrupted."""
    config = parse_config(argv, cli)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # It logs a line for each kind of accelerator that the machine does not have.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    try:
        check_folder(config.model)
    except (ValueError, OSError) as error:
        sys.exit(f"tokenzero: {error}")
    gc.disable()  # until all is loaded: it stays, so that looking through it finds nothing
    listen(config, load)


def check_folder(model: str) -> None:
    """Raise ValueError or OSError for a local folder or file that is no checkpoint, before anything is loaded."""
    from model.families import load_config
    from model.formats.gguf_file import is_gguf
    from serve.prompt.tokenizer import check_tokenizer_file

    if (folder := Path(model).expanduser()).is_dir() or is_gguf(folder):
        check_tokenizer_file(folder)
        load_config(folder)


def listen(config: C, load: Callable[[C, StartProgress], Starlette]) -> None:
    """Open the port, `load` the application, and serve until interrupted.

    Ends the process if the port cannot be opened or loading fails. Raises SystemExit.
    """
    import uvicorn

    from serve.server.progress import StartProgress, progress_bars
    from serve.server.starting import StartingApp

    if config.api_key_file:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which reads the file again once requests are served
    progress = StartProgress(progress_bars())
    loading = in_thread(load, config, progress)

    def stopping() -> bool:
        return server.should_exit

    def stop() -> None:
        server.should_exit = True

    def loaded(loading: Future[Starlette]) -> None:
        progress.close()
        server.should_exit = server.should_exit or loading.exception() is not None

    app = StartingApp(loading, progress, stopping, stop)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_level="info",
            access_log=False,
            timeout_graceful_shutdown=10,
        )
    )
    loading.add_done_callback(loaded)
    status = 0
    try:
        server.run()
    except KeyboardInterrupt:  # raised again once the server has stopped
        status = 0 if loading.done() else INTERRUPTED
    except SystemExit as ended:  # the port could not be opened; the log says why
        status = int(ended.code or 0)
    error = loading.exception() if loading.done() else None
    if not loading.done() or error or app.failure:
        progress.close()
        end_process(error or app.failure, status)
    sys.exit(status)


def load(config: ServerConfig, progress: StartProgress) -> Starlette:
    """The application over all that it needs. Raises ValueError, OSError, StoreError and SystemExit."""
    with progress.phase("imports"):
        leave_out_torch()
        set_up_jax()
        import jax

        import serve.engine.engine  # before another thread takes its turns  # noqa: F401
        from model import checkpoint
    folder = checkpoint.resolve(config.model)
    text = in_thread(load_text, config, folder, progress)
    engine = in_thread(load_engine, config, folder, progress)
    loaded = Event()
    preloaded = in_thread(preload, engine, loaded, progress)
    both: list[Future[Any]] = [text, engine]
    wait(both, return_when=FIRST_EXCEPTION)
    for each in both:
        if each.done():
            each.result()  # raises what it raised, while the other may still be at work
    with progress.phase("server"):
        from serve.server.app import create_app
        from serve.server.context import make_context

        tokenizer, sizes = text.result(), engine.result().settings
        stops = stop_ids(engine.result().config.eos_token_ids, tokenizer.hf)
        app = create_app(make_context(engine.result(), tokenizer, stops, config))
        loaded.set()
        preloaded.result()  # before the engine's own thread goes on with it
        # What is loaded stays: each full garbage collection that looks through it would stop all threads for 0.3 s.
        gc.freeze()
        gc.enable()
    log.info(
        "%s: %s on %s%s, %d pages of %d tokens, context %d%s",
        config.model,
        sizes.dtype,
        f"{sizes.tensor_parallel} x " if sizes.tensor_parallel > 1 else "",
        jax.devices()[0].device_kind,
        sizes.num_pages,
        sizes.page_size,
        sizes.max_model_len,
        f", KV pages in {sizes.kv_dtype}" if sizes.kv_dtype else "",
    )
    return app


def load_text(config: ServerConfig, folder: Path, progress: StartProgress) -> Tokenizer:
    """The checkpoint's tokenizer; reports what its chat template cannot do. Raises ValueError and OSError."""
    with progress.phase("tokenizer"):
        from serve.prompt.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(str(folder), config.tool_parser, config.state_dir, config.bounds.segments)
    with progress.phase("template"):
        report_template(config.model, tokenizer)
        import serve.server.app  # noqa: F401 (while steps compile)
    return tokenizer


def load_engine(config: ServerConfig, folder: Path, progress: StartProgress) -> Engine:
    """The engine over the checkpoint's weights. Raises what `load_model` and `build_engine` raise."""
    model = load_model(config, folder, progress)
    with progress.phase("steps") as on_progress:
        return build_engine(config, model, on_progress)


def preload(engine: Future[Engine], loaded: Event, progress: StartProgress) -> None:
    """Read pages of the store while the engine is waiting for the rest of the server, until that is `loaded`."""
    made = engine.result()
    with progress.phase("preload"):
        made.preload(loaded.is_set)
    if made.core.preloader and (pages := len(made.core.preloader.preloaded)):
        log.info("%d pages are preloaded", pages)


def load_model(config: ServerConfig, folder: Path, progress: StartProgress) -> LoadedModel:
    """Read the weights. Raises ValueError and OSError for what is not a checkpoint, and what `mesh_of` raises."""
    import jax

    from model import checkpoint
    from model.families import load_config
    from model.kernels.dispatch import arranged
    from model.rope_scaling import parse_rope_scaling, with_rope_scaling
    from model.sharding import shard_params
    from serve.server.fit import refuse_too_big

    mesh = mesh_of(load_config(folder), config.tp)
    on_cpu = jax.default_backend() == "cpu"
    dtype = config.dtype if config.dtype != "auto" else ("float32" if on_cpu else "bfloat16")
    refuse_too_big(config, folder, dtype, mesh, device_bytes(jax.devices()[: config.tp]))
    with progress.phase("weights") as on_progress:
        model_config, params = checkpoint.load(folder, jax.numpy.dtype(dtype), on_progress, config.tp, config.quantize)
    if config.rope_scaling:
        model_config = with_rope_scaling(model_config, parse_rope_scaling(config.rope_scaling))
    with progress.phase("fingerprint"):
        fingerprint = checkpoint.fingerprint(model_config, params)
    with progress.phase("packing"):
        params = arranged(shard_params(params, mesh), config.page_size, consume=True)
    return LoadedModel(model_config, params, fingerprint, dtype, mesh)


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


def mesh_of(model: ModelConfig, count: int) -> Mesh | None:
    """The devices of `--tp`; None for one. Raises ValueError for a number that the heads or this machine rule out."""
    from model.sharding import make_mesh

    try:
        return make_mesh(model, count)
    except ValueError as error:
        raise ValueError(f"--tp: {error}") from error


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
    from serve.cost.file import load_constants
    from serve.engine.engine import Engine

    sizes = engine_settings(config, model.config, model.params, model.dtype, model.mesh)
    costs = load_constants(config.cost_model, model.config) if config.cost_model else None
    tiers = open_tiers(config, jax.default_backend() == "cpu")
    engine = Engine(model.params, model.config, sizes, model.fingerprint, tiers, on_progress=on_progress, costs=costs)
    attach(engine, audit_settings(config))
    return engine


def engine_settings(
    config: ServerConfig, model: ModelConfig, params: Params, dtype: str, mesh: Mesh | None = None
) -> EngineSettings:
    """The engine's sizes: as many pages as fit, and a context no longer than they hold. Raises SystemExit if not."""
    import jax

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
