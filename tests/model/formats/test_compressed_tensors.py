"""compressed-tensors: files that the package of this name wrote, and older ones made by hand."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open

from model.checkpoint import load
from model.formats.quantization import reader_for
from model.formats.safetensors import map_tensors
from tests.model.formats.write_compressed_tensors import CASES, FILE
from tests.model.formats.writing import assert_floats_are, mapped, packed, quantised

METHOD = "compressed-tensors"
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}


def settings(targets: list[str], weights: dict[str, Any], layout: str = "pack-quantized") -> dict[str, Any]:
    group = {"targets": targets, "weights": weights}
    return {"quant_method": METHOD, "format": layout, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def by_hand(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Any numbers of 4 bits in groups, packed as the package packs them."""
    rng = np.random.default_rng(weight.numel())
    numbers = rng.integers(0, 16, tuple(weight.shape))
    scales = rng.uniform(0.01, 0.1, (len(weight), weight.shape[1] // 16)).astype(np.float32)
    stored = {
        f"{module}.weight_packed": torch.from_numpy(packed(numbers, 4)),
        f"{module}.weight_scale": torch.from_numpy(scales),
        f"{module}.weight_shape": torch.tensor(weight.shape),
    }
    return stored, torch.from_numpy((numbers - 8).astype(np.float32) * scales.repeat(16, axis=1))


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_package_makes_of_its_own_file(case):
    with safe_open(FILE, framework="np") as file:
        groups, expected = json.loads(file.metadata()["config_groups"]), file.get_tensor(f"{case}.expected")
    stored = {name: tensor for name, tensor in map_tensors([FILE]).items() if not name.endswith(".expected")}
    config = {"quantization_config": {"quant_method": METHOD, "format": "mixed-precision", "config_groups": groups}}
    tensors = reader_for(config)(stored)
    assert tensors.keys() == {f"{name}.weight" for name in CASES}
    weight = tensors[f"{case}.weight"]
    np.testing.assert_array_equal(weight.values(), expected)
    np.testing.assert_array_equal(weight.values(5, 20), expected[5:20])
    assert (weight.stored is not None) == (case.startswith("int") and "matrix" not in case)


def test_a_model_loads_and_modules_that_were_left_out_stay(tiny_checkpoint, tmp_path):
    folder, expected = quantised(tiny_checkpoint("llama"), tmp_path, settings(["Linear"], INT4), by_hand)
    assert_floats_are(load(folder, jnp.float32)[1], load(expected, jnp.float32)[1])


def test_groups_of_inputs_may_be_anywhere(tmp_path):
    stored, expected = by_hand("a", torch.empty(8, 48))
    group_of = np.random.default_rng(0).permutation(np.arange(48) // 16).astype(np.int32)
    numbers = expected / stored["a.weight_scale"].repeat_interleave(16, 1)
    tensors = mapped(tmp_path, stored | {"a.weight_g_idx": torch.from_numpy(group_of)})
    weight = reader_for({"quantization_config": settings(["a"], INT4)})(tensors)["a.weight"]
    np.testing.assert_allclose(weight.values(), numbers * stored["a.weight_scale"][:, group_of], rtol=1e-6)
    assert weight.stored is None


def test_groups_take_turns_where_their_order_was_never_set(tmp_path):
    stored, expected = by_hand("a", torch.empty(8, 48))
    tensors = mapped(tmp_path, stored | {"a.weight_g_idx": torch.full((48,), -1, dtype=torch.int32)})
    weight = reader_for({"quantization_config": settings(["a"], INT4)})(tensors)["a.weight"]
    np.testing.assert_array_equal(weight.values(), expected)


def test_a_module_has_the_scheme_that_names_it_before_that_of_its_class(tmp_path):
    stored, expected = by_hand("layers.0.down", torch.empty(8, 48))
    config = settings(["Linear"], INT4 | {"group_size": 8})
    config["config_groups"]["group_1"] = {"targets": [r"re:.*\.down$"], "weights": INT4}
    weight = reader_for({"quantization_config": config})(mapped(tmp_path, stored))["layers.0.down.weight"]
    np.testing.assert_array_equal(weight.values(), expected)


def test_scales_for_another_cache_and_for_activations_are_passed_over(tmp_path):
    stored, _ = by_hand("self_attn.q_proj", torch.empty(8, 48))
    others = ("self_attn.k_scale", "self_attn.v_scale", "self_attn.q_proj.input_scale", "self_attn.q_proj.output_scale")
    tensors = mapped(tmp_path, stored | {name: torch.ones(1) for name in others})
    made = reader_for({"quantization_config": settings(["Linear"], INT4)})(tensors)
    assert made.keys() == {"self_attn.q_proj.weight"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("a.weight_scale"), r"a\.weight_packed is I32, but a\.weight_scale is missing"),
        (lambda s: s.pop("a.weight_shape"), r"but a\.weight_shape is missing"),
        (lambda s: s.update({"a.weight_scale": torch.ones(8, 2)}), r"has shape \(8, 2\), expected \(8, 3\)"),
        (lambda s: s.update({"a.weight_shape": torch.tensor([8, 64])}), r"has shape \(8, 6\), expected \(8, 8\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, edit, message):
    stored, _ = by_hand("a", torch.empty(8, 48))
    edit(stored)
    with pytest.raises(ValueError, match=message):
        reader_for({"quantization_config": settings(["Linear"], INT4)})(mapped(tmp_path, stored))


def test_a_module_that_no_target_names_is_an_error(tmp_path):
    stored, _ = by_hand("a", torch.empty(8, 48))
    with pytest.raises(ValueError, match=r"a\.weight_packed is I32, but no target of config_groups .* is a"):
        reader_for({"quantization_config": settings(["b"], INT4)})(mapped(tmp_path, stored))
