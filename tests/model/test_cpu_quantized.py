"""The CPU kernels over quantised weights: the same numbers as over float32 weights that hold what these stand for."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.batch import Batch
from model.config import ModelConfig
from model.kernels import dispatch
from model.kernels.cpu import build
from model.kernels.cpu.layers import embedding
from model.kernels.cpu.packing import pack, panels, unsupported_reason
from model.params import Params
from model.quantized import Quantized, dequantize, quantize
from tests.helpers.quantized import dequantized_params, quantized_params
from tests.model.test_cpu_layers import (
    CLAMPED,
    DEEP,
    ODD,
    ODD_EXPERTS,
    PAGE,
    PLAIN,
    batch_of,
    compiled,
    random_params,
    random_pool,
)

needs_kernel = pytest.mark.skipif(not build.available(), reason="the CPU kernels cannot be built here")
# Groups that divide the inputs, that do not, and that are longer than they are.
SCHEMES = {"8 bits": (8, 32), "4 bits": (4, 32), "8 in odd groups": (8, 13), "4 in long groups": (4, 2000)}
BATCHES = {
    "decode": batch_of([1], [100]),
    "several decode": batch_of([1, 1, 1], [30, 0, 7], spare_seqs=2, spare_tokens=5),
    "a tile and one": batch_of([7], [57]),
    "mixed": batch_of([5, 90, 1], [0, 3, 40], spare_tokens=32),
    "so many that threads take them apart": batch_of([1, 700], [60, 21]),
}


@functools.cache
def quantised(config: ModelConfig, bits: int, group: int) -> Params:
    """Random params, quantised without offsets and not packed.

    An offset is added in the step that multiplies by the scale, where JAX may round in between: see the test of them.
    """
    return quantized_params(random_params(config), bits, group, offsets=False)


@functools.cache
def packed(config: ModelConfig, bits: int, group: int) -> Params:
    """The same, packed."""
    return pack(quantised(config, bits, group), PAGE)


@functools.cache
def packed_whole(config: ModelConfig, bits: int, group: int) -> Params:
    """What they stand for, in float32, and packed."""
    return pack(dequantized_params(quantised(config, bits, group), config), PAGE)


@needs_kernel
@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        *(pytest.param(ODD, scheme, id=scheme) for scheme in SCHEMES),
        *(
            pytest.param(config, scheme, id=f"{scheme}, {name}")
            for name, config in {"deep": DEEP, "experts": ODD_EXPERTS, "clamped": CLAMPED}.items()
            for scheme in ("8 bits", "4 bits")
        ),
    ],
)
def test_logits_keys_and_values_are_exactly_those_of_the_dequantised_weights(config: ModelConfig, scheme: str) -> None:
    for name, batch in BATCHES.items():
        expected, expected_pool = compiled(config)(packed_whole(config, *SCHEMES[scheme]), batch, random_pool(config))
        found, pool = compiled(config)(packed(config, *SCHEMES[scheme]), batch, random_pool(config))
        np.testing.assert_array_equal(found, expected, err_msg=name)
        np.testing.assert_array_equal(pool.k, expected_pool.k, err_msg=name)
        np.testing.assert_array_equal(pool.v, expected_pool.v, err_msg=name)


@needs_kernel
@pytest.mark.parametrize("scheme", ["8 bits", "4 bits"])
@pytest.mark.parametrize(
    "together",
    [batch_of([1, 7, 70, 3, 1], [60, 9, 5, 30, 12], spare_seqs=1, spare_tokens=9), batch_of([1, 700], [60, 5])],
    ids=["few", "so many that threads take them apart"],
)
def test_a_sequence_gets_the_same_bits_alone_and_in_company(together: Batch, scheme: str) -> None:
    """A decoded token is dequantised in registers when it is alone, and from a block beside a prefill."""
    params = packed(PLAIN, *SCHEMES[scheme])
    whole, pool = compiled(PLAIN)(params, together, random_pool(PLAIN))
    for s in np.flatnonzero(together.lengths):
        start, stop = int(together.starts[s]), int(together.starts[s + 1])
        alone = replace(
            together,
            tokens=together.tokens[start:stop],
            starts=np.asarray([0, stop - start], np.int32),
            prefix=together.prefix[s : s + 1],
            block_table=together.block_table[s : s + 1],
            logit_indices=np.asarray([stop - start - 1], np.int32),
        )
        found, own = compiled(PLAIN)(params, alone, random_pool(PLAIN))
        assert np.array_equal(found[0], whole[s])
        pages = together.block_table[s]
        assert np.array_equal(own.k[:, pages], pool.k[:, pages])


@needs_kernel
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [1, 6, 20])
def test_offsets_of_groups_are_added(bits: int, count: int) -> None:
    rng = np.random.default_rng(count)

    def shifted(leaf: jax.Array | Quantized) -> jax.Array | Quantized:
        if not isinstance(leaf, Quantized):
            return leaf
        offsets = 0.02 * rng.standard_normal(leaf.scales.shape, np.float32)
        offsets -= 0 if leaf.bits == 8 else 8 * np.asarray(leaf.scales)
        return dataclasses.replace(leaf, offsets=jnp.asarray(offsets))

    params = jax.tree.map(shifted, quantised(ODD, bits, 16), is_leaf=lambda leaf: isinstance(leaf, Quantized))
    batch = batch_of([count], [30])
    expected, _ = compiled(ODD)(pack(dequantized_params(params, ODD), PAGE), batch, random_pool(ODD))
    found, _ = compiled(ODD)(pack(params, PAGE), batch, random_pool(ODD))
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    without, _ = compiled(ODD)(packed(ODD, bits, 16), batch, random_pool(ODD))
    assert float(jnp.abs(without - expected).max()) > 1e-2 * float(jnp.abs(expected).max())


@needs_kernel
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [64, 77])
def test_a_row_of_the_packed_embedding_is_the_row_of_the_table(bits: int, inputs: int) -> None:
    table = jax.tree.map(
        jnp.asarray, quantize(np.random.default_rng(0).standard_normal((131, inputs), np.float32), bits, 16)
    )
    packed = jax.tree.map(lambda array: array[0], panels(jax.tree.map(lambda array: array[None], table)))
    tokens = np.asarray([0, 130, 64, 5], np.int32)
    np.testing.assert_array_equal(embedding(packed, tokens), np.asarray(dequantize(table))[tokens])


@needs_kernel
def test_quantised_weights_that_are_given_up_are_deleted_and_packed_alike() -> None:
    for bits in (8, 4):
        given = jax.tree.map(jnp.copy, quantised(ODD, bits, 32))
        leaves = jax.tree.leaves(given, is_leaf=lambda leaf: isinstance(leaf, Quantized))
        found = dispatch.arranged(given, PAGE, consume=True)
        jax.tree.map(np.testing.assert_array_equal, found, packed(ODD, bits, 32))
        matrices = [leaf for leaf in leaves if isinstance(leaf, Quantized)]
        assert len(matrices) == 6
        assert all(array.is_deleted() for array in jax.tree.leaves(matrices))


def test_groups_that_the_kernels_cannot_take_are_named_and_run_on_xla() -> None:
    odd = quantised(PLAIN, 4, 12)
    assert unsupported_reason(odd, PAGE) == "layers[0].qkv of 4 bits is in groups of 12, supported are multiples of 8"
    assert isinstance(dispatch.arranged(odd, PAGE).layers, tuple)
    assert unsupported_reason(quantised(PLAIN, 8, 12), PAGE) is None
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, odd)
    assert "bfloat16, supported is float32" in (unsupported_reason(half, PAGE) or "")
