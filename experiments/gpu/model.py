"""The forward pass and the engine on a model of real shape with random weights, for `experiments.gpu_bench`."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.workloads.random_model import random_params
from model.batch import Batch
from model.decoder import forward
from model.kv import KVPool, bytes_per_token, empty_pool
from model.memory import active_parameters, parameters
from model.params import unstacked

if TYPE_CHECKING:
    from experiments.gpu.sizes import Sizes
    from serve.engine.engine import Engine

Json = dict[str, Any]
LINE_TOKENS = 24  # of the line before an agent's prompt that differs from request to request


def forward_passes(sizes: Sizes) -> Iterator[Json]:
    """Seconds of the whole model over a cold prompt, a short warm one and one decoded token, with their arithmetic.

    With separate layers, in line, and with stacked ones, scanned, as the server holds them on a GPU.
    """
    config, dtype = sizes.model, jnp.dtype(sizes.dtype)
    stacked = random_params(config, dtype)
    width = -(-(sizes.context + sizes.warm) // sizes.page)
    pool = empty_pool(config, width, sizes.page, dtype)
    step = jax.jit(partial(forward, config=config), donate_argnums=2)
    head = config.vocab_size * config.embed_size  # of one token a pass
    tables = (1 if config.tie_embeddings else 2) * head
    weights = active_parameters(config) - tables  # that a token goes through; a long prompt reads all
    cold, warm, token = ("cold", 0, sizes.context), ("warm", sizes.context, sizes.warm), ("decode", sizes.context, 1)
    for layers, params in (("separate", unstacked(stacked)), ("stacked", stacked)):
        for name, prefix, chunk in (cold, warm, token):
            batch = Batch(
                tokens=jax.random.randint(jax.random.key(1), (chunk,), 0, config.vocab_size),
                starts=jnp.asarray([0, chunk], jnp.int32),
                prefix=jnp.asarray([prefix], jnp.int32),
                block_table=jnp.asarray(np.random.default_rng(0).permutation(width)[None].astype(np.int32)),
                logit_indices=jnp.asarray([chunk - 1], jnp.int32),
                max_chunk=chunk,
            )
            taken, pool = donated_seconds(partial(step, params, batch), pool)
            seen = chunk * prefix + chunk * (chunk + 1) / 2
            flop = 2 * (weights * chunk + head) + 4 * config.num_layers * config.num_heads * config.head_dim * seen
            loaded = min(parameters(config) - tables, weights * chunk)
            read = (loaded + head) * dtype.itemsize + (prefix + chunk) * bytes_per_token(config, dtype)
            yield {
                "pass": name,
                "layers": layers,
                "tokens": chunk,
                "prefix": prefix,
                "seconds": taken,
                "flops": flop / taken,
                "bytes_per_s": read / taken,
            }


def donated_seconds(call: Callable[[KVPool], tuple[Any, KVPool]], pool: KVPool) -> tuple[float, KVPool]:
    """Seconds of a call that takes the pool and hands it back: the median of five after two, and the pool."""
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        out, pool = jax.block_until_ready(call(pool))
        taken.append(time.perf_counter() - start)
        del out
    return float(np.median(taken[2:])), pool


def arms(sizes: Sizes, requests: int = 4) -> Iterator[Json]:
    """Time to the first token through the engine, of prompts that differ only in their last tokens.

    Stable: the line before the prompt is the same each time. Varying: it differs. Stripped: there is no line. The first
    request of an arm fills the cache and is not counted.
    """
    # Late, because the other figures do not need the engine's packages.
    from serve.engine.engine import Engine
    from serve.engine.settings import EngineSettings

    rng = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        return rng.integers(0, sizes.model.vocab_size, count, dtype=np.int32)

    pages = 3 * -(-(sizes.context + sizes.page) // sizes.page)
    settings = EngineSettings(
        num_pages=pages,
        max_model_len=sizes.context + sizes.page,
        page_size=sizes.page,
        max_num_seqs=1,
        max_prefill_tokens=sizes.engine_chunk,
        dtype=sizes.dtype,
    )
    engine = Engine(random_params(sizes.model, jnp.dtype(sizes.dtype)), sizes.model, settings)
    engine.start()
    try:
        for arm in ("stable", "varying", "stripped"):
            line = draw(LINE_TOKENS)
            body = draw(sizes.context - LINE_TOKENS - sizes.warm)
            measured: list[Json] = []
            for _ in range(requests + 1):
                front = {"stable": line, "varying": draw(LINE_TOKENS), "stripped": line[:0]}[arm]
                measured.append(first_token(engine, np.concatenate([front, body, draw(sizes.warm)])))
            warm = measured[1:]
            yield {
                "arm": arm,
                "prompt": warm[0]["prompt"],
                "reused": int(np.median([one["reused"] for one in warm])),
                "seconds": float(np.median([one["seconds"] for one in warm])),
                "cold_seconds": measured[0]["seconds"],
                "all_seconds": [one["seconds"] for one in warm],
            }
    finally:
        engine.stop()


def first_token(engine: Engine, prompt: np.ndarray) -> Json:
    """Submit a prompt for two greedy tokens and wait for the first; raises RuntimeError where the engine fails."""
    from serve.engine.request import Failed, Finished, GenerationRequest, Started, TokenEvent

    events: queue.Queue[Any] = queue.Queue()
    found: Json = {}
    start = time.perf_counter()
    engine.submit(GenerationRequest(prompt, max_tokens=2), events.put)
    while True:
        match event := events.get():
            case Started():
                found |= {"prompt": event.prompt_tokens, "reused": event.reused_tokens}
            case TokenEvent():
                found.setdefault("seconds", time.perf_counter() - start)
            case Finished():
                return found
            case Failed():
                raise RuntimeError(event.message)
