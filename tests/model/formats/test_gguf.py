"""GGUF files, written by the `gguf` package: the same config and weights as the checkpoint that they were made from."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import RopeScalingType
from transformers import AutoModelForCausalLM

from model.checkpoint import load, resolve
from model.config import RopeConfig
from model.families import load_config
from model.formats import gguf
from model.formats.gguf_file import StoredTensor, read_gguf
from model.quantized import Quantized, dequantize, floats
from tests.helpers.gguf_files import dequantised_copy, write_gguf
from tests.model.conftest import OF_KINDS, VARIANTS
from tests.model.test_decoder import PAGE, Runner

# K-quants have blocks of 256 values.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def assert_equal(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


# llama.cpp calls a mistral llama; of Llama 3's scaling there is a test of its own.
NAMED = [(name, *rest) for name, *rest in VARIANTS if name not in ("mistral", "llama-llama3")]


@pytest.mark.parametrize(("name", "family", "overrides"), NAMED, ids=[name for name, *_ in NAMED])
def test_every_variant_has_the_config_and_weights_that_it_was_made_from(
    tiny_checkpoint, tmp_path, name, family, overrides
):
    folder, path = tiny_checkpoint(family, **overrides), tmp_path / "model.gguf"
    write_gguf(folder, path)
    config, params = load(path, jnp.float32)
    expected_config, expected = load(folder, jnp.float32)
    assert config == expected_config
    assert_equal(params, expected)


MIXED = [
    (name, family, overrides | {"sliding_window": None} if family == "mixtral" else overrides)
    for name, family, overrides in OF_KINDS
    if name in ("qwen3_moe", "mixtral-window", "gpt_oss")
]


@pytest.mark.parametrize(("name", "family", "overrides"), MIXED, ids=[family for _, family, _ in MIXED])
def test_experts_are_those_that_a_file_was_made_from(tiny_checkpoint, tmp_path, name, family, overrides):
    folder, path = tiny_checkpoint(family, **overrides), tmp_path / "model.gguf"
    write_gguf(folder, path)
    config, params = load(path, jnp.float32)
    expected_config, expected = load(folder, jnp.float32)
    assert config == expected_config
    assert_equal(params, expected)
    # Quantised, a layer's experts are still its own: Q8_0 keeps each weight within half a step of its group.
    write_gguf(folder, path, Kind.Q8_0)
    rounded = jax.tree.leaves(load(path, jnp.float32)[1].layers[0].experts, is_leaf=lambda x: isinstance(x, Quantized))
    for one, other in zip(rounded, jax.tree.leaves(expected.layers[0].experts), strict=True):
        values = dequantize(one).reshape(other.shape) if isinstance(one, Quantized) else one
        np.testing.assert_allclose(values, other, atol=float(jnp.abs(other).max()) / 127)


def test_experts_that_lack_a_part_are_named(tiny_checkpoint, tmp_path):
    _, family, overrides = next(each for each in MIXED if each[1] == "gpt_oss")
    folder = tiny_checkpoint(family, **overrides)
    for lost in ("blk.1.ffn_up_exps.weight", "blk.1.ffn_up_exps.bias", "blk.0.attn_sinks.weight"):
        write_gguf(folder, tmp_path / f"{lost}.gguf", change=lambda tensors, lost=lost: tensors.pop(lost))
        with pytest.raises(ValueError, match=f"lacks {lost}, expected all of a gpt-oss"):
            load(tmp_path / f"{lost}.gguf", jnp.float32)


@pytest.mark.parametrize("kind", [kind for kind in gguf.SERVED if kind != Kind.F32], ids=lambda kind: kind.name)
def test_quantised_matrices_become_what_the_package_dequantises(tiny_checkpoint, tmp_path, kind):
    folder = tiny_checkpoint("llama", **WIDE)
    values = write_gguf(folder, tmp_path / "model.gguf", kind)
    _, params = load(tmp_path / "model.gguf", jnp.float32)
    expected = load(dequantised_copy(folder, values, tmp_path / "copy"), jnp.float32)[1]
    quantised = jax.tree.leaves(params, is_leaf=lambda each: isinstance(each, Quantized))
    for found, wanted in zip(quantised, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(floats(found).reshape(wanted.shape), wanted)


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q8_0, 8), (Kind.Q4_0, 4), (Kind.Q4_1, 4)])
def test_matrices_of_some_kinds_stay_quantised_and_stand_for_the_same_values(tiny_checkpoint, tmp_path, kind, bits):
    folder = tiny_checkpoint("llama", **WIDE)
    values = write_gguf(folder, tmp_path / "model.gguf", kind)
    _, params = load(tmp_path / "model.gguf", jnp.float32)
    (layers,) = params.layers
    kept = {name for name in ("qkv", "out", "gate_up", "down") if isinstance(getattr(layers, name), Quantized)}
    assert kept == {"qkv", "out", "gate_up", "down"}
    assert {getattr(layers, name).bits for name in kept} == {bits}
    assert isinstance(params.embed, Quantized) == (bits == 8), "the head decides on tokens"
    _, whole = load(dequantised_copy(folder, values, tmp_path / "copy"), jnp.float32)
    for name in kept:
        expected = getattr(whole.layers[0], name)
        np.testing.assert_array_equal(dequantize(getattr(layers, name)).reshape(expected.shape), expected)
    np.testing.assert_array_equal(floats(params.embed), whole.embed)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_are_transformers_on_the_dequantised_weights(tiny_checkpoint, tmp_path, family):
    folder = tiny_checkpoint(family, head_dim=32) if family == "qwen3" else tiny_checkpoint(family)
    values = write_gguf(folder, tmp_path / "model.gguf", Kind.Q8_0)
    copy = dequantised_copy(folder, values, tmp_path / "copy")
    prompt = np.random.default_rng(3).integers(3, 120, 70)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
        expected = model(torch.tensor(prompt[None])).logits[0].numpy()
    found = Runner(tmp_path / "model.gguf").in_chunks(prompt, 64, np.arange(-(-len(prompt) // PAGE)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_rows_of_a_query_are_those_of_the_whole(tiny_checkpoint, tmp_path):
    write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf", Kind.Q4_0)
    tensors = gguf.tensors_of(read_gguf(tmp_path / "model.gguf"))
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert (query.shape, query.kind, query.nbytes) == ((64, 64), "Q4_0", 64 * 2 * 18)
    np.testing.assert_array_equal(query.values(17, 41), query.values()[17:41])


def test_llama_3_divisors_become_its_scaling(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("llama", rope_parameters=LLAMA3, head_dim=64)
    expected = load_config(folder)
    # As llama.cpp's converter writes them: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
    from model.rope import inverse_frequencies

    plain, _ = inverse_frequencies(RopeConfig(theta=500000.0), 64)
    scaled, _ = inverse_frequencies(expected.rope, 64)
    divisors = plain / scaled

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = divisors

    write_gguf(folder, tmp_path / "model.gguf", change=add)
    assert load_config(tmp_path / "model.gguf").rope == expected.rope

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = divisors**2

    write_gguf(folder, tmp_path / "other.gguf", change=spoil)
    with pytest.raises(ValueError, match=r"other\.gguf: rope_freqs\.weight has divisors .* up to 64, expected"):
        load_config(tmp_path / "other.gguf")


def test_every_token_that_ends_an_answer_is_one(tiny_checkpoint, tmp_path):
    def add(writer) -> None:
        writer.add_eot_token_id(7)
        writer.add_eom_token_id(2)

    write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf", metadata=add)
    assert load_config(tmp_path / "model.gguf").eos_token_ids == (2, 7)


def test_control_tokens_that_are_named_as_ends_end_an_answer(tiny_checkpoint, tmp_path):
    tokens = ["<|return|>", "<|end|>", "a", "<|call|>", "<|im_end|>", "<|endoftext|>", *map(str, range(122))]

    def add(writer) -> None:
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, 1, 3, 1, 3] + [1] * 122)  # as text, <|im_end|> is no end

    write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf", metadata=add)
    assert load_config(tmp_path / "model.gguf").eos_token_ids == (2, 0, 3, 5)


def test_a_header_is_read_once_and_again_after_the_file_has_changed(tiny_checkpoint, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(tiny_checkpoint("llama"), path)
    assert read_gguf(path) is not read_gguf(path)  # it may still be changing
    os.utime(path, ns=(0, 10**9))
    first = read_gguf(path)
    assert read_gguf(path) is first
    os.utime(path, ns=(0, 2 * 10**9))
    assert read_gguf(path) is not first


def test_a_file_is_its_own_source(tiny_checkpoint, tmp_path):
    write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf")
    assert resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    config = load_config(tmp_path / "model.gguf")
    assert dataclasses.replace(config, eos_token_ids=()) == dataclasses.replace(
        load_config(tiny_checkpoint("llama")), eos_token_ids=()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("blk.1.ffn_up.weight"),
            r"lacks blk\.1\.ffn_up\.weight, expected all of a llama with 3 layers",
        ),
        (lambda t: t.pop("token_embd.weight"), r"lacks token_embd\.weight"),
        (lambda t: t.update({"blk.0.attn_q.lora": np.ones(4, np.float32)}), r"unexpected blk\.0\.attn_q\.lora"),
        (
            lambda t: t.update({"blk.2.ffn_down.weight": np.ones((64, 32), np.float32)}),
            r"model\.layers\.2\.mlp\.down_proj\.weight has shape \(64, 32\), expected \(64, 96\)",
        ),
        (
            lambda t: t.update({"blk.2.attn_norm.weight": np.ones(64, np.int8)}),
            r"blk\.2\.attn_norm\.weight is I8, supported are F32, F16, BF16, Q8_0",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tiny_checkpoint, tmp_path, change, message):
    write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf", change=change)
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}"):
        load(tmp_path / "model.gguf", jnp.float32)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("general.architecture", "rwkv7", r"general\.architecture is 'rwkv7', supported are llama, qwen2, qwen3"),
        ("llama.block_count", None, r"the metadata has no llama\.block_count"),
        ("llama.block_count", "three", r"llama\.block_count is a str, expected int"),
        ("llama.expert_count", 8, r"lacks blk\.0\.ffn_gate_inp\.weight"),
        ("llama.rope.scaling.factor", "four", r"llama\.rope\.scaling\.factor is a str, expected float"),
        ("llama.rope.scaling.yarn_beta_fast", "32", r"llama\.rope\.scaling\.yarn_beta_fast is a str, expected float"),
        ("llama.rope.scaling.factor", 0.0, r"llama\.rope\.scaling\.factor is 0, expected a positive number"),
        ("llama.attention.value_length", 128, r"llama\.attention\.value_length is 128, expected key_length \(16\)"),
        ("llama.attention.head_count", 0, r"llama\.attention\.head_count is 0, expected at least 1"),
        ("split.count", 3, r"split\.count is 3, expected one file"),
    ],
)
def test_metadata_that_is_not_served_is_named(tiny_checkpoint, tmp_path, field, value, message):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    write_gguf(tiny_checkpoint("llama", head_dim=16, rope_parameters=yarn), tmp_path / "model.gguf")
    file = read_gguf(tmp_path / "model.gguf")
    changed = {name: each for name, each in (file.metadata | {field: value}).items() if each is not None}
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}"):
        gguf.read_config(dataclasses.replace(file, metadata=changed))


def test_a_rotation_that_is_not_served_is_named_with_the_file(tiny_checkpoint, tmp_path):
    def longrope(writer) -> None:
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_factor(4.0)

    write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf", metadata=longrope)
    with pytest.raises(ValueError, match=r"model\.gguf: rope_scaling has rope type 'longrope', supported are"):
        load_config(tmp_path / "model.gguf")
    write_gguf(tiny_checkpoint("llama"), tmp_path / "part.gguf", metadata=lambda w: w.add_rope_dimension_count(8))
    with pytest.raises(ValueError, match=r"part\.gguf: partial_rotary_factor is 0\.5, supported is 1\.0"):
        load_config(tmp_path / "part.gguf")


def test_a_header_that_no_model_has_is_named(tiny_checkpoint, tmp_path):
    write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf")
    file = read_gguf(tmp_path / "model.gguf")
    many = dataclasses.replace(file, metadata=file.metadata | {"llama.block_count": 2**64 - 1})
    with pytest.raises(ValueError, match=r"lacks blk\.3\.attn_norm\.weight, expected all of a llama"):
        gguf.read_config(many)
    norm = StoredTensor((64,), Kind.Q4_0, np.zeros(36, np.uint8))
    packed = dataclasses.replace(file, tensors=file.tensors | {"blk.2.attn_norm.weight": norm})
    with pytest.raises(ValueError, match=r"blk\.2\.attn_norm\.weight is Q4_0 and has shape \(64,\), expected a matrix"):
        gguf.tensors_of(packed)


def test_a_factor_without_a_type_is_linear_under_either_name(tiny_checkpoint, tmp_path):
    write_gguf(tiny_checkpoint("llama"), tmp_path / "model.gguf")
    file = read_gguf(tmp_path / "model.gguf")
    for field in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
        config = gguf.read_config(dataclasses.replace(file, metadata=file.metadata | {field: 4.0}))
        assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert gguf.read_config(file)["rope_scaling"] is None


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf is not a file"):
        load(tmp_path / "absent.gguf", jnp.float32)
