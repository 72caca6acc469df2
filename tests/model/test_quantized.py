"""Quantised matrices: how they are rounded, packed and multiplied, in XLA."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from jax.sharding import AbstractMesh

from model import checkpoint
from model.checkpoint import fingerprint, load
from model.decoder import forward
from model.linear import linear
from model.params import unstacked
from model.quantized import SCHEMES, dequantize, pack_nibbles, quantize, unpack_nibbles
from model.sharding import partition_specs
from tests.helpers.quantized import dequantized_params, quantized_params
from tests.helpers.shapes import assert_fields
from tests.model.test_cpu_layers import ODD, PLAIN, batch_of, random_params, random_pool


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_eight_bits_keep_a_groups_least_and_largest_weight_or_zero_and_the_largest() -> None:
    # The second group is multiples of a 127th of its largest, whose negative it has not.
    found = quantize(np.asarray([[-1.0, 24.5, 3.04, 0.0, 12.7, -0.1, 0.0, -6.3]], np.float32), bits=8, group=4)
    np.testing.assert_array_equal(found.values, [[-128, 127, -88, -118, 127, -1, 0, -63]])
    np.testing.assert_allclose(found.scales, [[0.1, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(found.offsets, [[11.8, 0]], rtol=1e-6)
    np.testing.assert_allclose(dequantize(found), [[-1, 24.5, 3.0, 0, 12.7, -0.1, 0, -6.3]], rtol=1e-5, atol=1e-6)


def test_four_bits_have_sixteen_levels_from_the_least_weight_or_around_zero() -> None:
    found = quantize(np.asarray([[1.0, 2.5, 1.14, 1.2, -8.0, 5.0, 1.0, 0.0, 4.0]], np.float32), bits=4, group=4)
    # Nibbles 0, 15, 1, 2; then 0, 13, 9, 8; then of one weight alone, where zero is the eighth.
    np.testing.assert_array_equal(found.values, [[0xF0, 0x21, 0xD0, 0x89, 0x00]])
    np.testing.assert_allclose(found.scales, [[0.1, 1.0, -0.5]], rtol=1e-6)
    np.testing.assert_allclose(found.offsets, [[1.0, -8.0, 4.0]], rtol=1e-6)
    np.testing.assert_allclose(dequantize(found), [[1, 2.5, 1.1, 1.2, -8, 5, 1, 0, 4]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_1, 8), (Kind.Q4_1, 4), (Kind.Q8_0, 8), (Kind.Q4_0, 4)])
def test_weights_that_a_format_of_as_few_bits_has_rounded_stay_as_they_are(kind: Kind, bits: int) -> None:
    weight = quants.dequantize(quants.quantize(weights(9, 128), kind), kind)
    np.testing.assert_allclose(dequantize(quantize(weight, bits, 32)), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bits", "least"), [(8, 1.2), (4, 1.2)])
def test_weights_move_less_than_symmetric_rounding_would_move_them(bits: int, least: float) -> None:
    kind = Kind.Q8_0 if bits == 8 else Kind.Q4_0
    weight = weights(50, 320) + 0.2
    symmetric = quants.dequantize(quants.quantize(weight, kind), kind)
    moved = np.asarray(dequantize(quantize(weight, bits, 32))) - weight
    assert least * np.square(moved).sum() < np.square(symmetric - weight).sum()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "group"), [(64, 32), (77, 16), (5, 32), (1, 1), (130, 130)])
def test_no_weight_moves_by_more_than_half_a_step(bits: int, inputs: int, group: int) -> None:
    weight = weights(3, 7, inputs)
    found = quantize(weight, bits, group)
    assert_fields(found)
    assert found.shape == weight.shape
    scales, offsets = (np.repeat(each, group, axis=-1)[..., :inputs] for each in (found.scales, found.offsets))
    step = np.abs(scales)
    # Around zero, four bits have no level as far on the other side as the largest weight is on its own.
    clipped = (bits == 4) & (offsets == -8 * scales) & (weight / scales > 7.5)
    moved = np.abs(np.asarray(dequantize(found)) - weight)
    assert (moved <= step * np.where(clipped, 1.0, 0.5) * (1 + 1e-5) + 1e-6).all()
    assert clipped.mean() < 0.05


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros_and_what_is_no_number_stays_that(bits: int) -> None:
    weight = weights(2, 16)
    weight[0, :8], weight[1, 3], weight[1, 9] = 0, np.nan, np.inf
    found = np.asarray(dequantize(quantize(weight, bits, 8)))
    assert not found[0, :8].any()
    assert np.isnan(found[1, 3])
    assert not np.isfinite(found[1, 9])
    assert np.isfinite(found[0]).all()


def test_offsets_are_added_and_count_four_bits_from_zero() -> None:
    eight, four = quantize(weights(1, 4), 8, 2), quantize(weights(1, 4), 4, 2)
    scales, offsets = jnp.asarray([[2.0, 0.5]]), jnp.asarray([[1.0, -3.0]])
    values = jnp.asarray([[-100, 3, 0, 127]], jnp.int8)
    found = dataclasses.replace(eight, values=values, scales=scales, offsets=offsets)
    np.testing.assert_allclose(dequantize(found), [[-199, 7, -3, 60.5]])
    values = jnp.asarray(pack_nibbles(np.asarray([[0, 15, 8, 1]], np.uint8)))
    found = dataclasses.replace(four, values=values, scales=scales, offsets=offsets)
    np.testing.assert_allclose(dequantize(found), [[1, 31, 1, -2.5]])


@pytest.mark.parametrize("inputs", [1, 2, 7, 8])
def test_nibbles_are_unpacked_as_they_were_packed(inputs: int) -> None:
    values = np.random.default_rng(1).integers(0, 16, (3, inputs)).astype(np.uint8)
    packed = jnp.asarray(pack_nibbles(values))
    assert packed.shape == (3, (inputs + 1) // 2)
    np.testing.assert_array_equal(unpack_nibbles(packed, inputs), values)


def test_other_bits_and_empty_groups_are_named() -> None:
    with pytest.raises(ValueError, match="bits are 5, supported are 8 and 4"):
        quantize(weights(2, 4), 5, 4)
    with pytest.raises(ValueError, match="group is 0, expected at least one input"):
        quantize(weights(2, 4), 8, 0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_with_a_quantised_matrix_equals_that_with_the_dequantised_one(bits: int, dtype: str) -> None:
    weight = quantize(weights(3, 5, 77), bits, 32)
    x, bias = jnp.asarray(weights(4, 77), dtype), jnp.asarray(weights(3, 5), dtype)
    found = jax.jit(linear)(x, weight, bias)
    assert found.dtype == dtype
    expected = linear(x, dequantize(weight, dtype), bias)
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "apart"])
def test_a_model_of_quantised_matrices_equals_that_of_the_dequantised_ones(bits: int, stacked: bool) -> None:
    config = ODD
    params = quantized_params(random_params(config), bits, group=24)
    batch = batch_of([5, 1], [3, 40])
    of = (lambda params: params) if stacked else unstacked
    step = jax.jit(lambda params, batch, pool: forward(params, batch, pool, config))
    expected, expected_pool = step(of(dequantized_params(params, config)), batch, random_pool(config))
    found, pool = step(of(params), batch, random_pool(config))
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    np.testing.assert_allclose(pool.k, expected_pool.k, atol=2e-5)


def test_quantised_weights_have_a_name_of_their_own_by_values_and_scales() -> None:
    params = random_params(PLAIN)
    eight, four = (quantized_params(params, bits, group=16) for bits in (8, 4))
    (run,) = eight.layers
    qkv = run.qkv
    scaled = dataclasses.replace(qkv, scales=qkv.scales.at[0, 0, 0, 0, 0].multiply(2))
    valued = dataclasses.replace(qkv, values=qkv.values.at[0, 0, 0, 0, 0].add(1))
    others = [dataclasses.replace(eight, layers=(dataclasses.replace(run, qkv=other),)) for other in (scaled, valued)]
    names = [fingerprint(PLAIN, each) for each in (params, eight, four, *others)]
    assert len(set(names)) == len(names)
    assert fingerprint(PLAIN, unstacked(eight)) == names[1]
    assert fingerprint(PLAIN, quantized_params(params, 8, group=16)) == names[1]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("at_once", [1, 1 << 24], ids=["row by row", "whole"])
def test_a_checkpoint_is_quantised_on_load_as_its_matrices_are(tiny_checkpoint, monkeypatch, scheme, at_once) -> None:
    folder = tiny_checkpoint("qwen2")
    config, whole = load(folder, "float32")
    monkeypatch.setattr(checkpoint, "QUANTIZED_AT_ONCE", at_once)
    seen: list[tuple[int, int]] = []
    loaded, found = load(folder, "float32", lambda *done: seen.append(done), quantize=scheme)
    assert loaded == config
    assert seen[-1] == (sum(array.nbytes for array in jax.tree.leaves(whole)),) * 2
    expected = quantized_params(whole, *SCHEMES[scheme])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found.layers[0].down.bits == SCHEMES[scheme].bits
    assert (found.embed.bits, found.lm_head.bits) == (8, 8)
    assert_fields(found.embed)
    assert_fields(found.layers[0].out)


def test_a_checkpoint_in_bfloat16_is_quantised_from_its_own_values(tiny_checkpoint) -> None:
    folder = tiny_checkpoint("llama", dtype="bfloat16")
    _, half = load(folder, "bfloat16", quantize="int8")
    _, wide = load(folder, "float32", quantize="int8")
    jax.tree.map(np.testing.assert_array_equal, half.layers[0].qkv, wide.layers[0].qkv)
    assert half.final_norm.dtype == jnp.bfloat16


def test_quantised_weights_are_not_divided_over_devices() -> None:
    mesh = AbstractMesh((2, 1), ("kv", "group"))
    with pytest.raises(ValueError, match="qkv is quantised, expected full precision to divide it over 2 devices"):
        partition_specs(quantized_params(random_params(PLAIN), 8, group=16).layers[0], mesh)


def test_ways_to_quantise_that_are_not_known_and_several_devices_are_named(tiny_checkpoint) -> None:
    folder = tiny_checkpoint("llama")
    with pytest.raises(ValueError, match="quantize is 'int5' on 1 devices, expected one of int8, int4 on one device"):
        load(folder, "float32", quantize="int5")
    with pytest.raises(ValueError, match="quantize is 'int8' on 2 devices, expected one of int8, int4 on one device"):
        load(folder, "float32", devices=2, quantize="int8")
