"""Checkpoints: read from safetensors, saved and restored, fingerprinted, and refused with a reason."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model.checkpoint import fingerprint, layout, load, resolve, restore_orbax, save_orbax
from model.config import LayerKind, ModelConfig
from model.families import read_config
from model.kernels.cpu import build
from model.kernels.cpu.packing import pack
from model.params import Params, unstacked
from tests.helpers.shapes import assert_fields
from tests.model.conftest import GLM4_MOE

State = dict[str, torch.Tensor]


def edited(source: Path, target: Path, edit: Callable[[State], object]) -> Path:
    """A copy of a single-file checkpoint with its tensors changed in place by `edit`."""
    shutil.copytree(source, target)
    state = load_file(target / "model.safetensors")
    edit(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def put_together(state: State, config: ModelConfig) -> dict[str, np.ndarray]:
    """The fields of Params as the shapes in model/params.py say, straight from a transformers state dict."""
    k, g, d, e = config.num_kv_heads, config.group, config.head_dim, config.embed_size

    def stack(suffix: str) -> np.ndarray:
        return np.stack([state[f"model.layers.{i}.{suffix}"].numpy() for i in range(config.num_layers)])

    def qkv(kind: str, *inputs: int) -> np.ndarray:
        q = stack(f"self_attn.q_proj.{kind}").reshape(-1, k, g, d, *inputs)
        key, value = (stack(f"self_attn.{n}_proj.{kind}").reshape(-1, k, 1, d, *inputs) for n in "kv")
        return np.concatenate([q, key, value], axis=2)

    def gate_up(kind: str) -> np.ndarray:
        return np.stack([stack(f"mlp.gate_proj.{kind}"), stack(f"mlp.up_proj.{kind}")], axis=1)

    fields = {
        "embed": state["model.embed_tokens.weight"].numpy(),
        "final_norm": state["model.norm.weight"].numpy(),
        "attn_norm": stack("input_layernorm.weight"),
        "qkv": qkv("weight", e),
        "out": stack("self_attn.o_proj.weight").reshape(-1, e, k, g, d),
        "mlp_norm": stack("post_attention_layernorm.weight"),
        "gate_up": gate_up("weight"),
        "down": stack("mlp.down_proj.weight"),
    }
    if not config.tie_embeddings:
        fields["lm_head"] = state["lm_head.weight"].numpy()
    if config.qkv_bias:
        fields["qkv_bias"] = qkv("bias")
    if config.out_bias:
        fields["out_bias"] = stack("self_attn.o_proj.bias")
    if config.qk_norm:
        fields |= {"q_norm": stack("self_attn.q_norm.weight"), "k_norm": stack("self_attn.k_norm.weight")}
    if config.mlp_bias:
        fields |= {"gate_up_bias": gate_up("bias"), "down_bias": stack("mlp.down_proj.bias")}
    return fields


def named(params: Params) -> dict[str, jax.Array]:
    """All arrays of stacked Params by field name."""
    (layers,) = params.layers
    both = [(f.name, getattr(tree, f.name)) for tree in (params, layers) for f in dataclasses.fields(tree)]
    return {name: value for name, value in both if name != "layers" and value is not None}


def assert_equal(left: Params, right: Params) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert [x.dtype for x in jax.tree.leaves(left)] == [x.dtype for x in jax.tree.leaves(right)]


def test_every_tensor_lands_where_the_shapes_say(variant_folder):
    config, params = load(variant_folder, jnp.float32)
    model = AutoModelForCausalLM.from_pretrained(variant_folder, dtype=torch.float32)
    expected, found = put_together(model.state_dict(), config), named(params)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert found[name].dtype == jnp.float32
    assert_fields(params, params.layers[0])


def test_shards_load_as_the_single_file_does(tiny_checkpoint):
    sharded = tiny_checkpoint("qwen2", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_equal(load(sharded, jnp.float32)[1], load(tiny_checkpoint("qwen2"), jnp.float32)[1])


@pytest.mark.parametrize("on_disk", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_weights_are_converted_from_and_to_each_dtype(tiny_checkpoint, on_disk, wanted):
    folder = tiny_checkpoint("qwen3", dtype=on_disk)
    _, params = load(folder, wanted)
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert params.layers[0].down.dtype == jnp.dtype(wanted)
    converted = stored.to(getattr(torch, wanted)).float().numpy()
    np.testing.assert_array_equal(np.asarray(params.layers[0].down[1], np.float32), converted)


def test_bfloat16_loads_without_torch(tiny_checkpoint):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from model.checkpoint import load\n"
        "print(load(sys.argv[1], 'bfloat16')[1].embed.dtype)"
    )
    folder = tiny_checkpoint("llama", dtype="bfloat16")
    run = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "bfloat16"


def test_progress_counts_up_to_the_bytes_of_the_params(tiny_checkpoint):
    calls: list[tuple[int, int]] = []
    _, params = load(tiny_checkpoint("llama"), jnp.float32, progress=lambda done, total: calls.append((done, total)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert calls == sorted(calls)
    assert calls[-1] == (size, size)


def test_rotary_frequencies_and_an_equal_tied_head_are_passed_over(tiny_checkpoint, tmp_path):
    def add(state: State) -> None:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    source = tiny_checkpoint("llama", tie_word_embeddings=True)
    _, params = load(edited(source, tmp_path / "copy", add), jnp.float32)
    assert params.lm_head is None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), r"lack model\.layers\.1\.mlp\.up_proj.*\(96, 64\)"),
        (lambda s: s.pop("lm_head.weight"), "lack lm_head.weight"),
        (
            lambda s: s.update({"model.layers.2.self_attn.k_proj.weight": torch.ones(64, 64)}),
            r"model\.safetensors: model\.layers\.2\.self_attn\.k_proj.* has shape \(64, 64\), expected \(32, 64\)",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            r"model\.safetensors: model\.norm\.weight is I8, expected one of F32, BF16, F16",
        ),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}),
            r"model\.safetensors: unexpected model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight",
        ),
        (lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "unexpected .*q_proj.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tiny_checkpoint, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        load(edited(tiny_checkpoint("llama"), tmp_path / "copy", edit), jnp.float32)


def test_a_tied_head_that_differs_is_an_error(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("llama", tie_word_embeddings=True)
    folder = edited(source, tmp_path / "copy", lambda s: s.update({"lm_head.weight": torch.ones(128, 64)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(folder, jnp.float32)


def test_layers_after_the_last_are_passed_over_as_far_as_the_config_has_them(tiny_checkpoint, tmp_path):
    folder = edited(
        tiny_checkpoint("glm4_moe", **GLM4_MOE),
        tmp_path / "copy",
        lambda s: s.update({"model.layers.3.eh_proj.weight": torch.ones(4, 4)}),
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    load(folder, jnp.float32)
    path.write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.3\.eh_proj\.weight"):
        load(folder, jnp.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_finite_number_is_named(tiny_checkpoint, tmp_path, dtype, value):
    def edit(state: State) -> None:
        for name, tensor in state.items():
            state[name] = tensor.to(dtype)
        state["model.layers.1.mlp.down_proj.weight"][-1, -1] = value

    folder = edited(tiny_checkpoint("llama"), tmp_path / "broken", edit)
    with pytest.raises(ValueError, match=r"safetensors: model\.layers\.1\.mlp\.down_proj\.weight, .* not finite"):
        load(folder, "float32")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map is None"),
        ({"weight_map": [1]}, r"weight_map is \[1\]"),
        ({"weight_map": {"a": "../x.safetensors"}}, "a is in '../x.safetensors', expected the name of a file"),
        ({"weight_map": {"a": 1}}, "a is in 1, expected the name of a file"),
    ],
)
def test_an_index_that_is_none_is_named(tiny_checkpoint, tmp_path, index, message):
    shutil.copy(tiny_checkpoint("llama") / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json: {message}"):
        load(tmp_path, "float32")


def test_an_empty_folder_lacks_its_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path, jnp.float32)


def test_a_hub_id_loads_its_snapshot_and_asks_for_no_other_formats(tiny_checkpoint, monkeypatch):
    asked = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tiny_checkpoint("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    load("someone/llama", jnp.float32)
    offered = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
    ]
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "model.gguf"]
    assert list(filter_repo_objects(offered + unwanted, allow_patterns=asked["someone/llama"])) == offered


@pytest.mark.parametrize("cut_off", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_hub_id_offline_fails_with_one_clear_message(tmp_path, cut_off):
    script = (
        "from model.checkpoint import resolve\n"
        "try: resolve('nobody/nothing-7b')\n"
        "except FileNotFoundError as error: print(error)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path)} | cut_off
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert run.startswith("'nobody/nothing-7b' is not a local folder")
    assert "name a local checkpoint folder" in run
    assert run.count("\n") == 1


def test_a_path_that_is_no_folder_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a local folder"):
        resolve(tmp_path / "absent" / "model")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orbax_gives_back_config_and_params_without_the_safetensors(variant_folder, tmp_path, dtype):
    source = shutil.copytree(variant_folder, tmp_path / "source")
    config, params = load(source, dtype)
    save_orbax(tmp_path / "converted", config, params)
    shutil.rmtree(source)
    restored_config, restored = restore_orbax(tmp_path / "converted")
    assert restored_config == config
    assert_equal(restored, params)
    assert fingerprint(restored_config, restored) == fingerprint(config, params)


def test_orbax_neither_overwrites_nor_reads_half_a_checkpoint(tiny_checkpoint, tmp_path):
    config, params = load(tiny_checkpoint("llama"), jnp.float32)
    for other in (unstacked(params), pack(params, 4)):
        with pytest.raises(ValueError, match="expected stacked ones"):
            save_orbax(tmp_path / "converted", config, other)
    save_orbax(tmp_path / "converted", config, params)
    with pytest.raises(FileExistsError, match="converted exists"):
        save_orbax(tmp_path / "converted", config, params)
    about = tmp_path / "converted" / "tokenzero.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, expected 1"):
        restore_orbax(tmp_path / "converted")
    about.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenzero\.json"):
        restore_orbax(tmp_path / "converted")


def test_the_fingerprint_is_equal_in_another_process_and_with_layers_apart(tiny_checkpoint):
    folder = tiny_checkpoint("qwen2")
    config, params = load(folder, jnp.float32)
    here = fingerprint(config, params)
    script = "import sys; from model.checkpoint import *\nprint(fingerprint(*load(sys.argv[1], 'float32')).hex())"
    run = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert len(here) == 32
    assert run.stdout.strip() == here.hex()
    assert fingerprint(config, unstacked(params)) == here
    assert fingerprint(dataclasses.replace(config, eos_token_ids=(5,)), params) == here
    windows = (LayerKind(window=config.max_position),) * config.num_layers  # which mask nothing
    assert fingerprint(dataclasses.replace(config, layers=windows), params) == here


def test_packed_weights_get_no_fingerprint(tiny_checkpoint):
    config, params = load(tiny_checkpoint("qwen2"), jnp.float32)
    with pytest.raises(ValueError, match="PackedLayers, expected a Layer"):
        fingerprint(config, pack(params, 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fingerprint_is_the_same_by_the_kernel_and_by_xla(tiny_checkpoint, dtype, monkeypatch):
    config, params = load(tiny_checkpoint("qwen2"), dtype)
    assert build.available()
    by_kernel = [fingerprint(config, params), fingerprint(config, unstacked(params))]
    monkeypatch.setattr("model.fingerprint.build.available", lambda: False)
    by_xla = [fingerprint(config, params), fingerprint(config, unstacked(params))]
    assert len({*by_kernel, *by_xla}) == 1


def test_on_a_cpu_layers_are_taken_apart_without_a_copy(tiny_checkpoint):
    _, params = load(tiny_checkpoint("llama"), jnp.float32)
    whole, layers = params.layers[0].qkv, unstacked(params).layers
    places = [layer.qkv.unsafe_buffer_pointer() - whole.unsafe_buffer_pointer() for layer in layers]
    assert places == [i * whole[0].nbytes for i in range(3)]


def test_the_fingerprint_is_that_of_these_bytes_for_ever() -> None:
    """A change here orphans every page that was ever persisted."""
    config = read_config(
        {"model_type": "llama", "vocab_size": 2, "hidden_size": 2, "intermediate_size": 1}
        | {"num_hidden_layers": 1, "num_attention_heads": 1}
    )
    params = jax.tree.map(
        lambda leaf: jnp.arange(np.prod(leaf.shape), dtype="float32").reshape(leaf.shape), layout(config)
    )
    assert fingerprint(config, params).hex() == "69ff3621dcf65016acc93ac204850342aa860e443ee1ccc4cfe8588b001fa295"


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.at[(1,) * x.ndim].multiply(-1),
        lambda x: x.at[(1,) * x.ndim].set(jnp.nextafter(x[(1,) * x.ndim], jnp.inf)),
        lambda x: x[::-1],
        lambda x: jnp.flip(x, axis=-1),
        lambda x: x.at[0].multiply(-1),
    ],
    ids=["one sign", "one bit", "layers swapped", "inputs reversed", "a layer's signs"],
)
def test_the_fingerprint_sees_small_changes_anywhere(tiny_checkpoint, change):
    config, params = load(tiny_checkpoint("llama", attention_bias=True, mlp_bias=True), jnp.float32)
    leaves, tree = jax.tree.flatten(params)
    seen = {fingerprint(config, params)}
    for i, leaf in enumerate(leaves):
        seen.add(fingerprint(config, jax.tree.unflatten(tree, [*leaves[:i], change(leaf), *leaves[i + 1 :]])))
    assert len(seen) == 1 + len(leaves)


def test_the_fingerprint_sees_config_and_dtype(tiny_checkpoint):
    config, params = load(tiny_checkpoint("llama"), jnp.float32)
    rope = dataclasses.replace(config.rope, theta=5e5)
    others = [dataclasses.replace(config, rope=rope), dataclasses.replace(config, norm_eps=1e-5)]
    seen = {fingerprint(other, params) for other in (config, *others)}
    seen.add(fingerprint(*load(tiny_checkpoint("llama"), jnp.bfloat16)))
    assert len(seen) == 4
