"""Weights in 8-bit floats, quantised and dequantised by transformers' own operations."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from model.checkpoint import load
from model.formats import fp8
from tests.model.formats.writing import mapped, quantised

BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 16]}


def by_transformers(name: str, weight: torch.Tensor, scale_fmt: str = "float", block: list[int] | None = None):
    settings = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    stored = Fp8Quantize(SimpleNamespace(quantization_config=settings))._quantize_one(name, weight)
    values, scales = stored.values()
    return stored, Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=torch.float32)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_a_model_in_blocks_loads_as_transformers_dequantises_it(tiny_checkpoint, tmp_path, scale_fmt):
    def quantise(module, weight):
        return by_transformers(f"{module}.weight", weight, scale_fmt, [32, 16])

    settings = BLOCK | {"scale_fmt": scale_fmt, "modules_to_not_convert": ["lm_head"]}
    folder, expected = quantised(tiny_checkpoint("llama"), tmp_path, settings, quantise)
    jax.tree.map(np.testing.assert_array_equal, load(folder, jnp.float32)[1], load(expected, jnp.float32)[1])


def test_a_model_with_one_scale_for_each_matrix_loads_and_its_scales_of_activations_are_passed_over(
    tiny_checkpoint, tmp_path
):
    def quantise(module, weight):
        stored, expected = by_transformers(f"{module}.weight", weight)
        stored[f"{module}.weight_scale_inv"] = stored[f"{module}.weight_scale_inv"].reshape(())
        return stored | {f"{module}.activation_scale": torch.tensor(3.0)}, expected

    settings = BLOCK | {"activation_scheme": "static", "weight_block_size": None}
    folder, expected = quantised(tiny_checkpoint("qwen3"), tmp_path, settings, quantise)
    jax.tree.map(np.testing.assert_array_equal, load(folder, jnp.float32)[1], load(expected, jnp.float32)[1])


@pytest.mark.parametrize("shape", [(40, 1), (40,), (1,), (), (1, 1)])
def test_scales_of_outputs_and_of_the_matrix_come_in_several_shapes(tmp_path, shape):
    weight = torch.randn(40, 24).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    tensors = fp8.read(mapped(tmp_path, {"a.weight": weight, "a.weight_scale": scale}), None)
    expected = weight.float() * (scale.reshape(-1, 1) if scale.numel() == 40 else scale)
    np.testing.assert_array_equal(tensors["a.weight"].values(), expected)
    np.testing.assert_array_equal(tensors["a.weight"].values(7, 30), expected[7:30])
    assert tensors.keys() == {"a.weight"}


def test_the_last_blocks_may_be_cut_off(tmp_path):
    weight, scale = torch.randn(40, 24).to(torch.float8_e4m3fn), torch.rand(3, 2)
    tensors = fp8.read(mapped(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}), (16, 16))
    by_element = scale.repeat_interleave(16, 0)[:40].repeat_interleave(16, 1)[:, :24]
    np.testing.assert_array_equal(tensors["a.weight"].values(3, 37), (weight.float() * by_element)[3:37])


@pytest.mark.parametrize("block", [[16, 8], None])
def test_fused_experts_have_a_grid_of_scales_each(tmp_path, block):
    stored, expected = by_transformers("experts.gate_up_proj", torch.randn(3, 32, 24), block=block)
    made = fp8.read(mapped(tmp_path, stored), tuple(block) if block else None)["experts.gate_up_proj"]
    np.testing.assert_array_equal(made.values(), expected)
    np.testing.assert_array_equal(made.values(1, 3), expected[1:3])


def test_what_lacks_a_scale_is_named(tmp_path):
    tensors = mapped(tmp_path, {"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"safetensors: a\.weight is F8_E4M3, but a\.weight_scale_inv is missing"):
        fp8.read(tensors, (4, 4))


def test_a_misshapen_scale_is_named(tmp_path):
    stored = {"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"a\.weight_scale_inv has shape \(2, 3\), expected \(2, 2\)"):
        fp8.read(mapped(tmp_path, stored), (4, 4))
