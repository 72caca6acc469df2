"""The GPU kernels as far as a machine without a GPU can check them: numerics, races, lowering and the tile plan."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.gpu.aot import MODEL, forward_with, keys_beside_pool, pool_sized, variants
from model.batch import MASKED, Batch
from model.kernels import dispatch
from model.kernels.hopper import compat, launch, online_softmax
from model.kernels.hopper import decode as paged_decode
from model.kernels.hopper import prefill as paged_prefill
from model.kernels.reference import reference
from model.sharding import EVERY
from tests.helpers import batches

PAGE = 64

interpreted = pytest.mark.skipif(
    not compat.CAN_INTERPRET,
    reason=f"the interpreter of jax {jax.__version__} does not know layout_cast; that of 0.11 does",
)


def ragged(prefixes, chunks, *, kv_heads=1, group=4, head_dim=64, page=PAGE, **spare):
    return batches.ragged(
        prefixes, chunks, kv_heads=kv_heads, group=group, head_dim=head_dim, page=page, dtype=jnp.bfloat16, **spare
    )


def assert_matches_reference(kernel, q, pool, batch, window=None, sinks=None, **options):
    """With NaN in all pages that no query sees."""
    given = pool if window is None else batches.without_unseen_pages(pool, batch, window)
    actual = kernel(q, given, 1, batch, window, sinks, interpret=compat.interpreter(detect_races=True), **options)
    real = int(batch.starts[-1])
    wide = dataclasses.replace(pool, k=pool.k.astype(jnp.float32), v=pool.v.astype(jnp.float32))
    expected = np.asarray(reference(q.astype(jnp.float32), wide, 1, batch, window, sinks))[:real]
    actual = np.asarray(actual.astype(jnp.float32))
    # Weights and the result are rounded to bf16, 8 bits each: half a part in 256 of values of size 1, twice. Over few
    # keys, values stay as large as they are.
    few = window is not None and window < PAGE
    np.testing.assert_allclose(actual[:real], expected, atol=1e-2, rtol=1 / 256 if few else 1e-7)
    assert not actual[real:].any()
    assert not compat.races_found()


@interpreted
@pytest.mark.parametrize(("group", "page", "head_dim"), [(1, 32, 64), (3, 16, 64), (4, 64, 128), (7, 128, 64)])
def test_prefill_of_a_ragged_batch_matches_the_reference(group, page, head_dim):
    prefixes, chunks = [0, 1, page - 1, page, page + 1, 300], [5, 1, 33, 1, 30, 17]
    batch = ragged(prefixes, chunks, group=group, page=page, head_dim=head_dim, spare_seqs=1, spare_tokens=7)
    assert_matches_reference(paged_prefill.paged_prefill, *batch)


@interpreted
def test_prefill_of_a_long_chunk_matches_the_reference() -> None:
    assert_matches_reference(paged_prefill.paged_prefill, *ragged([PAGE + 1], [1024], group=1))


@interpreted
@pytest.mark.parametrize("stages", [2, 3])
def test_prefill_with_split_keys_matches_the_reference(stages):
    tuning = paged_prefill.Tuning(stages=stages)
    batch = ragged([1500, 0, 62], [3, 70, 4], kv_heads=2, spare_seqs=1, spare_tokens=3)
    assert_matches_reference(paged_prefill.paged_prefill, *batch, tuning=tuning)


@interpreted
@pytest.mark.parametrize("head_dim", paged_prefill.DEFAULT)
def test_prefill_in_many_small_blocks_matches_the_reference(head_dim):
    prefixes, chunks = [0, 1, PAGE - 1, PAGE, PAGE + 1, 1500], [5, 1, 33, 150, 30, 3]
    batch = ragged(prefixes, chunks, head_dim=head_dim, spare_seqs=1, spare_tokens=7)
    tuning = paged_prefill.Tuning(block_kv=64, stages=2)
    assert_matches_reference(paged_prefill.paged_prefill, *batch, tuning=tuning)


@interpreted
@pytest.mark.parametrize(("group", "page", "head_dim"), [(1, 16, 64), (4, 64, 128), (7, 128, 64), (64, 32, 64)])
def test_decode_matches_the_reference(group, page, head_dim):
    prefixes = [0, 1, page - 1, page, page + 1, 4 * max(page, 64) + 50]
    batch = ragged(prefixes, [1] * 6, group=group, page=page, head_dim=head_dim, spare_seqs=1, spare_tokens=1)
    assert_matches_reference(paged_decode.paged_decode, *batch)


@interpreted
@pytest.mark.parametrize("prefix", [700, 60])
def test_decode_of_a_few_tokens_each_matches_the_reference(prefix):
    batch = ragged([prefix, 0, 62, 64], [3, 1, 3, 2], group=5, kv_heads=2, spare_seqs=1, spare_tokens=6)
    assert_matches_reference(paged_decode.paged_decode, *batch)


def random_sinks(kv_heads, group):
    return jnp.asarray(np.random.default_rng(5).normal(size=(kv_heads, group), scale=3), jnp.float32)


@interpreted
@pytest.mark.parametrize("window", [1, 7, PAGE, 200, 100_000, None])
def test_prefill_with_windows_and_sinks_matches_the_reference(window):
    prefixes, chunks = [0, 1, PAGE - 1, PAGE, PAGE + 1, 700], [5, 1, 33, 150, 30, 3]
    batch = ragged(prefixes, chunks, group=8, spare_seqs=1, spare_tokens=7)
    tuning = paged_prefill.Tuning(block_kv=64, stages=2)
    assert_matches_reference(paged_prefill.paged_prefill, *batch, window, random_sinks(1, 8), tuning=tuning)


@interpreted
@pytest.mark.parametrize("page", [16, 128])
def test_prefill_over_pages_outside_the_window_matches_the_reference(page):
    batch = ragged([900, 300], [40, 7], head_dim=128, page=page)
    assert_matches_reference(paged_prefill.paged_prefill, *batch, 150)


@interpreted
@pytest.mark.parametrize("window", [70, 600, None])
def test_prefill_with_split_keys_windows_and_sinks_matches_the_reference(window):
    batch = ragged([1500, 0, 62], [3, 70, 4], kv_heads=2, spare_seqs=1, spare_tokens=3)
    assert_matches_reference(paged_prefill.paged_prefill, *batch, window, random_sinks(2, 4))


@interpreted
@pytest.mark.parametrize("window", [1, 7, PAGE, 200, 100_000, None])
@pytest.mark.parametrize("chunk", [1, 3])
def test_decode_with_windows_and_sinks_matches_the_reference(window, chunk):
    prefixes = [0, 1, PAGE - 1, PAGE, PAGE + 1, 700]
    batch = ragged(prefixes, [1, chunk, chunk, 1, chunk, chunk], group=8, spare_seqs=1, spare_tokens=1)
    assert_matches_reference(paged_decode.paged_decode, *batch, window, random_sinks(1, 8))


@interpreted
@pytest.mark.parametrize("window", [70, 900])
def test_decode_with_split_keys_and_windows_matches_the_reference(window):
    batch = ragged([2000, 0], [1, 1], page=16, kv_heads=2, spare_seqs=1, spare_tokens=1)
    assert_matches_reference(paged_decode.paged_decode, *batch, window, random_sinks(2, 4))


@pytest.mark.parametrize("variant", variants(), ids=lambda variant: variant.name)
def test_every_variant_lowers_for_cuda(variant):
    with compat.hopper():
        lowered = jax.jit(variant.function).trace(*variant.arguments()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


FORWARD = [v for v in variants() if len(v.devices) > 2 or (v.windowed and v.sinks and v.chunk != 128)]

# Alone, by KV heads, and on more devices than there are KV heads; lowering takes no devices.
MESHES = {"one": None, "by_kv_heads": (4, 1), "by_groups": (8, 2)}


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("variant", FORWARD, ids=lambda variant: variant.name)
def test_the_forward_pass_hands_the_kernel_the_whole_pool_of_a_device(variant, devices):
    mesh = MESHES[devices] and compat.h200s(MESHES[devices], EVERY)
    with compat.hopper(mesh):
        traced, pool = forward_with(variant, variant.model, mesh and NamedSharding(mesh, PartitionSpec()), mesh=mesh)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    size = "x".join(map(str, pool.k.shape[1:]))
    makers = re.findall(rf"= \"?stablehlo\.(\w+).*-> tensor<(?:\d+x)?{size}xbf16>", text)
    # What makes an array of that size is the scatter of the new keys and values, which is in place; nothing slices.
    assert not makers, makers
    assert not re.search(rf"stablehlo\.(dynamic_)?slice.*tensor<(\d+x)?{size}xbf16>", text)


def test_copies_of_the_pool_are_found_in_a_compiled_program() -> None:
    pool = FORWARD[0].arguments()[1]
    size = ",".join(map(str, pool.k.shape[1:]))
    kept = f"%a = bf16[2,{size}]{{4,3,2,1,0}} scatter(%b, %c)\n%p = bf16[2,{size}]{{4,3,2,1,0}} parameter(0)"
    assert not pool_sized(kept, pool)
    assert len(pool_sized(f"{kept}\n  %s = bf16[1,{size}]{{4,3,2,1,0}} dynamic-slice(%p, %i)", pool)) == 1
    assert len(pool_sized(f"{kept}\n  %s = bf16[2,{size}]{{4,3,2,1,0}} copy(%p)", pool)) == 1


def test_keys_written_beside_the_pool_are_found_in_a_compiled_program() -> None:
    kept = "%fused_scatter (p: f32[]) -> bf16[9] {\n  %k = bf16[64,8,128]{2,1,0} convert(%p)\n}\n\n%main (p: f32[]) {\n"
    assert not keys_beside_pool(f"{kept}  %qkv = bf16[64,6144]{{1,0}} fusion(%p)\n}}", 64, MODEL)
    assert len(keys_beside_pool(f"{kept}  %k = bf16[64,8,128]{{2,1,0}} fusion(%p)\n}}", 64, MODEL)) == 1
    assert len(keys_beside_pool(f"{kept}  %k = bf16[64,1024]{{1,0}} copy(%p)\n}}", 64, MODEL)) == 1


@pytest.mark.parametrize("seed", range(10))
def test_tiles_cover_every_token_once_and_see_its_keys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chunks = rng.integers(0, 50, 5)
    prefix = rng.integers(0, 1000, 5)
    tokens, tile = 256, (seed % 2) * 20 + 7
    starts = np.concatenate([[0], np.cumsum(chunks)]).astype(np.int32)
    batch = Batch(None, jnp.asarray(starts), jnp.asarray(prefix, jnp.int32), None, None, 0)
    needed = -(-tokens // tile) + len(chunks)
    plan = np.asarray(jax.jit(paged_prefill.plan, static_argnums=(1, 2, 3))(batch, tokens, tile, needed, 30))
    covered = np.zeros(tokens, int)
    rows = np.full(tokens, -1)
    for number, (seq, first, end, position, keys, window_start) in enumerate(plan):
        last = min(first + tile, end)
        covered[first:last] += 1
        rows[first:last] = number * tile + np.arange(last - first)
        if first < starts[-1]:
            assert starts[seq] <= first < last <= end == starts[seq + 1]
            assert position == prefix[seq] + first - starts[seq]
            assert keys == position + last - first
            assert window_start == position - 29
        else:
            assert keys == 0
    assert (covered == 1).all()
    found = jax.jit(paged_prefill.places_in_tiles, static_argnums=(1, 2))(batch, tokens, tile)
    np.testing.assert_array_equal(found, rows)


def test_merged_splits_equal_the_whole_softmax() -> None:
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(4, 5, 30)) * 5, rng.normal(size=(4, 30, 8))
    peaks = scores.max(-1)
    exponentials = np.exp2(scores - peaks[..., None])
    totals = exponentials @ values
    empty = np.zeros_like(totals[:1]), np.full_like(peaks[:1], MASKED), np.zeros_like(peaks[:1])
    states = (totals, peaks, exponentials.sum(-1))
    merged = online_softmax.merge_splits(*(jnp.concatenate(pair) for pair in zip(states, empty, strict=True)))
    probs = np.exp2(scores - peaks.max(0)[:, None])
    expected = np.einsum("prc,pcd->rd", probs, values) / probs.sum((0, 2))[:, None]
    np.testing.assert_allclose(merged, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 80}, "head_dim is 80, supported are 64, 128"),
        ({"page": 8}, "page_size is 8, supported are 16, 32, 64, 128"),
        ({"group": 65}, "a KV head has 65 query heads, supported are up to 64"),
    ],
)
@pytest.mark.parametrize("kernel", [paged_prefill.paged_prefill, paged_decode.paged_decode])
def test_unsupported_shapes_are_refused_with_the_supported_list(kernel, change, message):
    q, pool, batch = ragged([3], [1], **change)
    with pytest.raises(ValueError, match=message):
        kernel(q, pool, 0, batch)


def test_other_dtypes_are_refused() -> None:
    q, pool, batch = ragged([3], [1])
    with pytest.raises(ValueError, match="dtype of q is float32, supported are bfloat16"):
        paged_prefill.paged_prefill(q.astype(jnp.float32), pool, 0, batch)


def test_decode_refuses_chunks_that_do_not_fit_a_tile() -> None:
    q, pool, batch = ragged([3], [20])
    with pytest.raises(ValueError, match="paged_decode takes 16 in groups of 4"):
        paged_decode.paged_decode(q, pool, 0, batch)


def test_hopper_gets_a_kernel_by_chunk_and_one_warning_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "on_cpu", lambda: False)
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    dispatch.warn_once.cache_clear()
    q, pool, batch = ragged([3], [17])
    assert dispatch.kernel_for(q, pool, batch) is paged_prefill.paged_prefill
    assert dispatch.kernel_for(q, pool, dataclasses.replace(batch, max_chunk=16)) is paged_decode.paged_decode
    with caplog.at_level(logging.WARNING, "tokenzero.kernels"):
        for _ in range(2):
            assert dispatch.kernel_for(q.astype(jnp.float32), pool, batch) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_chunks_and_single_tokens_in_one_batch_are_not_for_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_cpu", lambda: False)
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    q, pool, batch = ragged([3, 8], [17, 1])
    assert dispatch.kernel_for(q, pool, batch.replace(decode_seqs=1)) is None


def test_a_gpu_that_is_no_hopper_gets_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_cpu", lambda: False)
    assert dispatch.kernel_for(*ragged([3], [1])) is None


@pytest.mark.parametrize(
    ("thread_blocks", "key_blocks", "waves", "expected"),
    [
        (3328, 416, 1, 1),  # a long prompt fills the chip many times over
        (264, 416, 1, 1),
        (8, 416, 1, 16),  # one token of one sequence: 8 KV heads
        (4, 416, 1, 33),
        (8, 416, 2, 33),
        (8, 8, 1, 2),  # no split has less than four blocks of keys
        (8, 1, 1, 1),
    ],
)
def test_keys_are_split_until_the_chip_is_full(thread_blocks, key_blocks, waves, expected):
    assert launch.num_splits(thread_blocks, key_blocks, waves) == expected


@pytest.mark.parametrize("thread_blocks", [48, 72, 80, 96, 136, 144, 192])
def test_the_last_wave_of_a_grid_is_nearly_full(thread_blocks):
    splits = launch.num_splits(thread_blocks, 416)
    assert thread_blocks * splits / 132 / -(-thread_blocks * splits // 132) > 0.9
