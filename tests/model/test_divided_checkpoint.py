"""Checkpoints read onto several devices: the same values and fingerprint, each device with its part only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent

CHILD = """
import json, sys
from pathlib import Path

import jax
import numpy as np
from model import checkpoint
from model.sharding import make_mesh, shard_params, shardings

folder, converted = map(Path, sys.argv[1:])
config, whole = checkpoint.load(folder, np.float32)
checkpoint.save_orbax(converted, config, whole)
name, wrong = checkpoint.fingerprint(config, whole), []
made, aligned = [], checkpoint._aligned

def recorded(shape, dtype):
    made.append(shape)
    return aligned(shape, dtype)

checkpoint._aligned = recorded
for devices in (2, 4):
    made.clear()
    loaded = checkpoint.load(folder, np.float32, None, devices)[1]
    slices = {shard.data.shape for leaf in jax.tree.leaves(loaded) for shard in leaf.addressable_shards}
    if not set(made) <= slices:
        wrong.append(f"{devices}: more than a device's slice was made on the host: {set(made) - slices}")
    places = shardings(whole, make_mesh(config, devices))
    for source, params in (("safetensors", loaded), ("orbax", checkpoint.restore_orbax(converted, devices)[1])):
        def compare(path, leaf, place, right):
            if not np.array_equal(np.asarray(leaf), np.asarray(right)):
                wrong.append(f"{devices} {source} {path}: values")
            if not leaf.sharding.is_equivalent_to(place, leaf.ndim):
                wrong.append(f"{devices} {source} {path}: {leaf.sharding}")
            for shard in leaf.addressable_shards:
                if shard.data.shape != place.shard_shape(leaf.shape):
                    wrong.append(f"{devices} {source} {path}: a device has {shard.data.shape}")
        jax.tree_util.tree_map_with_path(compare, params, places, whole)
        if checkpoint.fingerprint(config, params) != name:
            wrong.append(f"{devices} {source}: fingerprint")
    on_one = sum(shard.data.nbytes for leaf in jax.tree.leaves(loaded) for shard in leaf.addressable_shards[:1])
    if not on_one < 0.75 * sum(leaf.nbytes for leaf in jax.tree.leaves(whole)):
        wrong.append(f"{devices}: one device has {on_one} bytes")
divided = shard_params(whole, make_mesh(config, 4))
if divided.layers[0].qkv.shape != whole.layers[0].qkv.shape:
    save = lambda: checkpoint.save_orbax(converted.with_name("divided"), config, divided)
    for refused in (save, lambda: checkpoint.fingerprint(config, divided)):
        try:
            refused()
            wrong.append("what cannot be restored is saved, or has a name of its own")
        except ValueError as error:
            if "before `shard_params`" not in str(error):
                wrong.append(str(error))
print(json.dumps(wrong))
"""


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ],
)
def test_each_device_gets_its_slices_and_the_model_keeps_its_name(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", CHILD, str(tiny_checkpoint(family, **overrides)), str(tmp_path / "converted")]
    done = subprocess.run(command, env=environment, check=True, capture_output=True)
    assert json.loads(done.stdout) == []
