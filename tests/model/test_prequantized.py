"""Checkpoints that come in 4 or 8 bits keep them in memory, where all matrices of a field have the same groups."""

from __future__ import annotations

import logging

import jax.numpy as jnp
import pytest
import torch

from model.checkpoint import load
from model.quantized import Quantized
from tests.model.conftest import QWEN3_MOE
from tests.model.formats.test_awq_and_gptq import AWQ, GPTQ, in_awq, in_gptq, rounded
from tests.model.formats.test_compressed_tensors import INT4, by_hand, settings
from tests.model.formats.writing import assert_floats_are, quantised

FIELDS = ("qkv", "out", "gate_up", "down")


def awq(module, weight):
    made = rounded(weight, 4)
    return in_awq(module, made), made.floats()


def gptq_of(bits, shuffled=lambda module: False):
    def quantise(module, weight):
        made = rounded(weight, bits, shuffled(module))
        return in_gptq(module, made, bits, "gptq"), made.floats()

    return quantise


@pytest.mark.parametrize(
    ("config", "quantise", "bits"),
    [
        (AWQ, awq, 4),
        (GPTQ, gptq_of(4), 4),
        (GPTQ | {"bits": 8}, gptq_of(8), 8),
        (settings(["Linear"], INT4), by_hand, 4),
    ],
    ids=["awq", "gptq-4", "gptq-8", "compressed-tensors"],
)
def test_matrices_stay_in_the_bits_that_they_come_in(tiny_checkpoint, tmp_path, caplog, config, quantise, bits):
    folder, expected = quantised(tiny_checkpoint("qwen2"), tmp_path, config, quantise)
    with caplog.at_level(logging.INFO, "tokenzero.checkpoint"):
        params = load(folder, jnp.float32)[1]
    assert caplog.messages[0].startswith(f"21 tensors of int{bits} stay quantised: ")
    for field in FIELDS:
        matrix = getattr(params.layers[0], field)
        assert isinstance(matrix, Quantized)
        assert (matrix.bits, matrix.group) == (bits, 16)
    assert_floats_are(params, load(expected, jnp.float32)[1])


def test_experts_stay_in_the_bits_that_they_come_in(tiny_checkpoint, tmp_path):
    folder, expected = quantised(tiny_checkpoint("qwen3_moe", **QWEN3_MOE), tmp_path, AWQ, awq)
    params = load(folder, jnp.float32)[1]
    experts = params.layers[0].experts
    assert isinstance(experts.gate_up, Quantized)
    assert isinstance(experts.down, Quantized)
    assert not isinstance(experts.router, Quantized)
    assert_floats_are(params, load(expected, jnp.float32)[1])


def test_a_field_with_groups_of_another_kind_is_dequantised(tiny_checkpoint, tmp_path):
    quantise = gptq_of(4, lambda module: module.endswith("1.mlp.up_proj"))
    folder, expected = quantised(tiny_checkpoint("llama"), tmp_path, GPTQ | {"desc_act": True}, quantise)
    params = load(folder, jnp.float32)[1]
    kept = {field for field in FIELDS if isinstance(getattr(params.layers[0], field), Quantized)}
    assert kept == {"qkv", "out", "down"}
    assert_floats_are(params, load(expected, jnp.float32)[1])


def test_eight_bits_by_output_stay_too(tiny_checkpoint, tmp_path):
    def quantise(module, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        numbers = torch.round(weight / scale).to(torch.int8)
        return {f"{module}.weight": numbers, f"{module}.weight_scale": scale}, numbers.float() * scale

    config = settings(["Linear"], {"num_bits": 8, "strategy": "channel"}, "int-quantized")
    folder, expected = quantised(tiny_checkpoint("llama"), tmp_path, config, quantise)
    params = load(folder, jnp.float32)[1]
    assert (params.layers[0].down.bits, params.layers[0].down.group) == (8, 96)
    assert_floats_are(params, load(expected, jnp.float32)[1])
