"""What a server loads: weights, compiled steps, tiers and text, by two threads, and the application over them.

What imports JAX is imported by these functions, so that `--help`, a refusal and `/health` come at once.
"""

from __future__ import annotations

import gc
import logging
import time
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from serve.engine.runtime import leave_out_torch, set_up_jax
from serve.server.config import ServerConfig
from serve.server.sizing import audit_settings, device_bytes, engine_settings, mesh_of
from serve.server.threads import in_thread

if TYPE_CHECKING:
    from concurrent.futures import Future

    from jax.sharding import Mesh
    from starlette.applications import Starlette

    from cache.tiers import Tiers
    from model.config import ModelConfig
    from model.params import Params
    from serve.engine.engine import Engine
    from serve.prompt.tokenizer import Tokenizer
    from serve.server.progress import OnProgress, StartProgress

log = logging.getLogger("tokenzero")

HOST_BYTES = 4 * 10**9
AWAITED_SECONDS = 2.0  # by which a start is later, at most, for pages of the store


@dataclass(frozen=True)
class LoadedModel:
    """The weights of a checkpoint in memory."""

    config: ModelConfig
    params: Params
    fingerprint: bytes
    dtype: str  # of weights and KV pages
    mesh: Mesh | None  # the devices that it is divided over, if several


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
        check_vocabulary(tokenizer.hf, engine.result().vocab_size, folder)
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


def check_vocabulary(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model; a few that were added to it do not count."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, expected at most the model's vocab_size of "
            f"{vocab_size}: tokenizer and weights belong to different checkpoints"
        )


def load_engine(config: ServerConfig, folder: Path, progress: StartProgress) -> Engine:
    """The engine over the checkpoint's weights. Raises what `load_model` and `build_engine` raise."""
    model = load_model(config, folder, progress)
    with progress.phase("steps") as on_progress:
        return build_engine(config, model, on_progress)


def preload(engine: Future[Engine], loaded: Event, progress: StartProgress) -> None:
    """Read pages of the store while the engine is waiting for the rest of the server, until that is `loaded`.

    It is waited for a little longer, since what comes first is expected soonest.
    """
    made, end = engine.result(), 0.0

    def enough() -> bool:
        nonlocal end
        if not loaded.is_set():
            return False
        end = end or time.monotonic() + AWAITED_SECONDS
        return not (made.core.preloader and made.core.preloader.ahead) or time.monotonic() > end

    with progress.phase("preload"):
        made.preload(enough)
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
    from serve.server.fit import refuse_recurrent, refuse_too_big

    refuse_recurrent(config.model, load_config(folder))
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
