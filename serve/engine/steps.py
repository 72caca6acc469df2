"""The engine's steps as programs: the model's forward pass over a batch shape, and the sampling from its logits.

The tokens that the step before sampled are an argument that stays on the device, so the next step can be dispatched
before the host has read them. Two shapes are compiled before the first request, the others in the background.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cache.pool import pages_for
from model.batch import Batch
from model.config import ModelConfig
from model.decoder import forward
from model.kv import KVPool, copy_pages
from model.params import Params
from model.sampling import Sampling, greedy, sample
from serve.engine.buckets import (
    EVERY_TOKEN,
    GREEDY,
    Bucket,
    SequenceInput,
    base_buckets,
    batch_buckets,
    compile_order,
    pack,
    smallest_bucket,
)
from serve.engine.programs import FAILED, GREEDY_RANK, READY, STEPS_RANK, Program, Programs
from serve.engine.settings import EngineSettings

# Cached tokens before the chunk that warms up an engine: enough for every branch of the attention over a prefix.
WARM_UP_PREFIX = 4096
# Tokens of that chunk, if padding costs nothing.
WARM_UP_CHUNK = 128


def logits_step(
    params: Params, pool: KVPool, batch: Batch, before: jax.Array, config: ModelConfig, mesh: Mesh | None = None
) -> tuple[jax.Array, KVPool]:
    """One pass of the model: logits [samples, vocab] float32, and the pool."""
    known = jnp.where(batch.tokens < 0, before[-1 - batch.tokens], batch.tokens)
    return forward(params, replace(batch, tokens=known), pool, config, mesh)


def greedy_step(logits: jax.Array, sampling: Sampling, width: int) -> jax.Array:
    """Tokens for logits [samples, vocab] of a greedy batch: [width] int32, zeros after the samples."""
    return jnp.zeros(width, jnp.int32).at[: len(logits)].set(greedy(logits, sampling))


def random_step(logits: jax.Array, sampling: Sampling, width: int) -> jax.Array:
    """The same for any batch."""
    return jnp.zeros(width, jnp.int32).at[: len(logits)].set(sample(logits, sampling))


@dataclass(frozen=True)
class CompiledStep:
    """A step as two programs: the model's forward pass, and the sampling from its logits.

    The masks of a sampling may become known while the pass runs. The sort of top-k and top-p costs more than a layer of
    a small model, so a greedy batch has a program without it, and takes the other one until that is compiled.
    """

    forward: Callable[..., tuple[jax.Array, KVPool]]  # (params, pool, batch, before): see `logits_step`
    greedy: Program  # (logits, sampling): for a batch of temperature 0
    random: Program  # the same for any
    unmasked: jax.Array  # [samples, words] uint32, on the device: the mask of a batch that brings none

    def sample(self, logits: jax.Array, sampling: Sampling) -> jax.Array:
        """Tokens sampled from logits [samples, vocab]: [samples of the largest shape] int32."""
        masked = sampling if sampling.mask is not None else replace(sampling, mask=self.unmasked)
        greedily = self.greedy.state is READY and not np.any(sampling.temperature > 0)
        tokens: jax.Array = (self.greedy if greedily else self.random)(logits, masked)
        return tokens

    def __call__(
        self, params: Params, pool: KVPool, batch: Batch, sampling: Sampling, before: jax.Array
    ) -> tuple[jax.Array, KVPool]:
        """Both at once: the sampled tokens, and the pool to go on with."""
        logits, pool = self.forward(params, pool, batch, before)
        return self.sample(logits, sampling), pool


@dataclass(frozen=True)
class Steps:
    """The steps by shape: `run[bucket](params, pool, batch, sampling, before)`, and `copy(pool, sources, targets)`.

    A step donates the pool. It returns the sampled tokens, [samples of the largest shape] int32, and the pool to go on
    with; `before` is what the step before it returned, or `nothing`. What is not compiled yet is compiled by its first
    call.
    """

    run: Mapping[Bucket, CompiledStep]
    copy: Callable[[KVPool, np.ndarray, np.ndarray], KVPool]  # sources and targets are [1] int32
    table_pages: int  # width of every block table
    nothing: jax.Array  # [samples] int32
    programs: Programs
    by_bucket: Mapping[Bucket, tuple[Program, Program]]  # without which a step does not run: its pass, and any sampling

    def ready(self) -> list[Bucket]:
        """The shapes that run at once."""
        return [bucket for bucket, both in self.by_bucket.items() if all(each.state is READY for each in both)]

    def usable(self) -> list[Bucket]:
        """The shapes that run, at once or when they are compiled."""
        return [bucket for bucket, both in self.by_bucket.items() if all(each.state is not FAILED for each in both)]

    def need(self, bucket: Bucket) -> None:
        """Compile a shape next, which is not ready: a step could have used it."""
        self.programs.need(self.by_bucket[bucket])

    def base(self) -> list[Program]:
        """The fewest programs that serve every request."""
        copy = [self.copy] if isinstance(self.copy, Program) else []
        return [program for bucket in base_buckets(self.by_bucket) for program in self.by_bucket[bucket]] + copy

    def wait(self) -> None:
        """Compile all that is left, for a measurement or a test."""
        self.programs.wait()


def make_steps(
    programs: Programs, params: Params, pool: KVPool, config: ModelConfig, settings: EngineSettings
) -> Steps:
    """Declare the programs of every step that an engine takes; nothing is compiled yet."""
    chunk, mixed = settings.max_prefill_tokens, settings.max_mixed_prefill_tokens
    buckets = batch_buckets(settings.max_num_seqs, chunk, mixed, settings.speculative_tokens)
    table_pages = pages_for(settings.max_model_len, pool.page_size)
    words = -(-config.vocab_size // 32)
    nothing = programs.put(np.zeros(max(b.samples for b in buckets), np.int32))
    ordered, base = compile_order(buckets), base_buckets(buckets)
    model = {"config": config} | ({"mesh": programs.mesh} if programs.mesh else {})
    samplers: dict[int, tuple[Program, Program, jax.Array]] = {}
    run, by_bucket = {}, {}
    for rank, bucket in enumerate(ordered, STEPS_RANK):
        batch, sampling = blank(bucket, table_pages)
        logits = jax.ShapeDtypeStruct((bucket.samples, config.vocab_size), jnp.float32)
        if bucket.samples not in samplers:
            unmasked = programs.put(np.full((bucket.samples, words), EVERY_TOKEN, np.uint32))
            taken, width = (logits, replace(sampling, mask=unmasked)), {"width": len(nothing)}
            early = GREEDY_RANK if bucket in base else rank
            samplers[bucket.samples] = (
                programs.add(early, f"greedy sampling of {bucket.samples}", greedy_step, taken, 0, static=width),
                programs.add(rank, f"sampling of {bucket.samples}", random_step, taken, 0, static=width),
                unmasked,
            )
        greedily, randomly, unmasked = samplers[bucket.samples]
        arguments = (params, pool, batch, nothing)
        forward = programs.add(rank, f"step {bucket}", logits_step, arguments, (0, pool), (1,), model)
        run[bucket] = CompiledStep(forward, greedily, randomly, unmasked)
        by_bucket[bucket] = forward, randomly
    page = jax.ShapeDtypeStruct((1,), jnp.int32)
    copy = programs.add(0, "copy of a page", copy_pages, (pool, page, page), pool, (0,))
    return Steps(run, copy, table_pages, nothing, programs, by_bucket)


def blank(bucket: Bucket, table_pages: int) -> tuple[Batch, Sampling]:
    """A batch of this shape, and its sampling."""
    return pack([SequenceInput(np.zeros(1, np.int32), 0, np.zeros(1, np.int32), GREEDY)], bucket, table_pages)


def warm_up(steps: Steps, params: Params, pool: KVPool, max_model_len: int) -> tuple[KVPool, tuple[int, int], float]:
    """Run a chunk once: it starts the threads, and is the first measurement of what a prefill takes.

    It writes to pages that no sequence holds. Returns the pool, and the chunk's tokens [start, stop) and seconds.
    """
    # Where padding is computed, only a full shape shows what a token takes.
    longest = max(bucket.chunk for bucket in steps.run)
    chunk = min(WARM_UP_CHUNK, longest) if params.packed else longest
    count = min(chunk, max_model_len)
    before = min(WARM_UP_PREFIX, max_model_len - count)
    bucket = smallest_bucket(base_buckets(steps.run), [count])
    pool, seconds = run_alone(steps, params, pool, bucket, np.zeros(count, np.int32), before)
    return pool, (before, before + count), seconds


def run_alone(
    steps: Steps, params: Params, pool: KVPool, bucket: Bucket, tokens: np.ndarray, prefix: int, draft: int = 0
) -> tuple[KVPool, float]:
    """Run one sequence alone, in the pool's first pages. Returns the pool, and the seconds that it took.

    `tokens` are [new tokens] int32 after `prefix` tokens that are in the pool; the last `draft` of them are a draft.
    """
    pages = np.arange(pages_for(prefix + len(tokens), pool.page_size), dtype=np.int32)
    batch, sampling = pack([SequenceInput(tokens, prefix, pages, GREEDY, draft)], bucket, steps.table_pages)
    begin = time.perf_counter()
    sampled, pool = steps.run[bucket](params, pool, batch, sampling, steps.nothing)
    np.asarray(sampled)
    return pool, time.perf_counter() - begin
