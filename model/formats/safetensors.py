"""Safetensors files, mapped into memory: https://huggingface.co/docs/safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from model.config import read_json
from model.formats.tensor import FLOATS, Tensor

# By the names that headers use.
DTYPES = FLOATS | {
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "BOOL": np.dtype(np.bool_),
    **{f"{sign}{bits}": np.dtype(f"{sign.lower()}{bits // 8}") for sign in "IU" for bits in (8, 16, 32, 64)},
}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names.

    Raises FileNotFoundError if it has none, or if a shard is missing.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        shards = [folder / name for name in sorted(shard_names(index))]
        for shard in shards:
            if not shard.is_file():
                raise FileNotFoundError(f"{shard} is missing, but {index.name} names it: download it again")
        return shards
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors"))
    raise FileNotFoundError(
        f"{folder} has no model.safetensors and no {index.name} (found {', '.join(others) or 'no weights'}): "
        "download the safetensors files, or convert with transformers' save_pretrained"
    )


def shard_names(index: Path) -> set[str]:
    """The files that an index names. Raises ValueError for one that is no index, or names a file elsewhere."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: weight_map is {names!r:.80}, expected the file of each tensor: download it again")
    for tensor, name in names.items():
        if not isinstance(name, str) or name != Path(name).name:
            raise ValueError(f"{index}: {tensor} is in {name!r:.80}, expected the name of a file in its folder")
    return set(names.values())


def map_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of some files by name; values are read from the disk when they are used.

    Only the headers are read here, which say where in the rest each tensor is. Raises ValueError for a file that is not
    whole.
    """
    tensors = {}
    for path in files:
        try:
            with safe_open(path, framework="np"):  # checks the whole header
                pass
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise ValueError(
                f"{path} ({size} bytes) is not a whole safetensors file ({error}): download it again"
            ) from error
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, about in header.items():
            first, end = about["data_offsets"]
            bytes_of_it = data[start + first : start + end]
            tensors[name] = _tensor(name, path, tuple(about["shape"]), about["dtype"], bytes_of_it)
    return tensors


def _tensor(name: str, path: Path, shape: tuple[int, ...], kind: str, data: np.ndarray) -> Tensor:
    """A tensor over its mapped bytes, [bytes] uint8."""
    dtype = DTYPES.get(kind)

    def read(first: int, stop: int) -> np.ndarray:
        if dtype is None:
            raise ValueError(f"{path}: {name} is {kind}, expected one of {', '.join(DTYPES)}")
        values: np.ndarray = data.view(dtype).reshape(shape)
        return values[first:stop] if shape else values

    return Tensor(name, path, shape, kind, dtype, len(data), read)
