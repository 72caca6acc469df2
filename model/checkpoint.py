"""Weights from disk to the params pytree and back: Hugging Face checkpoints in, Orbax in and out.

Every tensor is checked against the config before anything is allocated; a missing, misshapen or unknown tensor is an
error. No model maths here, and no tokenizer. What the files hold is the business of `model/formats`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig, read_json
from model.families import FAMILIES, load_config
from model.families.common import number, renamed
from model.fingerprint import fingerprint as fingerprint
from model.formats.gguf_file import is_gguf, read_gguf
from model.formats.quantization import reader_for
from model.formats.safetensors import map_tensors, weight_files
from model.formats.tensor import BLOCK, FLOATS, Tensor, same_values
from model.layout import EMBED, HEAD, Leaf, Part
from model.layout import layout as layout
from model.params import Layer, Params
from model.prequantized import kept, stored_as
from model.quantized import SCHEMES, Quantized, Scheme, bits_of, inputs_last, rounded
from model.sharding import make_mesh, shardings

log = logging.getLogger("tokenzero.checkpoint")

# What a checkpoint needs to run; the same weights in other formats stay on the hub.
HUB_FILES = ("*.json", "model*.safetensors", "*.jinja", "*.model", "*.txt")
ALIGNMENT = 64  # bytes; XLA copies arrays that start elsewhere
CHUNK_BYTES = 1 << 24  # of an array, in an Orbax checkpoint
QUANTIZED_AT_ONCE = 1 << 24  # weights that are in full precision before they are quantised, or a layer's matrix

Progress = Callable[[int, int], None]  # (bytes of params made so far, bytes in all)
Index = tuple[slice, ...]  # a slice of an array, one for each axis


def load(
    source: str | Path, dtype: Any, progress: Progress | None = None, devices: int = 1, quantize: str | None = None
) -> tuple[ModelConfig, Params]:
    """The config and the stacked Params, in `dtype`, of a GGUF file, or of safetensors in a folder or on the hub.

    They lie on the first `devices` devices as `sharding.shardings` says. What one device holds of a leaf is made at a
    time: host memory peaks at that, plus the params if they stay on the host. Raises FileNotFoundError or ValueError,
    naming file and tensor, if the checkpoint differs from its config, and what `sharding.make_mesh` raises.

    `quantize` names one of `quantized.SCHEMES`, by which the matrices are rounded as they are read, a layer at a time;
    it takes one device.
    """
    if quantize is not None and (quantize not in SCHEMES or devices > 1):
        expected = f"one of {', '.join(SCHEMES)} on one device"
        raise ValueError(f"quantize is {quantize!r} on {devices} devices, expected {expected}")
    folder = resolve(source)
    config = load_config(folder)
    leaves = layout(config)
    mesh = make_mesh(config, devices)
    tensors = _tensors(folder, config)
    _check(leaves, tensors, config, folder)
    _report_quantised(leaves, tensors, np.dtype(dtype), stay=devices == 1 and quantize is None)
    places = shardings(leaves, mesh) if mesh else None
    progress = progress or (lambda done, total: None)
    scheme = SCHEMES[quantize] if quantize else None
    params = _fill(leaves, tensors, np.dtype(dtype), progress, places, scheme)
    if scheme:
        taken = sum(array.nbytes for array in jax.tree.leaves(params))
        whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves)) * np.dtype(dtype).itemsize
        log.info("quantised to %s, the weights take %.0f MB instead of %.0f", quantize, taken / 1e6, whole / 1e6)
    return config, params


def planned_bytes(source: str | Path, dtype: Any, devices: int = 1, quantize: str | None = None) -> int:
    """The bytes of weights that `load` would put on each device, from the config and the headers of the files.

    Raises FileNotFoundError and ValueError for a config or files that cannot be read.
    """
    folder = resolve(source)
    config = load_config(folder)
    leaves, mesh = layout(config), make_mesh(config, devices)
    size: int = np.dtype(dtype).itemsize
    tensors = _tensors(folder, config)
    if mesh:
        places = jax.tree.leaves(shardings(leaves, mesh))
        shapes = (place.shard_shape(leaf.shape) for leaf, place in zip(jax.tree.leaves(leaves), places, strict=True))
        return size * int(sum(map(math.prod, shapes)))

    def taken(path: tuple[Any, ...], leaf: Leaf) -> float:
        count, field = math.prod(leaf.shape), path[-1].name
        if not quantize and stored_as(path, leaf, tensors):
            return sum(tensors[part.name].nbytes for part in leaf.parts)
        bits = bits_of(field, SCHEMES[quantize].bits) if quantize else None
        return count * size if bits is None or quantize is None else count * (bits / 8 + 8 / SCHEMES[quantize].group)

    return round(sum(taken(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)))


def _tensors(source: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a GGUF file, or of the safetensors files in a folder, whatever they are quantised by.

    They have the names of the config's family, without those that it leaves aside, such as a vision tower's.
    """
    if is_gguf(source):
        from model.formats import gguf  # late: few checkpoints need it

        return gguf.tensors_of(read_gguf(source))
    family = FAMILIES[config.family]
    tensors = renamed(reader_for(read_json(source / "config.json"))(map_tensors(weight_files(source))), family)
    return family.split(tensors, config) if family.split else tensors


def resolve(source: str | Path) -> Path:
    """The checkpoint: `source` itself if it is a folder or a GGUF file, else its snapshot from the Hugging Face Hub.

    Raises FileNotFoundError if it is neither, or if the hub cannot be reached and nothing is cached here.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() or is_gguf(folder):
        return folder
    from huggingface_hub import snapshot_download  # a local checkpoint is loaded without it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(HUB_FILES)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{str(source)!r} is not a local folder, and the Hugging Face Hub did not provide it ({reason}): "
            "check the id, the network and HF_HUB_OFFLINE, or name a local checkpoint folder"
        ) from error


def save_orbax(path: str | Path, config: ModelConfig, params: Params) -> None:
    """Write stacked Params to `path/params` with Orbax and their config and dtype to `path/tokenzero.json`.

    Raises FileExistsError if `path` exists, and ValueError for params whose layers are not stacked, or whose arrays
    have other shapes than the config's, as after `sharding.divide_groups`.
    """
    import orbax.checkpoint as ocp  # a server does without it

    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists: delete it, or save to a new path")
    if not all(isinstance(run, Layer) and run.stacked for run in params.layers):
        found = "packed" if params.packed else "apart"
        raise ValueError(f"the layers are {found}, expected stacked ones: save before `arranged`")
    for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(layout(config)), strict=True):
        if leaf.shape != expected.shape:
            raise ValueError(f"params have shape {leaf.shape}, expected {expected.shape}: save before `shard_params`")
    # So that a device that restores a part of an array decodes little more than that.
    chunks, stored = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), _stored(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", stored, save_args=jax.tree.map(lambda leaf: chunks, stored))
    # Written last, so that a folder with this file holds all weights.
    about = {"format": 1, "dtype": params.final_norm.dtype.name, "config": config.to_json()}
    (path / "tokenzero.json").write_text(json.dumps(about), encoding="utf-8")


def restore_orbax(path: str | Path, devices: int = 1) -> tuple[ModelConfig, Params]:
    """The config and Params that `save_orbax` wrote, on the first `devices` devices; others may have saved them.

    Each device reads its own part. Raises FileNotFoundError if `save_orbax` did not write the folder, or not
    completely, and ValueError as `sharding.make_mesh` does.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    about_file = path / "tokenzero.json"
    if not about_file.is_file():
        raise FileNotFoundError(f"{path} has no tokenzero.json, expected a folder that save_orbax wrote: save it again")
    about = read_json(about_file)
    if about.get("format") != 1:
        raise ValueError(f"{about_file} has format {about.get('format')!r}, expected 1: convert the checkpoint again")
    config = ModelConfig.from_json(about["config"])
    leaves, dtype = layout(config), jnp.dtype(about["dtype"])
    mesh, alone = make_mesh(config, devices), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = shardings(leaves, mesh) if mesh else jax.tree.map(lambda leaf: alone, leaves)
    wanted = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype or dtype, sharding=place), leaves, places
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path / "params", _stored(wanted))
    return config, restored if isinstance(restored.layers, tuple) else replace(restored, layers=(restored.layers,))


def _stored(params: Params) -> Params:
    """Params as Orbax stores them: where all layers are one run, without the tuple."""
    return params if params.layers[1:] else replace(params, layers=params.layers[0])  # type: ignore[arg-type]


def _check(leaves: Params, tensors: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Raise ValueError unless the checkpoint has exactly the tensors of the layout."""
    expected = {part.name: part.shape for leaf in jax.tree.leaves(leaves) for part in leaf.parts}
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(
            f"{folder}: its files lack {_some(missing)}, the first expected with shape "
            f"{expected[missing[0]]}: download the checkpoint again, or check that config.json belongs to it"
        )
    for name, shape in expected.items():
        found = tensors[name]
        if found.shape != shape:
            raise ValueError(
                f"{found.path}: {name} has shape {found.shape}, expected {shape}: check that config.json belongs to it"
            )
        if found.dtype not in FLOATS.values():
            raise ValueError(
                f"{found.path}: {name} is {found.kind}, expected one of {', '.join(FLOATS)}: "
                "use the unquantized checkpoint"
            )
    # Older checkpoints carry the rotary frequencies, which follow from the config.
    unknown = [n for n in tensors if n not in expected and n != HEAD and not n.endswith("rotary_emb.inv_freq")]
    # GPTQ's tools write biases of zeros for modules that have none.
    unknown = [name for name in unknown if not (name.endswith(".bias") and not tensors[name].values().any())]
    extra = range(config.num_layers, config.num_layers + _extra_layers(config, folder))
    unknown = [name for name in unknown if _layer_of(name) not in extra]
    if unknown:
        raise ValueError(
            f"{tensors[unknown[0]].path}: unexpected {_some(unknown)}, expected only the tensors of a {config.family} "
            "model with this config.json: use a merged, unmodified checkpoint"
        )
    if config.tie_embeddings and HEAD in tensors and not same_values(tensors[HEAD], tensors[EMBED]):
        raise ValueError(
            f"{tensors[HEAD].path}: {HEAD} differs from {EMBED}, expected equality as tie_word_embeddings is true: "
            "set it to false in config.json"
        )


def _report_quantised(leaves: Params, tensors: dict[str, Tensor], dtype: np.dtype, stay: bool) -> None:
    """Log which tensors stay as small as they are in the file, if any may, and what it costs that others do not."""
    quantised = {name: tensor for name, tensor in tensors.items() if tensor.kind not in FLOATS}
    fields = jax.tree_util.tree_leaves_with_path(leaves) if stay else []
    kept_ones = {part.name for path, leaf in fields if stored_as(path, leaf, tensors) for part in leaf.parts}
    for what, found in (
        ("stay quantised", [tensor for name, tensor in quantised.items() if name in kept_ones]),
        ("are dequantised on load", [tensor for name, tensor in quantised.items() if name not in kept_ones]),
    ):
        if found:
            kinds = ", ".join(sorted({tensor.kind for tensor in found}))
            in_file = sum(tensor.nbytes for tensor in found) / 1e9
            whole = sum(math.prod(tensor.shape) for tensor in found) * dtype.itemsize / 1e9
            counted = (len(found), kinds, what, in_file, whole, dtype.name)
            log.info("%d tensors of %s %s: %.2f GB in the file, %.2f GB in %s", *counted)


def _extra_layers(config: ModelConfig, folder: Path) -> int:
    """How many layers the files may have after the last one, as config.json says."""
    field = FAMILIES[config.family].extra_layers
    if field is None or is_gguf(folder):
        return 0
    return int(number({field: 0, **read_json(folder / "config.json")}, field))


def _layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None for one of no layer."""
    start, _, rest = name.partition("model.layers.")
    number = rest.split(".")[0]
    return int(number) if not start and number.isdigit() else None


def _some(names: list[str]) -> str:
    """The first names of a long list."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fill(
    leaves: Params,
    tensors: dict[str, Tensor],
    dtype: np.dtype,
    progress: Progress,
    places: Params | None,
    scheme: Scheme | None,
) -> Params:
    """Make every leaf: allocate each of its slices, convert tensors into it side by side, and put it on its devices."""
    total = sum(math.prod(leaf.shape) * (leaf.dtype or dtype).itemsize for leaf in jax.tree.leaves(leaves))
    done = 0

    def made(leaf: Leaf, index: Index) -> np.ndarray:
        """A slice of a leaf, on the host."""
        nonlocal done
        places = [range(size)[each] for size, each in zip(leaf.shape, index, strict=True)]
        array = _aligned(tuple(map(len, places)), leaf.dtype or dtype)
        for converted in threads.map(lambda part: _convert(part, tensors[part.name], leaf, places, array), leaf.parts):
            done += converted
            progress(done, total)
        return array

    def fill(leaf: Leaf, index: Index, devices: list[jax.Device | None]) -> list[jax.Array]:
        """A slice of a leaf, on each of these devices."""
        array = made(leaf, index)
        # Wait, so that the host copy is freed before the next one is allocated.
        return [jax.device_put(array, device).block_until_ready() for device in devices]

    def on_one(path: tuple[Any, ...], leaf: Leaf) -> jax.Array | Quantized:
        nonlocal done
        if not scheme and (stored := stored_as(path, leaf, tensors)):
            done += math.prod(leaf.shape) * dtype.itemsize
            progress(done, total)
            return kept(path[-1].name, leaf, tensors, stored)
        bits = bits_of(path[-1].name, scheme.bits) if scheme else None
        if scheme is None or bits is None:
            return fill(leaf, (slice(None),) * len(leaf.shape), [None])[0]
        rest = [slice(None)] * (len(leaf.shape) - 1)
        step = max(1, QUANTIZED_AT_ONCE // math.prod(leaf.shape[1:]))  # of the first axis: layers, or rows of a table
        parts = (made(leaf, (slice(first, first + step), *rest)) for first in range(0, leaf.shape[0], step))
        made_of = [rounded(inputs_last(path[-1].name, part), bits, scheme.group) for part in parts]
        values, scales, offsets = (jax.device_put(np.concatenate(arrays)) for arrays in zip(*made_of, strict=True))
        inputs = math.prod(leaf.shape[2:] if path[-1].name == "out" else leaf.shape[-1:])
        return Quantized(values, scales, bits, scheme.group, inputs, offsets)

    def on_several(leaf: Leaf, place: jax.sharding.Sharding) -> jax.Array:
        arrays = [array for index, devices in _slices(place, leaf.shape) for array in fill(leaf, index, devices)]
        divided: jax.Array = jax.make_array_from_single_device_arrays(leaf.shape, place, arrays)
        return divided

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        if places:
            return jax.tree.map(on_several, leaves, places)  # type: ignore[no-any-return]
        return jax.tree_util.tree_map_with_path(on_one, leaves)  # type: ignore[no-any-return]


def _slices(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> list[tuple[Index, list[jax.Device | None]]]:
    """The slices of an array of this shape that devices hold, each with the devices that hold it."""
    slices: dict[str, tuple[Index, list[jax.Device | None]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        slices.setdefault(repr(index), (index, []))[1].append(device)
    return list(slices.values())


def _convert(part: Part, tensor: Tensor, leaf: Leaf, places: list[range], array: np.ndarray) -> int:
    """Write what a tensor has of the `places` of a leaf, one range an axis, to their array. Returns the bytes."""
    to: list[int | slice] = []
    sizes, of = list[int](), list[slice]()
    at = [*part.at, *[slice(None)] * (len(leaf.shape) - len(part.at))]
    for size, each, place in zip(leaf.shape, at, places, strict=True):
        if isinstance(each, int):
            if each not in place:
                return 0
            to.append(each - place.start)
            continue
        own = range(size)[each]
        first, stop = max(own.start, place.start), min(own.stop, place.stop)
        if first >= stop:
            return 0
        to.append(slice(first - place.start, stop - place.start))
        sizes.append(len(own))
        of.append(slice(first - own.start, stop - own.start))
    target, start = array[tuple(to)], of[0].start
    axes = part.axes or tuple(range(len(sizes)))
    stored = [sizes[axes.index(axis)] for axis in range(len(sizes))]  # the tensor's axes, taken apart as the leaf's are
    rows = tensor.rows // sizes[0]  # of the tensor, for each index of the leaf's axis
    step = max(1, BLOCK // math.prod(sizes[1:]))
    for first in range(start, of[0].stop, step):
        stop = min(first + step, of[0].stop)
        values = tensor.values(first * rows, stop * rows).reshape(stop - first, *stored[1:]).transpose(axes)
        target[first - start : stop - start] = values[(slice(None), *of[1:])]
    return target.nbytes


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that XLA takes as its own on a CPU, where copying it would take as long as reading the file."""
    size = math.prod(shape) * dtype.itemsize
    space = np.empty(size + ALIGNMENT, np.uint8)
    start = -space.ctypes.data % ALIGNMENT
    return space[start : start + size].view(dtype).reshape(shape)
