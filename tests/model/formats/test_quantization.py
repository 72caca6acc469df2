"""What a `quantization_config` asks for: read by its method, or refused before any weight is."""

from __future__ import annotations

import json
import logging
import shutil

import jax.numpy as jnp
import pytest
import torch

from model.checkpoint import load
from model.families import load_config
from model.formats.quantization import reader_for
from tests.model.formats.test_fp8 import BLOCK, by_transformers
from tests.model.formats.writing import mapped, quantised

CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def group(**weights: object) -> dict[str, object]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def test_a_model_without_the_setting_keeps_its_tensors(tmp_path):
    tensors = mapped(tmp_path, {"a.weight": torch.ones(2, 2)})
    assert reader_for({})(tensors) == reader_for({"quantization_config": None})(tensors) == tensors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "has quant_method 'bitsandbytes', supported are awq, compressed-tensors, fp8, gptq, mxfp4",
        ),
        ({"bits": 4}, "has quant_method None, supported are awq"),
        ({"quant_method": "awq", "bits": 3, "group_size": 128}, r"\(awq\) has bits 3, supported are 4"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "has version 'gemv', supported are"),
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, "has group_size 0, expected a number of inputs"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, r"\(gptq\) has bits 3, supported are 4, 8"),
        ({"quant_method": "gptq", "bits": 4}, "has group_size None, expected a number of inputs, or -1"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
            "has checkpoint_format 'marlin', supported are gptq, gptq_v2",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 8, "dynamic": {"-:a": {}, "+:b": {"bits": 8}}},
            r"settings of their own for '\+:b'",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2"}, r"\(fp8\) has fmt 'e5m2', supported are e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\], expected null or two sizes"),
        (CT | {"format": "nvfp4-pack-quantized"}, "has format 'nvfp4-pack-quantized', supported are pack-quantized"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "has format 'sparse-24-bitmask', supported are"),
        (CT | {"transform_config": {"config_groups": {"R1": {}}}}, "has a transform_config, which is not supported"),
        (CT | group(num_bits=2, strategy="group", group_size=8), r"group_0\) has num_bits 2, supported are 4, 8"),
        (CT | group(num_bits=4, type="float"), "has num_bits 4, supported are 8"),
        (CT | group(num_bits=4, strategy="tensor_group"), "has strategy 'tensor_group', supported are tensor, channel"),
        (CT | group(num_bits=4, strategy="group"), "has group_size None, expected a size"),
    ],
)
def test_what_is_not_supported_is_named_before_any_weight_is_read(tiny_checkpoint, tmp_path, settings, message):
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"config\.json: quantization_config .*{message}"):
        load_config(folder)


def test_quantised_tensors_without_a_setting_are_refused(tiny_checkpoint, tmp_path):
    def quantise(module, weight):
        return by_transformers(f"{module}.weight", weight, block=[32, 16])

    folder, _ = quantised(tiny_checkpoint("llama"), tmp_path, {}, quantise)
    with pytest.raises(ValueError, match=r"_proj\.weight is F8_E4M3, expected one of F32, BF16, F16"):
        load(folder, jnp.float32)


def test_what_dequantising_costs_is_logged_once(tiny_checkpoint, tmp_path, caplog):
    def quantise(module, weight):
        return by_transformers(f"{module}.weight", weight, block=[32, 16])

    folder, _ = quantised(tiny_checkpoint("llama"), tmp_path, BLOCK, quantise)
    with caplog.at_level(logging.INFO, "tokenzero.checkpoint"):
        load(folder, jnp.bfloat16)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("21 tensors of F8_E4M3 are dequantised on load: ")
    assert caplog.messages[0].endswith("GB in bfloat16")
