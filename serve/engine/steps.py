"""The compiled steps: a few batch shapes (buckets), and the packing of sequences into one of them.

A step runs the model over a padded batch, samples one token per sequence and returns the pool. The tokens that the step
before sampled are an argument that stays on the device, so the next step can be dispatched before the host has read
them. Therefore the shape of a step never depends on a number on the device, for which a GPU's host would have to wait.
Every shape is compiled before the first request.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cache.pool import pages_for
from model.batch import Batch
from model.config import ModelConfig
from model.decoder import forward
from model.kernels.dispatch import on_cpu
from model.kv import KVPool, copy_pages
from model.params import Params
from model.sampling import Sampling, greedy, sample

EVERY_TOKEN = 0xFFFFFFFF  # a word of a mask that allows all of its tokens
PREFILL_CHUNKS: tuple[int, ...] = (16, 32, 64, 128, 192, 256, 320, 384, 512, 768, 1024)
# Chunks that share their step with sequences that decode, each compiled for few of these and for as many as there are.
MIXED_CHUNKS: tuple[int, ...] = (32, 64, 128, 256)
FEW_DECODE_SEQS = 4
# On a GPU, up to so many tokens take no longer than reading the weights that they are multiplied with.
GPU_CHUNK = 128
# Cached tokens before the chunks that warm up a step: enough for every branch of the attention over a prefix.
WARM_UP_PREFIX = 4096


@dataclass(frozen=True, order=True)
class Bucket:
    """A compiled batch shape: `seqs` sequences of at most `chunk` new tokens each, then `decode_seqs` of at most one.

    A token is sampled after the last new token of each sequence, or after every new token.
    """

    seqs: int
    chunk: int
    decode_seqs: int = 0
    sample_all_tokens: bool = False

    @property
    def num_seqs(self) -> int:
        """Sequences in all."""
        return self.seqs + self.decode_seqs

    @property
    def tokens(self) -> int:
        """Tokens in all, padding included."""
        return self.seqs * self.chunk + self.decode_seqs

    @property
    def samples(self) -> int:
        """Tokens that it samples, padding included."""
        return self.tokens if self.sample_all_tokens else self.num_seqs

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether it has room for sequences of these numbers of new tokens, in this order."""
        chunks, decodes = counts[: self.seqs], counts[self.seqs :]
        return len(decodes) <= self.decode_seqs and max(chunks) <= self.chunk and max(decodes, default=1) == 1


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are sampled; temperature 0 is greedy, top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = SamplingParams()


@dataclass(frozen=True)
class SequenceInput:
    """What a step runs for one sequence."""

    tokens: np.ndarray  # [new tokens] int32; -1 - i stands for token i that the step before samples
    prefix: int  # tokens that are in the pool already
    pages: np.ndarray  # [pages] int32
    sampling: SamplingParams
    draft_tokens: int = 0  # the last so many new tokens are a draft: one token is sampled before it, and one after each


@dataclass(frozen=True)
class Steps:
    """Compiled functions: `run[bucket](params, pool, batch, sampling, before)` and `copy(pool, sources, targets)`.

    A step returns the sampled tokens, [samples of the largest shape] int32, and the pool; `before` is what the step
    before it returned, or `nothing`.
    """

    run: Mapping[Bucket, CompiledStep]
    copy: Callable[[KVPool, np.ndarray, np.ndarray], KVPool]  # sources and targets are [1] int32
    table_pages: int  # width of every block table
    nothing: jax.Array  # [samples] int32


def batch_buckets(
    max_num_seqs: int, max_chunk: int, max_mixed_prefill_tokens: int = 0, draft_tokens: int = 0
) -> tuple[Bucket, ...]:
    """The shapes that serve up to `max_num_seqs` sequences at a time.

    All decode, with up to `draft_tokens` each, or one prefills a chunk of up to `max_chunk` tokens alone, or one
    prefills up to `max_mixed_prefill_tokens` while the others decode.
    """
    doublings = [1 << i for i in range(max_num_seqs.bit_length())]
    widths = sorted({*(n for n in doublings if n < max_num_seqs), max_num_seqs})
    decode = [Bucket(seqs, 1) for seqs in widths]
    if draft_tokens:
        decode += [Bucket(seqs, 1 + draft_tokens, sample_all_tokens=True) for seqs in widths]
    prefills, shares = PREFILL_CHUNKS, MIXED_CHUNKS
    if not on_cpu():
        prefills = shares = tuple(GPU_CHUNK << i for i in range(max_chunk.bit_length()))
    chunks = sorted({*(n for n in prefills if n < max_chunk), max_chunk} - {1})
    shared = sorted({*(n for n in shares if n < max_mixed_prefill_tokens), max_mixed_prefill_tokens} - {0, 1})
    others = sorted({min(FEW_DECODE_SEQS, max_num_seqs - 1), max_num_seqs - 1} - {0})
    mixed = [Bucket(1, chunk, decode_seqs) for chunk in shared for decode_seqs in others]
    return tuple(decode + [Bucket(1, chunk) for chunk in chunks] + mixed)


def smallest_bucket(buckets: Sequence[Bucket], counts: Sequence[int], sample_all_tokens: bool = False) -> Bucket:
    """The smallest bucket for sequences of these numbers of new tokens, a chunk before single tokens."""
    fitting = [b for b in buckets if b.sample_all_tokens == sample_all_tokens and b.fits(counts)]
    assert fitting, f"no compiled shape has room for sequences of {counts} tokens"
    return min(fitting, key=lambda bucket: (bucket.tokens, bucket))


def pack(inputs: Sequence[SequenceInput], bucket: Bucket, table_pages: int) -> tuple[Batch, Sampling]:
    """Lay sequence inputs out as one padded batch of numpy arrays; the sampling has no mask, see `pack_masks`.

    The sampled tokens come in the order of the inputs, one each and one more for each draft token.
    """
    counts = [len(each.tokens) for each in inputs]
    starts = np.full(bucket.num_seqs + 1, sum(counts), np.int32)  # [sequences + 1]
    starts[: len(inputs) + 1] = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.zeros(bucket.tokens, np.int32)  # [tokens]
    tokens[: starts[-1]] = np.concatenate([each.tokens for each in inputs])
    table = np.zeros((bucket.num_seqs, table_pages), np.int32)  # [sequences, pages]
    for i, each in enumerate(inputs):
        table[i, : len(each.pages)] = each.pages
    sampled = [1 + each.draft_tokens for each in inputs]
    # Each sampled token's distance from the end of its sequence's new tokens: 0 for the last.
    back = np.concatenate([np.arange(count)[::-1] for count in sampled])

    def by_sequence(values: list[Any], dtype: type) -> np.ndarray:  # [sequences]
        return np.pad(np.asarray(values, dtype), (0, bucket.num_seqs - len(inputs)))

    def by_sample(values: list[Any], dtype: type) -> np.ndarray:  # [samples]
        return np.pad(np.repeat(np.asarray(values, dtype), sampled), (0, bucket.samples - len(back)))

    ends = by_sample(starts[1 : len(inputs) + 1].tolist(), np.int32)
    positions = by_sample([each.prefix + len(each.tokens) for each in inputs], np.int32)
    ends[: len(back)] -= back + 1
    positions[: len(back)] -= back
    batch = Batch(
        tokens=tokens,
        starts=starts,
        prefix=by_sequence([each.prefix for each in inputs], np.int32),
        block_table=table,
        logit_indices=ends.astype(np.int32),
        max_chunk=bucket.chunk,
        decode_seqs=bucket.decode_seqs,
    )
    sampling = Sampling(
        temperature=by_sample([each.sampling.temperature for each in inputs], np.float32),
        top_k=by_sample([each.sampling.top_k for each in inputs], np.int32),
        top_p=by_sample([each.sampling.top_p for each in inputs], np.float32),
        seeds=by_sample([each.sampling.seed for each in inputs], np.uint32),
        positions=positions.astype(np.int32),
    )
    return batch, sampling


def pack_masks(masks: Sequence[np.ndarray | None], samples: int) -> np.ndarray | None:
    """Masks for a batch of so many samples, [samples, words] uint32; None if no sample has one.

    Each is [ceil(vocab / 32)] uint32, where bit t of word w allows token 32w + t, or None, which allows all tokens.
    """
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    packed = np.full((samples, len(given[0])), EVERY_TOKEN, np.uint32)
    for i, mask in enumerate(masks):
        if mask is not None:
            packed[i] = mask
    return packed


def logits_step(
    params: Params, pool: KVPool, batch: Batch, before: jax.Array, config: ModelConfig
) -> tuple[jax.Array, KVPool]:
    """One pass of the model: logits [samples, vocab] float32, and the pool."""
    known = jnp.where(batch.tokens < 0, before[-1 - batch.tokens], batch.tokens)
    return forward(params, replace(batch, tokens=known), pool, config)


@dataclass(frozen=True)
class CompiledStep:
    """A step as two compiled programs: the model's forward pass, and the sampling from its logits.

    The masks of a sampling may become known while the pass runs. The sort of top-k and top-p costs more than a layer of
    a small model, so a greedy batch has a program without it.
    """

    forward: Callable[..., tuple[jax.Array, KVPool]]  # (params, pool, batch, before): see `logits_step`
    greedy: Callable[[jax.Array, Sampling], jax.Array]
    random: Callable[[jax.Array, Sampling], jax.Array]
    unmasked: jax.Array  # [samples, words] uint32, on the device: the mask of a batch that brings none

    def sample(self, logits: jax.Array, sampling: Sampling) -> jax.Array:
        """Tokens sampled from logits [samples, vocab]: [samples of the largest shape] int32."""
        masked = sampling if sampling.mask is not None else replace(sampling, mask=self.unmasked)
        return (self.random if np.any(sampling.temperature > 0) else self.greedy)(logits, masked)

    def __call__(
        self, params: Params, pool: KVPool, batch: Batch, sampling: Sampling, before: jax.Array
    ) -> tuple[jax.Array, KVPool]:
        """Both at once: the sampled tokens, and the pool to go on with."""
        logits, pool = self.forward(params, pool, batch, before)
        return self.sample(logits, sampling), pool


def compile_steps(
    params: Params,
    pool: KVPool,
    config: ModelConfig,
    buckets: Sequence[Bucket],
    max_model_len: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Steps:
    """Compile a step for every bucket. Each call of a step donates the pool: use the one that it returns."""
    table_pages = -(-max_model_len // pool.page_size)
    jitted = jax.jit(partial(logits_step, config=config), donate_argnums=1)
    words = -(-config.vocab_size // 32)
    nothing = jnp.zeros(max(b.samples for b in buckets), jnp.int32)

    def blank(bucket: Bucket) -> tuple[Batch, Sampling]:
        return pack(
            [SequenceInput(np.zeros(1, np.int32), 0, np.zeros(1, np.int32), SamplingParams())], bucket, table_pages
        )

    def samplers(bucket: Bucket) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array], jax.Array]:
        """The two ways to sample, each run once, and the mask of a batch without one, for as many samples."""
        logits = jnp.zeros((bucket.samples, config.vocab_size), jnp.float32)
        unmasked = jnp.full((bucket.samples, words), EVERY_TOKEN, jnp.uint32)
        masked = replace(blank(bucket)[1], mask=unmasked)
        ways = []
        for way in (greedy, sample):
            padded = jax.jit(lambda logits, sampling, way=way: nothing.at[: len(logits)].set(way(logits, sampling)))
            ways.append(padded.lower(logits, masked).compile())
            jax.block_until_ready(ways[-1](logits, masked))
        return ways[0], ways[1], unmasked

    by_samples = {bucket.samples: samplers(bucket) for bucket in {b.samples: b for b in buckets}.values()}

    def compiled(bucket: Bucket) -> CompiledStep:
        program = jitted.lower(params, pool, blank(bucket)[0], nothing).compile()
        return CompiledStep(program, *by_samples[bucket.samples])

    on_progress(0, len(buckets))
    run = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # XLA compiles without Python's lock
        for bucket, function in zip(buckets, threads.map(compiled, buckets), strict=True):
            run[bucket] = function
            on_progress(len(run), len(buckets))
    page = jax.ShapeDtypeStruct((1,), jnp.int32)
    copy = jax.jit(copy_pages, donate_argnums=0).lower(pool, page, page).compile()
    return Steps(run=run, copy=copy, table_pages=table_pages, nothing=nothing)


def warm_up(steps: Steps, params: Params, pool: KVPool, max_model_len: int) -> tuple[KVPool, tuple[int, int], float]:
    """Run every compiled step once, so that no request pays for a first run, and the one of the longest chunk again.

    It writes to pages that no sequence holds. Returns the pool, and that chunk's tokens [start, stop) and seconds.
    """
    largest = max(steps.run, key=lambda bucket: bucket.chunk)
    for bucket in [*steps.run, largest]:
        count = min(bucket.chunk, max_model_len)
        before = min(WARM_UP_PREFIX, max_model_len - count)
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
