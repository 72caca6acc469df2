"""A model on several devices: the same logits and tokens as on one, and no more communication than it takes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from experiments.gpu.collectives import collectives
from model.checkpoint import layout
from model.kv import KVPool
from model.params import Layer, PackedLayers, Params
from model.sharding import EVERY, SPLIT, device_counts, logical_axes, make_mesh, partition_specs, pool_heads
from tests.helpers.sharded_child import (
    CASES,
    CHUNK,
    CONFIGS,
    LAYERS,
    PAGE,
    PAGES,
    XLA_FLAGS,
    random_params,
)

cases = pytest.mark.parametrize(("name", "devices", "stacked"), CASES, ids=lambda each: str(each))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the child has found, by case."""
    environment = {**os.environ, "XLA_FLAGS": XLA_FLAGS, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.helpers.sharded_child"]
    child = subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.PIPE)
    return json.loads(child.stdout)


@cases
def test_logits_and_tokens_on_several_devices_equal_those_on_one(found, name, devices, stacked):
    case = found[f"{name}-{devices}"]
    assert case["deviation"] <= 1e-5
    assert case["sampled"] == case["sampled_alone"]
    assert len(case["sampled"]) == 7


@cases
def test_a_step_sums_twice_a_layer_and_gathers_nothing_but_logits(found, name, devices, stacked):
    config = CONFIGS[name]
    divided = config.vocab_size % devices == 0  # then the embedding is summed, too, and the logits are gathered
    sums = divided + 2 * (len(config.runs) if stacked else LAYERS)  # a run is one loop, whose body is there once
    for kind, tokens in (("chunks", CHUNK), ("decode", 2)):
        expected = [["all-gather", [2, config.vocab_size]]] * divided
        expected += [["all-reduce", [tokens, config.embed_size]]] * sums
        assert found[f"{name}-{devices}"]["collectives"][kind] == expected


@cases
def test_each_device_has_its_part_of_weights_and_pool_and_steps_update_it_in_place(found, name, devices, stacked):
    case, config = found[f"{name}-{devices}"], CONFIGS[name]
    assert not case["misplaced"]
    assert not case["pool_moved"]
    heads = max(1, config.num_kv_heads // devices)
    assert case["pool_bytes"] == case["in_place_bytes"] == 2 * LAYERS * PAGES * heads * PAGE * config.head_dim * 4
    whole = sum(leaf.size for leaf in jax.tree.leaves(random_params(config))) * 4
    assert whole / devices < case["params_bytes"]
    assert case["params_bytes"] < whole / devices * (1.2 if config.vocab_size % devices == 0 else 1.6)


@cases
def test_pages_of_all_heads_are_read_written_and_copied_without_communication(found, name, devices, stacked):
    assert found[f"{name}-{devices}"]["pages"] == {"collectives": [], "read": True, "written": True, "copied": True}


def test_collectives_are_found_in_the_spelling_of_either_version() -> None:
    program = """
      %a = f32[2,32]{1,0} all-reduce(%x), channel_id=1
      %b = (bf16[2,16]{1,0}, bf16[4,16]{1,0}) all-gather-start(%y), dimensions={0}
      %c = bf16[4,16]{1,0} all-gather-done(%b)
      %d = f32[8]{0} all-reduce-start(%z), to_apply=%add
      %e = f32[8]{0} all-reduce-done(%d)
      ROOT %f = f32[2,3,8]{2,1,0} all-to-all(%e)
      %g = f32[8]{0} collective-permute(%e)
    """
    assert collectives(program) == [
        ("all-gather", [4, 16]),
        ("all-reduce", [2, 32]),
        ("all-reduce", [8]),
        ("all-to-all", [2, 3, 8]),
        ("collective-permute", [8]),
    ]


def test_every_axis_that_is_divided_is_one_that_an_array_names_but_for_those_of_later_layers() -> None:
    named = {axis for kind in (Layer, Params, KVPool) for axes in logical_axes(kind).values() for axis in axes}
    assert SPLIT.keys() - named == {"state_heads"}


@pytest.mark.parametrize(
    ("name", "counts"), [("gqa", [1, 2, 4, 8]), ("qwen2-tied", [1, 2, 4]), ("mqa-qwen3-biases", [1, 2, 4])]
)
def test_a_model_divides_over_what_divides_its_heads(name: str, counts: list[int]) -> None:
    assert device_counts(CONFIGS[name]) == counts


def test_a_count_that_divides_the_queries_must_divide_the_kv_heads_or_be_a_multiple_of_them() -> None:
    assert device_counts(dataclasses.replace(CONFIGS["gqa"], num_heads=12, num_kv_heads=6)) == [1, 2, 3, 6, 12]


def test_a_count_that_does_not_divide_a_model_is_refused_with_those_that_do() -> None:
    with pytest.raises(
        ValueError, match=r"8 query heads, 2 KV heads .* does not divide over 3 devices: use 1, 2, 4 or 8"
    ):
        make_mesh(CONFIGS["gqa"], 3)


def test_more_devices_than_there_are_are_refused_with_how_to_have_them_on_a_cpu() -> None:
    match = "2 devices are asked for, 1 are there .cpu.: use 1, or set XLA_FLAGS=.*device_count=2"
    with pytest.raises(ValueError, match=match):
        make_mesh(CONFIGS["gqa"], 2, jax.devices()[:1])


def test_one_device_needs_no_mesh() -> None:
    assert make_mesh(CONFIGS["gqa"], 1) is None
    assert pool_heads(CONFIGS["gqa"], None) == 2


def test_weights_and_pool_are_divided_by_the_same_heads() -> None:
    mesh = AbstractMesh((2, 1), EVERY)
    specs = partition_specs(layout(CONFIGS["gqa"]), mesh)
    assert specs.embed == PartitionSpec("kv")
    assert specs.lm_head == PartitionSpec("kv")
    assert specs.final_norm == PartitionSpec()
    assert specs.layers[0].qkv == PartitionSpec(None, "kv")
    assert specs.layers[0].out == PartitionSpec(None, None, "kv")
    assert specs.layers[0].gate_up == PartitionSpec(None, None, "kv")
    assert specs.layers[0].down == PartitionSpec(None, None, "kv")
    side = jax.ShapeDtypeStruct((3, 8, 2, 4, 8), "float32")
    assert partition_specs(KVPool(side, side), mesh).v == PartitionSpec(None, None, "kv")


def test_an_axis_that_does_not_divide_is_refused_and_a_vocabulary_stays_whole() -> None:
    mesh = AbstractMesh((1, 5), EVERY)
    with pytest.raises(ValueError, match="gate_up has 48 ffn, which do not divide over 5 devices"):
        partition_specs(layout(CONFIGS["mqa-qwen3-biases"]), mesh)
    assert partition_specs(layout(CONFIGS["qwen2-tied"]), AbstractMesh((4, 1), EVERY)).embed == PartitionSpec()


def test_weights_that_are_packed_for_one_device_are_refused() -> None:
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(PackedLayers))
    packed = Params(embed=None, layers=(PackedLayers(**nothing),), final_norm=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers are PackedLayers, expected a Layer"):
        partition_specs(packed, AbstractMesh((2, 1), EVERY))
