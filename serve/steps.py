"""The compiled steps: a short ladder of batch shapes, and the packing of sequences into one of them.

A step runs the model over a padded batch, samples one token per sequence and hands the pool back. Every shape is
compiled before the first request, so that no request pays for a compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model.attention import Batch
from model.config import ModelConfig
from model.decoder import forward
from model.kv import KVPool, copy_pages
from model.params import Params
from model.sampling import Sampling, sample

EVERY_TOKEN = 0xFFFFFFFF  # a word of a mask that allows all its tokens
PREFILL_CHUNKS = (16, 32, 64, 128, 192, 256, 320, 384, 512, 768, 1024)


@dataclass(frozen=True, order=True)
class Bucket:
    """A compiled batch shape: `seqs` sequences with at most `chunk` new tokens each."""

    seqs: int
    chunk: int


@dataclass(frozen=True)
class SamplingParams:
    """How a request wants its tokens sampled; temperature 0 is greedy, top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = SamplingParams()


@dataclass(frozen=True)
class Row:
    """One sequence's share of a step."""

    tokens: np.ndarray  # [new tokens] int32
    prefix: int  # tokens that are in the pool already
    pages: np.ndarray  # [pages] int32
    sampling: SamplingParams
    mask: np.ndarray | None = None  # [ceil(vocab / 32)] uint32: bit t of word w allows token 32w + t; None allows all


@dataclass(frozen=True)
class Steps:
    """Compiled functions by shape: `run[bucket](params, pool, batch, sampling)` and `copy(pool, sources, targets)`.

    A sampling without a mask runs with one that allows every token and stays on the device.
    """

    run: Mapping[Bucket, Callable]
    copy: Callable
    table_pages: int  # width of every block table


def ladder(max_batch: int, max_chunk: int) -> tuple[Bucket, ...]:
    """The shapes that serve up to `max_batch` decoding sequences and prefill chunks of up to `max_chunk` tokens."""
    doublings = [1 << i for i in range(max_batch.bit_length())]
    decode = [Bucket(seqs, 1) for seqs in sorted({*(n for n in doublings if n < max_batch), max_batch})]
    chunks = sorted({*(n for n in PREFILL_CHUNKS if n < max_chunk), max_chunk} - {1})
    return tuple(decode + [Bucket(1, chunk) for chunk in chunks])


def fit(buckets: Sequence[Bucket], seqs: int, chunk: int) -> Bucket:
    """The smallest bucket that holds `seqs` sequences of at most `chunk` new tokens."""
    fitting = [b for b in buckets if b.seqs >= seqs and b.chunk >= chunk]
    assert fitting, f"no compiled shape holds {seqs} sequences of {chunk} tokens"
    return min(fitting, key=lambda b: (b.seqs * b.chunk, b))


def pack(rows: Sequence[Row], bucket: Bucket, table_pages: int) -> tuple[Batch, Sampling]:
    """Lay the rows out as one padded batch of numpy arrays; row i's token is sampled at index i."""
    counts = [len(row.tokens) for row in rows]
    starts = np.full(bucket.seqs + 1, sum(counts), np.int32)
    starts[: len(rows) + 1] = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.zeros(bucket.seqs * bucket.chunk, np.int32)
    tokens[: starts[-1]] = np.concatenate([row.tokens for row in rows])
    table = np.zeros((bucket.seqs, table_pages), np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row.pages)] = row.pages

    def column(values: list, dtype: type) -> np.ndarray:  # [seqs]
        return np.asarray(values + [0] * (bucket.seqs - len(rows)), dtype)

    batch = Batch(
        tokens=tokens,
        starts=starts,
        prefix=column([row.prefix for row in rows], np.int32),
        block_table=table,
        rows=np.maximum(starts[1:] - 1, 0),
        max_chunk=bucket.chunk,
    )
    sampling = Sampling(
        temperature=column([row.sampling.temperature for row in rows], np.float32),
        top_k=column([row.sampling.top_k for row in rows], np.int32),
        top_p=column([row.sampling.top_p for row in rows], np.float32),
        seeds=column([row.sampling.seed for row in rows], np.uint32),
        positions=column([row.prefix + len(row.tokens) for row in rows], np.int32),
        mask=pack_masks([row.mask for row in rows], bucket.seqs),
    )
    return batch, sampling


def pack_masks(masks: Sequence[np.ndarray | None], seqs: int) -> np.ndarray | None:
    """The rows' masks as one array, [seqs, words] uint32, all ones where a row has none; None if no row has one."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    packed = np.full((seqs, len(given[0])), EVERY_TOKEN, np.uint32)
    for i, mask in enumerate(masks):
        if mask is not None:
            packed[i] = mask
    return packed


def step(
    params: Params, pool: KVPool, batch: Batch, sampling: Sampling, config: ModelConfig
) -> tuple[jax.Array, KVPool]:
    """One pass of the model and one sampled token for every sequence, [seqs] int32."""
    logits, pool = forward(params, batch, pool, config)
    return sample(logits, sampling), pool


def run_masked(
    compiled: Callable, unmasked: jax.Array, params: Params, pool: KVPool, batch: Batch, sampling: Sampling
) -> tuple[jax.Array, KVPool]:
    """Call a compiled step, which always takes a mask: `unmasked` where the batch brings none."""
    masked = sampling if sampling.mask is not None else replace(sampling, mask=unmasked)
    return compiled(params, pool, batch, masked)


def compile_steps(
    params: Params,
    pool: KVPool,
    config: ModelConfig,
    buckets: Sequence[Bucket],
    max_model_len: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Steps:
    """Compile every shape of the ladder. Each call donates the pool: use the one it hands back."""
    table_pages = -(-max_model_len // pool.page_size)
    jitted = jax.jit(partial(step, config=config), donate_argnums=1)
    words = -(-config.vocab_size // 32)
    unmasked = {seqs: jnp.full((seqs, words), EVERY_TOKEN, jnp.uint32) for seqs in {b.seqs for b in buckets}}
    run = {}
    for done, bucket in enumerate(buckets):
        on_progress(done, len(buckets))
        blank = Row(np.zeros(1, np.int32), 0, np.zeros(1, np.int32), SamplingParams())
        batch, sampling = pack([blank], bucket, table_pages)
        compiled = jitted.lower(params, pool, batch, replace(sampling, mask=unmasked[bucket.seqs])).compile()
        run[bucket] = partial(run_masked, compiled, unmasked[bucket.seqs])
    on_progress(len(buckets), len(buckets))
    page = jax.ShapeDtypeStruct((1,), jnp.int32)
    copy = jax.jit(copy_pages, donate_argnums=0).lower(pool, page, page).compile()
    return Steps(run=run, copy=copy, table_pages=table_pages)
