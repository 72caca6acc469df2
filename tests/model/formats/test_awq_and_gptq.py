"""AWQ and GPTQ: files made by hand from the published layouts, since their own tools need a GPU.

The layouts are those of AutoAWQ's `awq/modules/linear/gemm.py` (https://github.com/casper-hansen/AutoAWQ) and of
AutoGPTQ's and GPTQModel's `pack` (https://github.com/ModelCloud/GPTQModel): written here number by number.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from model.checkpoint import load
from model.formats.quantization import reader_for
from tests.model.formats.writing import assert_floats_are, mapped, packed, quantised

GROUP = 16
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}


class Rounded(NamedTuple):
    """A weight in numbers with a scale and a zero for each group of inputs."""

    numbers: np.ndarray  # [outputs, inputs]
    scales: np.ndarray  # [outputs, groups] float16
    zeros: np.ndarray  # [outputs, groups]
    group_of: np.ndarray  # [inputs]

    def floats(self) -> torch.Tensor:
        wide = (self.numbers - self.zeros[:, self.group_of]).astype(np.float32)
        return torch.from_numpy(wide * self.scales.astype(np.float32)[:, self.group_of])


def rounded(weight: torch.Tensor, bits: int, shuffled: bool = False) -> Rounded:
    """Any numbers will do, of the weight's size: only their layout is tested."""
    outputs, inputs = weight.shape
    rng, groups = np.random.default_rng(outputs * inputs), -(-inputs // GROUP)
    group_of = np.arange(inputs) // GROUP
    return Rounded(
        rng.integers(0, 2**bits, (outputs, inputs)),
        rng.uniform(0.01, 0.1, (outputs, groups)).astype(np.float16),
        rng.integers(0, 2**bits, (outputs, groups)),
        rng.permutation(group_of) if shuffled else group_of,
    )


def in_awq(module: str, weight: Rounded) -> dict[str, torch.Tensor]:
    def words(numbers: np.ndarray) -> torch.Tensor:  # [rows, outputs]
        made = np.zeros((len(numbers), numbers.shape[1] // 8), np.uint32)
        for word in range(made.shape[1]):
            for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                made[:, word] |= numbers[:, 8 * word + output].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(made.view(np.int32))

    return {
        f"{module}.qweight": words(weight.numbers.T),
        f"{module}.qzeros": words(weight.zeros.T),
        f"{module}.scales": torch.from_numpy(weight.scales.T.copy()),
    }


def in_gptq(module: str, weight: Rounded, bits: int, version: str) -> dict[str, torch.Tensor]:
    zeros = packed(weight.zeros.T, bits).view(np.uint32)
    if version == "gptq":  # one less in every number, borrowed from the next where it was 0
        zeros = zeros - np.uint32(sum(1 << at for at in range(0, 32, bits)))
    return {
        f"{module}.qweight": torch.from_numpy(packed(weight.numbers, bits).T.copy()),
        f"{module}.qzeros": torch.from_numpy(zeros.view(np.int32)),
        f"{module}.scales": torch.from_numpy(weight.scales.T.copy()),
        f"{module}.g_idx": torch.from_numpy(weight.group_of.astype(np.int32)),
    }


def test_an_awq_model_loads_as_its_numbers_say(tiny_checkpoint, tmp_path):
    def quantise(module, weight):
        made = rounded(weight, 4)
        return in_awq(module, made), made.floats()

    folder, expected = quantised(tiny_checkpoint("qwen2"), tmp_path, AWQ, quantise)
    assert_floats_are(load(folder, jnp.float32)[1], load(expected, jnp.float32)[1])


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_gptq_model_loads_as_its_numbers_say(tiny_checkpoint, tmp_path, bits, version, shuffled):
    def quantise(module, weight):
        made = rounded(weight, bits, shuffled)
        return in_gptq(module, made, bits, version), made.floats()

    settings = GPTQ | {"bits": bits, "checkpoint_format": version, "desc_act": shuffled}
    folder, expected = quantised(tiny_checkpoint("llama"), tmp_path, settings, quantise)
    assert_floats_are(load(folder, jnp.float32)[1], load(expected, jnp.float32)[1])


def test_biases_of_zeros_for_modules_that_have_none_are_passed_over(tiny_checkpoint, tmp_path):
    def quantise(module, weight):
        made = rounded(weight, 4)
        return in_gptq(module, made, 4, "gptq") | {f"{module}.bias": torch.zeros(len(weight))}, made.floats()

    folder, expected = quantised(tiny_checkpoint("llama"), tmp_path, GPTQ, quantise)
    assert_floats_are(load(folder, jnp.float32)[1], load(expected, jnp.float32)[1])


def test_groups_that_there_are_not_are_named(tmp_path):
    stored = in_gptq("a", rounded(torch.empty(16, 48), 4), 4, "gptq")
    stored["a.g_idx"][7] = 3
    with pytest.raises(ValueError, match=r"a\.g_idx has groups 0 to 3, expected 0 to 2"):
        reader_for({"quantization_config": GPTQ})(mapped(tmp_path, stored))


@pytest.mark.parametrize("settings", [AWQ, GPTQ | {"checkpoint_format": "gptq_v2"}])
def test_rows_from_any_output_on_are_those_of_the_whole(tmp_path, settings):
    made = rounded(torch.empty(40, 48), 4)
    stored = in_awq("a", made) if settings is AWQ else in_gptq("a", made, 4, "gptq_v2")
    weight = reader_for({"quantization_config": settings})(mapped(tmp_path, stored))["a.weight"]
    for first, stop in ((0, 40), (3, 5), (7, 33), (8, 16), (39, 40)):
        np.testing.assert_array_equal(weight.values(first, stop), made.floats()[first:stop])
        assert weight.stored is not None
        np.testing.assert_array_equal(weight.stored.rows(first, stop).values, made.numbers[first:stop])


def test_one_group_may_be_a_whole_output(tmp_path):
    made = rounded(torch.empty(16, GROUP), 4)
    tensors = mapped(tmp_path, in_gptq("a", made, 4, "gptq"))
    del tensors["a.g_idx"]  # which some tools leave out
    weight = reader_for({"quantization_config": GPTQ | {"group_size": -1}})(tensors)["a.weight"]
    np.testing.assert_array_equal(weight.values(), made.floats())


def test_groups_that_are_not_in_turn_cannot_stay_quantised(tmp_path):
    made = rounded(torch.empty(16, 48), 4, shuffled=True)
    weight = reader_for({"quantization_config": GPTQ})(mapped(tmp_path, in_gptq("a", made, 4, "gptq")))["a.weight"]
    assert weight.stored is None


@pytest.mark.parametrize("settings", [AWQ, GPTQ])
@pytest.mark.parametrize("lost", ["qzeros", "scales"])
def test_what_is_missing_is_named(tmp_path, settings, lost):
    made = rounded(torch.empty(16, 48), 4)
    stored = in_awq("a", made) if settings is AWQ else in_gptq("a", made, 4, "gptq")
    del stored[f"a.{lost}"]
    with pytest.raises(ValueError, match=rf"a\.qweight is I32, but a\.{lost} is missing"):
        reader_for({"quantization_config": settings})(mapped(tmp_path, stored))


@pytest.mark.parametrize("settings", [AWQ, GPTQ])
def test_scales_of_another_group_size_are_named(tmp_path, settings):
    made = rounded(torch.empty(16, 48), 4)
    stored = in_awq("a", made) if settings is AWQ else in_gptq("a", made, 4, "gptq")
    with pytest.raises(ValueError, match=r"a\.scales has shape \(3, 16\), expected \(6, 16\)"):
        reader_for({"quantization_config": settings | {"group_size": 8}})(mapped(tmp_path, stored))
