"""The CPU kernels that run a whole model over packed weights, beside the plain forward pass in XLA."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.batch import Batch
from model.checkpoint import layout
from model.config import ExpertsConfig, LayerKind, ModelConfig, RopeConfig
from model.decoder import forward
from model.kernels import dispatch
from model.kernels.cpu import build
from model.kernels.cpu.layers import logits
from model.kernels.cpu.packing import pack, panel_width, panels, unsupported_reason
from model.kv import KVPool, empty_pool
from model.params import Params, unstacked

needs_kernel = pytest.mark.skipif(not build.available(), reason="the CPU kernels cannot be built here")
PAGE = 8
PAGES = 480
PLAIN = ModelConfig(
    family="llama",
    vocab_size=131,
    embed_size=64,
    ffn_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=512,
    norm_eps=1e-5,
    rope=RopeConfig(),
    tie_embeddings=True,
)
# No size is a multiple of a vector; every optional part is there.
ODD = replace(
    PLAIN,
    embed_size=52,
    ffn_size=77,
    num_heads=6,
    head_dim=12,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
    tie_embeddings=False,
)
# A dense layer before those with experts, of which some tokens share a few.
EXPERTS = replace(
    PLAIN,
    family="qwen3_moe",
    layers=(LayerKind(), LayerKind(experts=True), LayerKind(experts=True)),
    experts=ExpertsConfig(count=9, per_token=3, ffn_size=40, renormalize=False),
)
ODD_EXPERTS = replace(
    ODD,
    family="glm4_moe",
    rope=RopeConfig(partial=0.5),
    layers=(LayerKind(experts=True), LayerKind(), LayerKind(experts=True)),
    experts=ExpertsConfig(
        count=6,
        per_token=2,
        ffn_size=33,
        shared_ffn_size=21,
        scoring="sigmoid",
        scaling=1.5,
        groups=3,
        chosen_groups=2,
        correction=True,
    ),
)
CLAMPED = replace(
    ODD,
    family="gpt_oss",
    layers=(LayerKind(experts=True),) * 3,
    experts=ExpertsConfig(count=5, per_token=2, ffn_size=50, router_bias=True, biases=True, clamp=(1.702, 0.3)),
)
WINDOWED = replace(PLAIN, family="mistral", layers=(LayerKind(window=20), LayerKind(), LayerKind(window=90)))
SINKS = replace(
    CLAMPED,
    layers=(LayerKind(window=20, experts=True), LayerKind(experts=True), LayerKind(window=1, experts=True)),
    sinks=True,
)
DEEP = replace(PLAIN, embed_size=1100, ffn_size=1200, num_layers=1)  # sums of several blocks of inputs


@functools.cache
def random_params(config: ModelConfig) -> Params:
    """Stacked weights, every one of them random; norms lie about one."""
    rng = np.random.default_rng(0)

    def fill(path: tuple[object, ...], leaf: object) -> jax.Array:
        centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0  # type: ignore[arg-type]
        return jnp.asarray(centre + 0.1 * rng.standard_normal(leaf.shape, np.float32))  # type: ignore[attr-defined]

    return jax.tree_util.tree_map_with_path(fill, layout(config))  # type: ignore[no-any-return]


@functools.cache
def packed(config: ModelConfig) -> Params:
    """The same, packed."""
    return pack(random_params(config), PAGE)


@functools.cache
def compiled(config: ModelConfig) -> jax.stages.Wrapped:
    """The forward pass of a model."""
    return jax.jit(lambda params, batch, pool: forward(params, batch, pool, config))


def random_pool(config: ModelConfig) -> KVPool:
    """A pool that is full of random numbers."""
    rng, shape = np.random.default_rng(1), empty_pool(config, PAGES, PAGE, jnp.float32).k.shape
    return KVPool(*(jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2)))


def batch_of(chunks: list[int], prefixes: list[int], spare_seqs: int = 0, spare_tokens: int = 0) -> Batch:
    """New tokens of several sequences after their prefixes, in shuffled pages."""
    rng, seqs, real = np.random.default_rng(2), len(chunks) + spare_seqs, sum(chunks)
    starts = np.full(seqs + 1, real, np.int32)
    starts[: len(chunks) + 1] = np.cumsum([0, *chunks])
    width = PAGES // seqs
    return Batch(
        tokens=rng.integers(0, PLAIN.vocab_size, real + spare_tokens).astype(np.int32),
        starts=starts,
        prefix=np.pad(prefixes, (0, spare_seqs)).astype(np.int32),
        block_table=rng.permutation(PAGES)[: seqs * width].reshape(seqs, width).astype(np.int32),
        logit_indices=np.maximum(starts[1:] - 1, 0).astype(np.int32),
        max_chunk=max(chunks),
    )


def assert_equals_plain_forward_pass(config: ModelConfig, batch: Batch) -> tuple[jax.Array, float]:
    """The kernels' logits, keys and values are those of the plain forward pass. The logits, and their scale."""
    expected, expected_pool = compiled(config)(unstacked(random_params(config)), batch, random_pool(config))
    found, pool = compiled(config)(packed(config), batch, random_pool(config))
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=2e-6 * scale * config.embed_size**0.5)
    np.testing.assert_allclose(pool.k, expected_pool.k, atol=2e-5)
    np.testing.assert_allclose(pool.v, expected_pool.v, atol=2e-5)
    return found, scale


@needs_kernel
@pytest.mark.parametrize("config", [PLAIN, ODD, DEEP], ids=["plain", "odd", "deep"])
@pytest.mark.parametrize(
    "batch",
    [
        batch_of([1], [100]),
        batch_of([1, 1, 1], [30, 0, 7], spare_seqs=2, spare_tokens=5),
        batch_of([200], [57]),
        batch_of([5, 90, 1], [0, 3, 40], spare_tokens=32),
        batch_of([1, 1800], [60, 21]),
    ],
    ids=["decode", "several decode", "prefill", "mixed", "so many that threads take them apart"],
)
def test_logits_keys_and_values_equal_the_plain_forward_pass(config: ModelConfig, batch: Batch) -> None:
    assert_equals_plain_forward_pass(config, batch)


@needs_kernel
@pytest.mark.parametrize("config", [EXPERTS, ODD_EXPERTS, CLAMPED], ids=["experts", "odd", "clamped"])
@pytest.mark.parametrize(
    "batch",
    [batch_of([1, 1], [30, 7], spare_tokens=5), batch_of([5, 1200, 1], [0, 3, 40], spare_tokens=32)],
    ids=["decode", "so many that an expert has several blocks"],
)
def test_experts_equal_the_plain_forward_pass(config: ModelConfig, batch: Batch) -> None:
    assert_equals_plain_forward_pass(config, batch)


@needs_kernel
@pytest.mark.parametrize("config", [WINDOWED, SINKS], ids=["windows", "sinks"])
@pytest.mark.parametrize(
    "batch",
    [
        batch_of([1, 1, 1], [300, 0, 7], spare_seqs=2, spare_tokens=5),
        batch_of([5, 90, 1], [0, 200, 40]),
        batch_of([1800], [57]),
    ],
    ids=["decode", "mixed", "so many that threads take them apart"],
)
def test_windows_and_sinks_of_each_layer_equal_the_plain_forward_pass(config: ModelConfig, batch: Batch) -> None:
    found, scale = assert_equals_plain_forward_pass(config, batch)
    full = replace(config, layers=tuple(replace(kind, window=None) for kind in config.layers))
    unwindowed, _ = compiled(full)(packed(config), batch, random_pool(config))
    assert np.abs(found - unwindowed).max() > 1e-3 * scale


@needs_kernel
def test_weights_of_experts_that_no_token_chose_are_not_read() -> None:
    """What is no number would spread to every token of a product with it."""
    params, batch = random_params(EXPERTS), batch_of([1], [30])
    (dense, mixed) = params.layers
    experts = replace(
        mixed.experts,
        router=jnp.zeros_like(mixed.experts.router),  # equal scores: the first three are chosen
        gate_up=mixed.experts.gate_up.at[:, 3:].set(jnp.nan),
        down=mixed.experts.down.at[:, 3:].set(jnp.nan),
    )
    params = replace(params, layers=(dense, replace(mixed, experts=experts)))
    found, _ = compiled(EXPERTS)(pack(params, PAGE), batch, random_pool(EXPERTS))
    assert np.isfinite(found).all()


@needs_kernel
@pytest.mark.parametrize("config", [PLAIN, EXPERTS, SINKS], ids=["dense", "experts", "windows and sinks"])
@pytest.mark.parametrize(
    "together",
    [batch_of([1, 70, 3, 1], [60, 5, 30, 12], spare_seqs=1, spare_tokens=9), batch_of([1, 700], [60, 5])],
    ids=["few", "so many that threads take them apart"],
)
def test_a_sequence_gets_the_same_bits_in_any_company_and_any_shape(together: Batch, config: ModelConfig) -> None:
    """In a wider batch, with more padding, and beside prefills."""
    whole, pool = compiled(config)(packed(config), together, random_pool(config))
    for s in np.flatnonzero(together.lengths):
        start, stop = int(together.starts[s]), int(together.starts[s + 1])
        for spare in (0, 11):
            alone = replace(
                together,
                tokens=np.pad(together.tokens[start:stop], (0, spare)),
                starts=np.asarray([0, stop - start], np.int32),
                prefix=together.prefix[s : s + 1],
                block_table=together.block_table[s : s + 1],
                logit_indices=np.asarray([stop - start - 1], np.int32),
            )
            found, own = compiled(config)(packed(config), alone, random_pool(config))
            assert np.array_equal(found[0], whole[s])
            pages = together.block_table[s]
            assert np.array_equal(own.k[:, pages], pool.k[:, pages])
            assert np.array_equal(own.v[:, pages], pool.v[:, pages])


@needs_kernel
def test_the_same_batch_gives_the_same_bits_again_and_again() -> None:
    batch = batch_of([1, 70, 3, 1], [60, 5, 30, 12])
    first, _ = compiled(PLAIN)(packed(PLAIN), batch, random_pool(PLAIN))
    for _ in range(30):
        assert np.array_equal(first, compiled(PLAIN)(packed(PLAIN), batch, random_pool(PLAIN))[0])


@needs_kernel
def test_a_long_step_and_many_short_ones_beside_it_do_not_wait_for_each_other() -> None:
    """While the long one has the pool's threads, the short ones fill the pool's queue."""
    long, batch = replace(PLAIN, embed_size=512, ffn_size=2048), batch_of([1800], [0])
    x, norm, head = jnp.ones((1, 8)), jnp.ones(8), panels(jnp.ones((1, 8, 8)))[0]
    short = jax.jit(lambda x: logits(x, np.zeros(1, np.int32), norm, head, 8, 1e-5))
    params, pool = packed(long), random_pool(long)
    jax.block_until_ready((compiled(long)(params, batch, pool), short(x)))  # compiled

    def run_long() -> None:
        while many.is_alive():
            jax.block_until_ready(compiled(long)(params, batch, pool))

    many = threading.Thread(target=lambda: [short(x).block_until_ready() for _ in range(20_000)], daemon=True)
    one = threading.Thread(target=run_long, daemon=True)
    for thread in (many, one):
        thread.start()
    for thread in (many, one):
        thread.join(60)
        assert not thread.is_alive()


@needs_kernel
@pytest.mark.parametrize("page", [PAGES, 2**31 - 1, -(2**31)])
def test_padding_writes_no_page_and_no_page_out_of_the_pool_is_touched(page: int) -> None:
    batch = batch_of([1, 2], [9, 16], spare_tokens=6)
    table = batch.block_table.copy()
    table[1, 2:] = page
    _, pool = compiled(PLAIN)(packed(PLAIN), replace(batch, block_table=table), random_pool(PLAIN))
    changed = np.argwhere((np.asarray(pool.k) != np.asarray(random_pool(PLAIN).k)).any((0, 2, 4)))
    assert changed.tolist() == [[int(table[0, 1]), 1]]


@needs_kernel
def test_an_empty_batch_leaves_everything_as_it_is() -> None:
    batch = replace(batch_of([1], [5]), starts=np.zeros(2, np.int32))
    found, pool = compiled(PLAIN)(packed(PLAIN), batch, random_pool(PLAIN))
    assert np.isfinite(found).all()
    assert np.array_equal(pool.k, random_pool(PLAIN).k)


@needs_kernel
def test_what_is_no_number_stays_with_its_sequence() -> None:
    batch = batch_of([1, 20, 1], [30, 0, 12])
    pool = random_pool(PLAIN)
    pool = replace(pool, v=pool.v.at[0, batch.block_table[0, 1], 0, 3, 2].set(np.nan))
    found, _ = compiled(PLAIN)(packed(PLAIN), batch, pool)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1:]).all()


@needs_kernel
def test_the_donated_pool_is_not_copied() -> None:
    pool = empty_pool(PLAIN, 4096, PAGE, jnp.float32)
    step = jax.jit(lambda params, batch, pool: forward(params, batch, pool, PLAIN), donate_argnums=2)
    lowered = step.lower(packed(PLAIN), batch_of([64], [0]), pool).compile()
    assert lowered.memory_analysis().temp_size_in_bytes < pool.k.nbytes / 4


@needs_kernel
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_the_head_takes_any_number_of_rows_and_computes_padding_once(rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, norm, head = (rng.standard_normal(s, np.float32) for s in ((rows, 52), (52,), (131, 52)))
    indices = np.concatenate([rng.permutation(rows), np.zeros(5, int)]).astype(np.int32)
    found = logits(jnp.asarray(x), indices, jnp.asarray(norm), panels(jnp.asarray(head[None]))[0], 131, 1e-5)
    rows64 = x[indices].astype(np.float64)
    normed = rows64 / np.sqrt((rows64**2).mean(-1, keepdims=True) + 1e-5) * norm
    np.testing.assert_allclose(found, normed @ head.T.astype(np.float64), atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("parts", [1, 2])
def test_packed_weights_hold_every_row_once_and_zeros(parts: int) -> None:
    weight = np.arange(1, 2 * 154 * 20 + 1, dtype=np.float32).reshape(2, 154, 20)
    width, share = panel_width(), panel_width() // parts
    found = np.asarray(panels(jnp.asarray(weight), parts))
    assert found.shape == (2, -(-154 // parts // share), 20, width)
    rows = np.moveaxis(found.reshape(2, -1, 20, parts, share), 3, 1).swapaxes(-1, -2).reshape(2, parts, -1, 20)
    of_part = 154 // parts
    assert np.array_equal(rows[:, :, :of_part].reshape(weight.shape), weight)
    assert not rows[:, :, of_part:].any()


@needs_kernel
@pytest.mark.parametrize("config", [PLAIN, ODD], ids=["plain", "odd"])
def test_weights_that_are_given_up_are_deleted_and_packed_alike(config: ModelConfig) -> None:
    given = jax.tree.map(jnp.copy, random_params(config))
    found = dispatch.arranged(given, PAGE, consume=True)
    jax.tree.map(np.testing.assert_array_equal, found, packed(config))
    (run,) = given.layers
    matrices = [given.embed, run.qkv, run.out, run.gate_up, run.down]
    assert all(array.is_deleted() for array in [*matrices, *jax.tree.leaves(given.lm_head)])


def test_what_the_kernels_cannot_take_is_named_and_runs_on_xla() -> None:
    params = random_params(replace(PLAIN, head_dim=6))
    assert unsupported_reason(params, PAGE) == "head_dim is 6, supported are multiples of 4"
    assert unsupported_reason(random_params(PLAIN), 6) == "page_size is 6, supported are multiples of 4"
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
    reason = unsupported_reason(half, PAGE)
    assert reason is not None
    assert "bfloat16, supported is float32" in reason
    with pytest.raises(ValueError, match="page_size is 6"):
        pack(random_params(PLAIN), 6)
    for odd, page in ((params, PAGE), (random_params(PLAIN), 6), (half, PAGE)):
        assert not dispatch.arranged(odd, page).packed


def test_the_device_and_the_compiler_decide_the_form_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    params = random_params(PLAIN)
    if build.available():
        assert dispatch.arranged(params, PAGE).packed
    monkeypatch.setattr(build, "available", lambda: False)
    assert not dispatch.arranged(params, PAGE).packed
    monkeypatch.setattr(dispatch, "on_cpu", lambda: False)
    assert dispatch.arranged(params, PAGE) is params
