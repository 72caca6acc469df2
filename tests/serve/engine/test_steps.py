"""The ladder of compiled shapes, and packing into one of them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig, RopeConfig
from model.kv import empty_pool
from model.params import Layer, Params
from serve.engine.buckets import (
    GREEDY,
    MIXED_CHUNKS,
    PREFILL_CHUNKS,
    Bucket,
    SamplingParams,
    SequenceInput,
    base_buckets,
    batch_buckets,
    compile_order,
    find_bucket,
    pack,
    pack_masks,
    smallest_bucket,
)
from serve.engine.programs import Programs
from serve.engine.settings import EngineSettings
from serve.engine.steps import Steps, make_steps

BATCHES, CHUNKS = st.integers(1, 200), st.integers(1, 3000)


@given(max_num_seqs=BATCHES, max_chunk=CHUNKS, data=st.data())
def test_the_ladder_holds_every_step_the_engine_takes(max_num_seqs: int, max_chunk: int, data: st.DataObject) -> None:
    mixed = data.draw(st.integers(1, max_chunk))
    buckets = batch_buckets(max_num_seqs, max_chunk, mixed)
    seqs, chunk = data.draw(st.integers(1, max_num_seqs)), data.draw(st.integers(1, max_chunk))
    for wanted in ([1] * seqs, [chunk], [min(chunk, mixed), *[1] * (seqs - 1)]):
        bucket = smallest_bucket(buckets, wanted)
        assert bucket.num_seqs >= len(wanted)
        assert bucket.chunk >= wanted[0]
        assert not [b for b in buckets if b.tokens < bucket.tokens and b.fits(wanted)]


@given(max_num_seqs=BATCHES, max_chunk=CHUNKS)
def test_the_ladder_is_short_and_wastes_less_than_half_of_a_decoding_batch(max_num_seqs: int, max_chunk: int) -> None:
    buckets = batch_buckets(max_num_seqs, max_chunk, max_chunk)
    most = max_num_seqs.bit_length() + 1 + len(PREFILL_CHUNKS) + 1 + 2 * (len(MIXED_CHUNKS) + 1)
    assert len(set(buckets)) == len(buckets) <= most
    assert max(b.seqs for b in buckets) == max_num_seqs
    assert max(b.chunk for b in buckets) == max_chunk
    for seqs in range(1, max_num_seqs + 1):
        assert smallest_bucket(buckets, [1] * seqs).seqs < 2 * seqs


@given(max_num_seqs=BATCHES, max_chunk=CHUNKS, drafts=st.integers(0, 4))
def test_two_shapes_serve_every_step_without_drafts(max_num_seqs: int, max_chunk: int, drafts: int) -> None:
    buckets = batch_buckets(max_num_seqs, max_chunk, max_chunk, drafts)
    base = base_buckets(buckets)
    assert set(base) <= set(buckets)
    assert len(base) <= 2
    for wanted in ([1] * max_num_seqs, [max_chunk], [1]):
        assert find_bucket(base, wanted)
    assert compile_order(buckets)[: len(base)] == sorted(base, key=compile_order(buckets).index)
    assert sorted(compile_order(buckets)) == sorted(buckets)


def test_the_ladder_of_the_defaults() -> None:
    buckets = batch_buckets(16, 1024, 256)
    assert [b.seqs for b in buckets if b.chunk == 1] == [1, 2, 4, 8, 16]
    assert [b.chunk for b in buckets if b.chunk > 1 and not b.decode_seqs] == list(PREFILL_CHUNKS)
    assert [(b.chunk, b.decode_seqs) for b in buckets if b.decode_seqs] == [
        (n, s) for n in MIXED_CHUNKS for s in (4, 15)
    ]


def test_on_a_gpu_chunks_start_where_tokens_begin_to_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engine.buckets.on_cpu", lambda: False)
    buckets = batch_buckets(8, 1000, 256)
    assert [b.chunk for b in buckets if b.chunk > 1 and not b.decode_seqs] == [128, 256, 512, 1000]
    assert [(b.chunk, b.decode_seqs) for b in buckets if b.decode_seqs] == [(n, s) for n in (128, 256) for s in (4, 7)]


MASKS = st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4).map(lambda words: np.asarray(words, np.uint32))
ROWS = st.builds(
    SequenceInput,
    tokens=st.lists(st.integers(0, 1000), min_size=1, max_size=6).map(lambda ids: np.asarray(ids, np.int32)),
    prefix=st.integers(0, 50),
    pages=st.lists(st.integers(0, 90), min_size=1, max_size=7).map(lambda ids: np.asarray(ids, np.int32)),
    sampling=st.builds(
        SamplingParams,
        temperature=st.floats(0, 2, width=32),
        top_k=st.integers(0, 100),
        top_p=st.floats(0, 1, width=32),
        seed=st.integers(0, 2**32 - 1),
    ),
)


@given(rows=st.lists(ROWS, min_size=1, max_size=5), data=st.data())
def test_a_packed_batch_holds_each_row_at_its_place_and_nothing_else(
    rows: list[SequenceInput], data: st.DataObject
) -> None:
    seqs = data.draw(st.integers(len(rows), 8))
    chunk = data.draw(st.integers(max(len(row.tokens) for row in rows), 8))
    batch, sampling = pack(rows, Bucket(seqs, chunk), table_pages=7)

    assert batch.max_chunk == chunk
    assert batch.tokens.shape == (seqs * chunk,)
    assert batch.starts.shape == (seqs + 1,)
    assert batch.block_table.shape == (seqs, 7)
    for i, row in enumerate(rows):
        first, last = batch.starts[i], batch.starts[i + 1]
        assert np.array_equal(batch.tokens[first:last], row.tokens)
        assert batch.logit_indices[i] == last - 1
        assert batch.prefix[i] == row.prefix
        assert np.array_equal(batch.block_table[i, : len(row.pages)], row.pages)
        assert sampling.positions[i] == row.prefix + len(row.tokens)
        drawn = (sampling.temperature[i], sampling.top_k[i], sampling.top_p[i], sampling.seeds[i])
        assert drawn == (row.sampling.temperature, row.sampling.top_k, row.sampling.top_p, row.sampling.seed)
    # The sequences that are not there own no token, and what they would sample is greedy, hence cheap.
    assert np.all(batch.starts[len(rows) :] == sum(len(row.tokens) for row in rows))
    assert not batch.tokens[batch.starts[-1] :].any()
    assert not sampling.temperature[len(rows) :].any()


@given(rows=st.lists(ROWS, min_size=1, max_size=4), data=st.data())
def test_a_token_is_sampled_before_and_after_each_draft_token(rows: list[SequenceInput], data: st.DataObject) -> None:
    rows = [replace(row, draft_tokens=data.draw(st.integers(0, len(row.tokens) - 1))) for row in rows]
    bucket = Bucket(len(rows) + 1, 6, sample_all_tokens=True)
    batch, sampling = pack(rows, bucket, table_pages=7)
    wanted = [
        (batch.starts[i + 1] - 1 - back, row.prefix + len(row.tokens) - back, row.sampling.seed)
        for i, row in enumerate(rows)
        for back in range(row.draft_tokens, -1, -1)
    ]
    assert len(batch.logit_indices) == len(sampling.positions) == len(sampling.seeds) == bucket.samples == bucket.tokens
    for i, (place, position, seed) in enumerate(wanted):
        assert (batch.logit_indices[i], sampling.positions[i], sampling.seeds[i]) == (place, position, seed)
    assert not sampling.temperature[len(wanted) :].any()


@given(masks=st.lists(st.none() | MASKS, min_size=1, max_size=5), more=st.integers(0, 3))
def test_packed_masks_allow_all_tokens_where_there_is_none(masks: list[np.ndarray | None], more: int) -> None:
    packed = pack_masks(masks, len(masks) + more)
    if all(mask is None for mask in masks):
        assert packed is None
        return
    assert packed is not None
    assert (packed.shape, packed.dtype) == ((len(masks) + more, 4), np.uint32)
    # An empty mask leaves nothing to sample, so the samples that are not there have a full one.
    for found, mask in zip(packed, [*masks, *[None] * more], strict=True):
        assert np.array_equal(found, np.full(4, 2**32 - 1, np.uint32) if mask is None else mask)


def test_every_column_has_the_type_that_was_compiled_for() -> None:
    row = SequenceInput(np.asarray([1], np.int32), 0, np.asarray([0], np.int32), GREEDY)
    for rows in ([row], [row, row]):
        batch, sampling = pack(rows, Bucket(2, 1), table_pages=3)
        ints = (
            batch.tokens,
            batch.starts,
            batch.prefix,
            batch.block_table,
            batch.logit_indices,
            sampling.top_k,
            sampling.positions,
        )
        assert {column.dtype for column in ints} == {np.dtype(np.int32)}
        assert sampling.seeds.dtype == np.uint32
        assert {sampling.temperature.dtype, sampling.top_p.dtype} == {np.dtype(np.float32)}


SIZES = EngineSettings(num_pages=4, max_model_len=16, page_size=8, max_num_seqs=3, max_prefill_tokens=8)
SMALL = ModelConfig("qwen3", 100, 16, 16, 1, 2, 1, 8, 64, 1e-6, RopeConfig(), qk_norm=True, tie_embeddings=True)


@pytest.fixture(scope="module")
def small() -> tuple[Params, Steps]:
    """A small model with random weights, and its compiled steps."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    c = SMALL
    layer = Layer(
        attn_norm=weight(c.embed_size),
        qkv=weight(c.num_kv_heads, c.group + 2, c.head_dim, c.embed_size),
        out=weight(c.embed_size, c.num_kv_heads, c.group, c.head_dim),
        mlp_norm=weight(c.embed_size),
        gate_up=weight(2, c.ffn_size, c.embed_size),
        down=weight(c.embed_size, c.ffn_size),
        q_norm=weight(c.head_dim),
        k_norm=weight(c.head_dim),
    )
    params = Params(weight(c.vocab_size, c.embed_size), (layer,), weight(c.embed_size))
    return params, make_steps(Programs(), params, empty_pool(c, 4, 8, jnp.float32), c, SIZES)


def test_a_compiled_step_obeys_the_masks_of_the_rows_that_have_one(small: tuple[Params, Steps]) -> None:
    params, steps = small

    def sampled(*masks: np.ndarray | None) -> list[int]:
        rows = [
            SequenceInput(np.asarray([7], np.int32), 0, np.asarray([i], np.int32), GREEDY) for i in range(len(masks))
        ]
        batch, sampling = pack(rows, Bucket(3, 1), steps.table_pages)
        sampling = replace(sampling, mask=pack_masks(masks, 3))
        pool = empty_pool(SMALL, 4, 8, jnp.float32)
        return steps.run[Bucket(3, 1)](params, pool, batch, sampling, steps.nothing)[0].tolist()[: len(masks)]

    def only(*tokens: int) -> np.ndarray:
        bits = np.isin(np.arange(128), tokens)
        return np.packbits(bits, bitorder="little").view(np.uint32)

    (best, same) = sampled(None, None)
    assert best == same
    assert best not in (3, 64, 99)
    assert sampled(only(3), None, only(99)) == [3, best, 99]
    assert sampled(None, only(64, best)) == [best, best]
    assert sampled(only(64), only(64)) == [64, 64]
