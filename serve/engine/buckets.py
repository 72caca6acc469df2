"""Batch shapes (buckets): which ones serve an engine, which one serves a step, and the packing of sequences into it.

The shape of a step never depends on a number on the device, for which a GPU's host would have to wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.batch import Batch
from model.kernels.dispatch import on_cpu
from model.sampling import Sampling

EVERY_TOKEN = 0xFFFFFFFF  # a word of a mask that allows all of its tokens
PREFILL_CHUNKS: tuple[int, ...] = (16, 32, 64, 128, 192, 256, 320, 384, 512, 768, 1024)
# Chunks that share their step with sequences that decode, each compiled for few of these and for as many as there are.
MIXED_CHUNKS: tuple[int, ...] = (32, 64, 128, 256)
FEW_DECODE_SEQS = 4
# On a GPU, up to so many tokens take no longer than reading the weights that they are multiplied with.
GPU_CHUNK = 128


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
        """Whether it has room for sequences of these numbers of new tokens, in this order.

        A chunk has none for a single token: it would take as long as a prefill.
        """
        chunks, decodes = counts[: self.seqs], counts[self.seqs :]
        if self.chunk > 1 and max(counts) == 1:
            return False
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


def base_buckets(buckets: Iterable[Bucket]) -> tuple[Bucket, ...]:
    """The fewest shapes that serve every request: the longest chunk alone, and the widest step that decodes."""
    plain = [bucket for bucket in buckets if not bucket.sample_all_tokens]
    longest = max((b for b in plain if b.num_seqs == 1), key=lambda bucket: bucket.chunk)
    widest = max((b for b in plain if b.chunk == 1), key=lambda bucket: bucket.seqs)
    return (longest, widest) if longest != widest else (longest,)


def compile_order(buckets: Iterable[Bucket]) -> list[Bucket]:
    """The shapes in the order in which they are worth compiling, while no request asks for one.

    Those that serve every request come first. Then steps that decode, the narrowest first: most servers answer few
    requests at a time, and each token of an answer is a step. Then chunks, the shortest first: a turn of an agent is
    short after its cached prefix, and pads the most. Then mixed steps, and drafts, which steps can do without.
    """
    base = base_buckets(buckets)

    def place(bucket: Bucket) -> tuple[bool, bool, bool, bool, Bucket]:
        return (bucket not in base, bucket.sample_all_tokens, bucket.decode_seqs > 0, bucket.chunk > 1, bucket)

    return sorted(buckets, key=place)


def find_bucket(buckets: Iterable[Bucket], counts: Sequence[int], sample_all_tokens: bool = False) -> Bucket | None:
    """The smallest bucket for sequences of these numbers of new tokens, a chunk before single tokens; None without."""
    fitting = [b for b in buckets if b.sample_all_tokens == sample_all_tokens and b.fits(counts)]
    return min(fitting, key=lambda bucket: (bucket.tokens, bucket), default=None)


def smallest_bucket(buckets: Iterable[Bucket], counts: Sequence[int], sample_all_tokens: bool = False) -> Bucket:
    """The same, where one must fit."""
    found = find_bucket(buckets, counts, sample_all_tokens)
    assert found, f"no compiled shape has room for sequences of {counts} tokens"
    return found


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
