"""Another rope scaling than the checkpoint's: what transformers makes of it, and the context limit that follows."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest

from model.checkpoint import load
from model.families import load_config
from model.fingerprint import fingerprint
from model.rope_scaling import parse_rope_scaling, with_rope_scaling

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def test_it_is_what_the_same_rope_scaling_in_config_json_gives(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copy")
    plain = load_config(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    stretched = {"rope_theta": plain.rope.theta, "rope_scaling": YARN, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config | stretched))
    assert with_rope_scaling(plain, parse_rope_scaling(json.dumps(YARN))) == load_config(folder)


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        (YARN, 2048),
        ({"type": "yarn", "factor": 2}, 1024),  # of the checkpoint's 512
        ({"rope_type": "linear", "factor": 1.5}, 768),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "default"}, 512),
        ({}, 512),
    ],
)
def test_the_context_limit_is_the_stretched_one(tiny_checkpoint, scaling, limit):
    plain = load_config(tiny_checkpoint("llama"))
    found = with_rope_scaling(plain, scaling)
    assert found.max_position == limit
    assert dataclasses.replace(found, rope=plain.rope, max_position=512) == plain


def test_llama3_never_shortens_the_context_that_a_checkpoint_takes(tiny_checkpoint):
    scaling = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain = load_config(tiny_checkpoint("llama"))
    scalings = [scaling | {"original_max_position_embeddings": n} for n in (128, 512)]
    limits = [with_rope_scaling(plain, each).max_position for each in scalings]
    assert limits == [512, 1024]


def test_pages_of_another_scaling_have_other_keys(tiny_checkpoint):
    plain, params = load(tiny_checkpoint("llama"), jnp.float32)
    scalings = ({}, {"rope_type": "linear", "factor": 2}, {"rope_type": "yarn", "factor": 2}, YARN)
    scalings = (*scalings, YARN | {"attention_factor": 1.0}, YARN | {"beta_slow": 0.25}, YARN | {"truncate": False})
    found = [fingerprint(with_rope_scaling(plain, scaling), params) for scaling in scalings]
    assert found[0] == fingerprint(plain, params)
    assert len(set(found)) == len(scalings)


def test_a_scaled_checkpoint_is_scaled_anew_from_what_it_was_trained_on(tiny_checkpoint):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    scaled = load_config(tiny_checkpoint("qwen3", head_dim=16, rope_parameters=yarn))
    assert with_rope_scaling(scaled, {"rope_type": "yarn", "factor": 8.0}).max_position == 1024
    assert with_rope_scaling(scaled, {}).max_position == 128


def test_a_window_as_long_as_the_own_context_masks_keys_of_the_stretched_one(tiny_checkpoint):
    plain = load_config(tiny_checkpoint("mistral", sliding_window=512))
    assert {kind.window for kind in plain.active_layers} == {None}
    assert {kind.window for kind in with_rope_scaling(plain, YARN).active_layers} == {512}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON object, got '{'"),
        ("4.0", r"expected a JSON object, got '4\.0'"),
        ('{"rope_type": "ntk", "factor": 2}', "rope type 'ntk', supported are default, linear"),
        ('{"rope_type": "yarn"}', "'yarn' has no factor"),
        ('{"rope_type": "yarn", "factor": "4"}', "factor '4', expected a positive number"),
        ('{"rope_type": "yarn", "factor": -4}', "factor -4, expected a positive number"),
        ('{"rope_type": "yarn", "factor": true}', "factor True, expected a positive number"),
        ('{"rope_type": "yarn", "factor": 1e999}', "factor inf, expected a positive number"),
        (f'{{"rope_type": "yarn", "factor": 1{"0" * 400}}}', "expected a positive number"),
        ('{"rope_type": "yarn", "factor": 4, "beta_fats": 32}', "has beta_fats, supported are rope_type, type, factor"),
        ('{"rope_type": "yarn", "factor": 4, "truncate": "false"}', "truncate 'false', expected true or false"),
        ('{"rope_type": 4, "factor": 4}', "rope_type 4, expected a string"),
        (
            '{"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0.5}',
            "original_max_position_embeddings 0.5, expected a positive whole number",
        ),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rope_scaling(text)
