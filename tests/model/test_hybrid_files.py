"""Checkpoints of models with recurrent layers: which ones load, and what is refused before a weight is read."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from model import checkpoint
from model.config import ModelConfig
from model.families import read_config
from model.fingerprint import fingerprint
from model.rope_scaling import with_rope_scaling
from model.sharding import make_mesh
from tests.model.hybrids import HYBRIDS, random_hybrid

VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The checkpoint of a family, written once; copy it before changing a file."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            random_hybrid(family, **HYBRIDS[family]).save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def changed(folder_of, tmp_path):
    """`changed(family, config, tensors)`: a copy of a checkpoint after two functions that change its parts."""

    def make(family, config=lambda fields: None, tensors=lambda named: None):
        folder = shutil.copytree(folder_of(family), tmp_path / "copy")
        fields = json.loads((folder / "config.json").read_text())
        config(fields)
        (folder / "config.json").write_text(json.dumps(fields))
        named = load_file(folder / "model.safetensors")
        tensors(named)
        save_file(named, folder / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_config_comes_back_from_its_json_and_names_its_layers(family, folder_of):
    config = checkpoint.load_config(folder_of(family))
    assert ModelConfig.from_json(config.to_json()) == config
    assert config.recurrent_layers == 2
    assert config.attention_layers == 1


def test_a_letter_pattern_means_the_same_as_a_list_of_types() -> None:
    fields = {"model_type": "nemotron_h", "vocab_size": 8, "hidden_size": 32}
    types = ["linear_attention", "moe", "full_attention", "mlp"]
    by_list = read_config({**fields, "layers_block_type": types})
    assert read_config({**fields, "hybrid_override_pattern": "ME*-"}) == by_list
    legacy = ["mamba", "moe", "attention", "mlp"]
    assert read_config({**fields, "layers_block_type": legacy}) == by_list


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_of_a_multimodal_checkpoint_is_the_same_model_as_text_alone(name, folder_of, tmp_path):
    """Its vision tower is left aside, and experts of a layer may be one tensor."""
    family = f"{name}_text"
    text = random_hybrid(family, **HYBRIDS[family])
    whole = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(name, text_config=text.config.to_dict(), vision_config=VISION)
    )
    with torch.no_grad():
        whole.model.language_model.load_state_dict(text.model.state_dict())
        whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(tmp_path)
    assert any("visual" in key for key in load_file(tmp_path / "model.safetensors"))
    alone, both = checkpoint.load(folder_of(family), "float32"), checkpoint.load(tmp_path, "float32")
    assert alone[0] == both[0]
    for one, other in zip(jax.tree.leaves(alone[1]), jax.tree.leaves(both[1]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert fingerprint(*alone) == fingerprint(*both)


def test_experts_of_a_layer_in_one_tensor_are_those_of_single_tensors(folder_of, changed):
    def fuse(named):
        for layer in range(3):
            prefix = f"model.layers.{layer}.mlp.experts"
            parts = {
                part: np.stack([named.pop(f"{prefix}.{n}.{part}.weight") for n in range(8)])
                for part in ("gate_proj", "up_proj", "down_proj")
            }
            named[f"{prefix}.gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
            named[f"{prefix}.down_proj"] = parts["down_proj"]

    _, fused = checkpoint.load(changed("qwen3_5_moe_text", tensors=fuse), "float32")
    _, single = checkpoint.load(folder_of("qwen3_5_moe_text"), "float32")
    for one, other in zip(jax.tree.leaves(fused), jax.tree.leaves(single), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("family", "field", "value", "refusal"),
    [
        (
            "qwen3_next",
            "layer_types",
            ["conv", "full_attention", "linear_attention"],
            "layer_types has conv, supported",
        ),
        ("qwen3_5_text", "layer_types", ["linear_attention"] * 3, "layer_types has no full_attention, expected"),
        ("qwen3_5_text", "mamba_ssm_dtype", "bfloat16", "mamba_ssm_dtype is 'bfloat16', supported is float32"),
        (
            "nemotron_h",
            "mamba_ssm_cache_dtype",
            "float16",
            "mamba_ssm_cache_dtype is 'float16', supported is 'float32'",
        ),
        ("nemotron_h", "layers_block_type", ["mamba", "attention", "rwkv"], "layer_types has rwkv, supported"),
        ("nemotron_h", "mlp_bias", True, "mlp_bias is True, supported is False"),
        ("qwen3_next", "linear_num_value_heads", 3, "linear_num_value_heads is 3, expected a multiple"),
    ],
)
def test_a_config_that_is_not_served_is_refused_by_its_field(family, field, value, refusal, changed):
    folder = changed(family, config=lambda fields: fields.update({field: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {refusal}"):
        checkpoint.load(folder, "float32")


@pytest.mark.parametrize(
    ("family", "name", "refusal"),
    [
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_qkvz.weight", "in_proj_qkvz.weight is not in the files"),
        ("qwen3_5_text", "model.layers.1.linear_attn.A_log", r"lack model\.layers\.1\.linear_attn\.A_log"),
        ("nemotron_h", "backbone.layers.0.mixer.D", r"lack model\.layers\.0\.mixer\.D"),
    ],
)
def test_a_missing_tensor_is_named_before_weights_are_read(family, name, refusal, changed):
    with pytest.raises(ValueError, match=refusal):
        checkpoint.load(changed(family, tensors=lambda named: named.pop(name)), "float32")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_qkvz.weight"),
        ("qwen3_5_text", "model.layers.0.linear_attn.conv1d.weight"),
        ("nemotron_h", "backbone.layers.3.mixer.in_proj.weight"),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(family, name, changed):
    ours = name.replace("backbone", "model").replace(".", r"\.")
    folder = changed(family, tensors=lambda named: named.update({name: named[name][1:]}))
    with pytest.raises(ValueError, match=rf"{ours} has shape \(\d+, .*expected \(\d+, "):
        checkpoint.load(folder, "float32")


def test_a_model_that_does_not_rotate_has_no_frequencies_to_stretch(folder_of):
    config = checkpoint.load_config(folder_of("nemotron_h"))
    with pytest.raises(ValueError, match="attention of a nemotron_h model does not rotate"):
        with_rope_scaling(config, {"rope_type": "yarn", "factor": 2.0})


def test_several_devices_are_refused_by_name(folder_of):
    config = checkpoint.load_config(folder_of("nemotron_h"))
    with pytest.raises(ValueError, match="a nemotron_h model has recurrent layers, which take one device: 2 are asked"):
        make_mesh(config, 2)
