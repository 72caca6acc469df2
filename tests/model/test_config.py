"""Configs: every family as transformers reads it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from model.config import ModelConfig, RopeConfig
from model.families import FAMILIES, LACKING, load_config, read_config

CORE = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


# What a model with recurrent layers has, too.
HYBRID: dict[str, dict[str, Any]] = {
    **{family: {"num_hidden_layers": 4} for family in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    **{family: {"text_config": {**CORE, "num_hidden_layers": 4}} for family in ("qwen3_5", "qwen3_5_moe")},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
}


def config(family: str, **fields: Any) -> dict[str, Any]:
    window = {"sliding_window": None} if family == "mistral" else {}
    return {"model_type": family, **CORE, **window, **HYBRID.get(family, {}), **fields}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "nemotron_h"])
def test_missing_keys_take_the_defaults_of_transformers(family):
    ours, theirs = read_config(config(family)), AutoConfig.for_model(family, **CORE).get_text_config()
    if family in ("qwen3_5", "qwen3_5_moe"):  # whose text has sizes of its own
        theirs = AutoConfig.for_model(f"{family}_text", **CORE)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.kind == theirs.rope_parameters["rope_type"]
    assert ours.rope.partial == (theirs.rope_parameters.get("partial_rotary_factor") or 1.0)
    if ours.experts:
        assert ours.experts.count == (getattr(theirs, "num_local_experts", None) or theirs.num_experts)
        assert ours.experts.per_token == theirs.num_experts_per_tok
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_the_old_and_the_new_form_of_rope_read_alike(type_key):
    old = config("llama", rope_theta=500000.0, rope_scaling={type_key: "llama3", **LLAMA3})
    new = config("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3})
    read = read_config(old).rope
    assert read == read_config(new).rope
    assert read == RopeConfig(500000.0, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


def test_a_bare_rope_theta_or_null_scaling_is_the_default_rope() -> None:
    assert read_config(config("qwen2", rope_theta=1e6, rope_scaling=None)).rope == RopeConfig(theta=1e6)


def test_yarn_options_are_read_and_its_context_defaults_to_max_position() -> None:
    rope = {"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False, "beta_fast": 16}
    read = read_config(config("qwen3", rope_scaling=rope, max_position_embeddings=4096)).rope
    assert (read.kind, read.factor, read.original_max_position) == ("yarn", 4.0, 4096)
    assert (read.mscale, read.mscale_all_dim, read.truncate, read.beta_fast, read.beta_slow) == (0.7, 1.2, False, 16, 1)


def test_biases_and_norms_follow_the_family() -> None:
    def parts(family: str, **fields: Any) -> tuple[bool, ...]:
        made = read_config(config(family, **fields))
        return made.qkv_bias, made.out_bias, made.mlp_bias, made.qk_norm

    assert parts("llama") == (False, False, False, False)
    assert parts("llama", attention_bias=True, mlp_bias=True) == (True, True, True, False)
    assert parts("qwen2", attention_bias=False) == (True, False, False, False)
    assert parts("qwen3") == (False, False, False, True)
    assert parts("qwen3", attention_bias=True, mlp_bias=True) == (True, True, False, True)
    assert parts("mistral", attention_bias=True) == (False, False, False, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "gemma3"},
            "model_type is 'gemma3', supported are llama, mistral, qwen2, qwen3, qwen3_moe, mixtral, gpt_oss, glm4_moe",
        ),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ({"quantization_config": {"quant_method": "quanto"}}, r"quantization_config \(quanto\) has quant_method"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic', supported are default, linear, llama3, yarn",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters has rope type 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of rope type 'linear' has no factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "has no low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": None}, "hidden_size is None, expected a positive whole number"),
        ({"num_key_value_heads": 5}, "num_attention_heads is 32, expected a multiple of num_key_value_heads"),
        ({"head_dim": 33}, "head_dim is 33, expected an even number"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"is_causal": False}, "is_causal is False, supported is true"),
        ({"per_layer_config": {"1": {"num_attention_heads": 16}}}, "per_layer_config has fields of single layers"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None, expected a number"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6', expected a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected a JSON object"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling's factor is 0, expected a positive number"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        read_config(config("llama") | fields)


def windows(family: str, **fields: Any) -> list[int | None]:
    """The window of each layer."""
    return [kind.window for kind in read_config(config(family, **fields)).layers]


def test_windows_are_on_the_layers_on_which_transformers_has_them() -> None:
    qwen = {"use_sliding_window": True, "sliding_window": 1024}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows("mistral", sliding_window=4096) == [4096, 4096, 4096]
    assert windows("mixtral", sliding_window=4096) == [4096, 4096, 4096]
    assert windows("qwen2", **qwen, max_window_layers=1) == [None, 1024, 1024]
    assert windows("qwen3", use_sliding_window=True, max_window_layers=0) == [4096, 4096, 4096]
    assert windows("qwen3", **qwen, layer_types=types) == [1024, None, 1024]
    assert windows("qwen3_moe", **qwen) == [1024, 1024, 1024]
    assert windows("gpt_oss") == [128, None, 128]
    assert windows("gpt_oss", layer_types=[*types[::-1][:2], "full_attention"]) == [128, None, None]


def test_mistral_without_the_key_has_the_window_of_transformers() -> None:
    fields = config("mistral")
    del fields["sliding_window"]
    assert [kind.window for kind in read_config(fields).layers] == [4096] * 3


def test_a_null_rotation_of_gpt_oss_is_the_default_as_in_transformers() -> None:
    assert read_config(config("gpt_oss", rope_parameters=None)).rope == read_config(config("gpt_oss")).rope


def test_experts_are_on_the_layers_on_which_transformers_has_them() -> None:
    def experts(family: str, **fields: Any) -> tuple[list[bool], int]:
        made = read_config(config(family, **fields))
        return [kind.experts for kind in made.layers], made.ffn_size

    assert experts("mixtral") == experts("gpt_oss") == experts("qwen3_moe") == ([True, True, True], 0)
    assert experts("qwen3_moe", decoder_sparse_step=2) == ([False, True, False], 96)
    assert experts("qwen3_moe", mlp_only_layers=[2]) == ([True, True, False], 96)
    assert experts("glm4_moe") == ([False, True, True], 96)
    assert experts("glm4_moe", first_k_dense_replace=0) == ([True, True, True], 0)
    dense = read_config(config("glm4_moe", first_k_dense_replace=3))
    assert (dense.experts, dense.ffn_size) == (None, 96)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "goes through 9 of 8 experts"),
        ("glm4_moe", {"n_group": 3}, "from 1 of 3 groups"),
        ("glm4_moe", {"n_group": 32, "topk_group": 1}, "goes through 8 of 128 experts, from 1 of 32 groups"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected num_hidden_layers"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0, expected a positive whole number"),
        ("mixtral", {"sliding_window": -3}, "sliding_window is -3, expected a positive whole number"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers is None, expected a num"),
        ("glm4_moe", {"partial_rotary_factor": 2.0}, r"partial_rotary_factor is 2\.0, expected at most 1\.0"),
        ("glm4_moe", {"partial_rotary_factor": 0}, "partial_rotary_factor is 0, expected a positive number"),
        ("glm4_moe", {"first_k_dense_replace": None}, "first_k_dense_replace is None, expected a number"),
    ],
)
def test_what_cannot_be_is_named(family, fields, message):
    with pytest.raises(ValueError, match=message):
        read_config(config(family, **fields))


@pytest.mark.parametrize("family", LACKING)
def test_a_known_family_that_is_not_served_says_what_it_needs(family):
    with pytest.raises(ValueError, match=f"model_type is '{family}', which needs {LACKING[family]}, supported are"):
        read_config({"model_type": family})


def test_the_json_of_a_plain_model_has_no_field_that_was_added_since() -> None:
    """It is in every fingerprint, so that pages of today's models would be orphaned."""
    old = json.loads(read_config(config("llama")).to_json())
    assert not old.keys() & {"layers", "experts", "sinks", "recurrent", "query_gate", "centred_norms", "activation"}
    assert "partial" not in old["rope"]
    kinds = json.loads(read_config(config("glm4_moe")).to_json())
    assert kinds["layers"][2] == {"experts": True, "window": None}
    assert not kinds["experts"].keys() & {"latent_size", "shared_gate"}
    new = read_config(config("gpt_oss"))
    assert json.loads(new.to_json()).keys() >= {"layers", "experts", "sinks"}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 4096}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 1024, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 3}),
        ("llama", {"sliding_window": 1024}),
    ],
)
def test_a_window_that_masks_nothing_is_accepted(family, fields):
    assert read_config(config(family) | fields).num_layers == 3


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [(7, None, (7,)), ([7, 8], None, (7, 8)), (7, {"eos_token_id": [9, 7]}, (9, 7)), (7, {"top_p": 0.9}, (7,))],
)
def test_end_of_sequence_ids_prefer_the_generation_config(tmp_path: Path, own, generation, expected):
    (tmp_path / "config.json").write_text(json.dumps(config("qwen2", eos_token_id=own)))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_config(tmp_path).eos_token_ids == expected


WRONG = ("x", [], [1], ["x"], {}, {"a": {}}, None, -1, 0, 1.5, True, 10**12, float("nan"))


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_field_holds_a_config_is_read_or_refused_in_words(family):
    whole = AutoConfig.for_model(family, **CORE).to_dict() | config(family)
    rope = {"rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "attention_factor": 1.0}
    ropes = [
        rope | {"rope_type": kind, "original_max_position_embeddings": 64} for kind in ("yarn", "llama3", "linear")
    ]
    changed = [{field: value} for field in (*whole, "rope_scaling", "quantization_config") for value in WRONG]
    changed += [{"rope_parameters": each | {field: value}} for each in ropes for field in each for value in WRONG]
    read = 0
    for fields in changed:
        try:
            hash(read_config(whole | fields))
            read += 1
        except ValueError:
            continue
    assert 0 < read < len(changed)


@pytest.mark.parametrize("found", ["x", {}, {"a": 1}, [1, "x"], True, 1.5])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_of_sequence_id_that_is_no_number_is_named_with_its_file(tmp_path: Path, name, found):
    (tmp_path / "config.json").write_text(json.dumps(config("llama")))
    file = tmp_path / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | {"eos_token_id": found}))
    with pytest.raises(ValueError, match=f"{file}: eos_token_id is .*, expected the number of a token"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 0}, "rope_theta is 0, expected a positive number"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1e+12, expected at most 10,000"),
        ({"layer_types": 5}, "layer_types is 5, expected a list"),
        ({"quantization_config": "x"}, "quantization_config is 'x', expected a JSON object"),
        ({"model_type": [1]}, "model_type is [1], supported are"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(config("llama") | fields)


def test_a_file_that_nests_without_end_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"config\.json nests too deeply"):
        load_config(tmp_path)


def test_errors_name_the_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match=f"{path}: model_type is 'mamba'"):
        load_config(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path} is not JSON"):
        load_config(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_json_gives_back_an_equal_hashable_config(family) -> None:
    made = read_config(config(family, rope_scaling={"type": "llama3", **LLAMA3}, eos_token_id=[1, 2]))
    again = ModelConfig.from_json(made.to_json())
    assert again == made
    assert hash(again) == hash(made)
    assert dataclasses.replace(made, norm_eps=1e-4).to_json() != made.to_json()
