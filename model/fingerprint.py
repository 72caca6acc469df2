"""The name of a model with its weights, for the keys of KV pages."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.kernels.cpu import build
from model.kv_rows import GROUP
from model.params import Layer, Params

SEEDS = (0x00000001, 0x85EBCA6B)
BLOCK_BYTES = 2**22  # of a weight that one call hashes, so that all cores have work


def fingerprint(config: ModelConfig, params: Params) -> bytes:
    """32 bytes that name this architecture with these weights in this dtype, for the keys of KV pages.

    It depends only on the values in memory: equal after a restart, on another machine, on any number of devices, from
    safetensors or Orbax, with layers stacked or unstacked. End-of-sequence ids and the context limit do not change KV
    and are left out. Every bit of every weight enters, through a 64-bit hash per array and layer that takes one pass
    over the device's memory, by a kernel on CPUs. That hash distinguishes checkpoints, but it does not protect against
    deliberately colliding weights, as BLAKE2b over all bytes on the host would. Raises ValueError for packed weights
    and for those that `sharding.divide_groups` has divided.
    """
    if params.packed:
        raise ValueError("the layers are PackedLayers, expected a Layer: call it before `arranged`")
    qkv = next(run.qkv for run in params.runs if run.qkv is not None)
    if qkv.shape[-4] != config.num_kv_heads:
        raise ValueError(
            f"qkv has {qkv.shape[-4]} KV heads, expected {config.num_kv_heads}: call it before `shard_params`"
        )
    runs = [_hashes_of_run(list(run)) for _, run in groupby(params.runs, jax.tree.structure)]
    words = (jax.tree.map(_hash, (params.embed, params.final_norm, params.lm_head)), runs if runs[1:] else runs[0])

    relevant = dataclasses.replace(config, layers=config.active_layers, eos_token_ids=(), max_position=0)
    digest = hashlib.blake2b(digest_size=32, person=b"tokenzero model")
    digest.update(f"{relevant.to_json()}{params.final_norm.dtype.name}".encode())
    for field, value in jax.tree_util.tree_leaves_with_path(words):
        digest.update(jax.tree_util.keystr(field).encode())
        digest.update(np.asarray(value).astype("<u4").tobytes())
    return digest.digest()


def _hashes_of_run(run: Sequence[Layer]) -> Layer:
    """Two hashes of each array and layer, [2, layers], of layers with the same arrays, stacked or apart."""
    hashed = [jax.tree.map(functools.partial(_hash, kept=int(part.stacked)), part) for part in run]
    words: Layer = jax.tree.map(lambda *all_of_it: np.concatenate([w.reshape(2, -1) for w in all_of_it], -1), *hashed)
    return words


def with_pages(name: bytes, kv_dtype: str | None) -> bytes:
    """The name of a model for the keys of its pages, 32 bytes: another where these have a dtype of their own.

    What a page holds of a dtype is part of it, so that pages which another version wrote otherwise are not found.
    """
    if kv_dtype is None:
        return name
    about = f"{kv_dtype} in groups of {GROUP}".encode()
    return hashlib.blake2b(name + about, digest_size=32, person=b"tokenzero pages").digest()


def _hash(x: jax.Array, kept: int = 0) -> np.ndarray:
    """Two uint32 hashes of the bits of `x` for each index of its first `kept` axes, [2, *kept axes].

    From the last axis to the first: salt each word with its index, mix, sum modulo 2^32. Integer sums are the same in
    any order, so on any device and under any sharding.
    """
    on_host = x.itemsize in (1, 2, 4) and all(device.platform == "cpu" for device in x.devices()) and build.available()
    words = _row_hashes_of_shards(x) if on_host else np.asarray(_row_hashes_on_device(x))
    for depth in range(1, x.ndim - kept):
        salts = _salts(np.arange(words.shape[-1], dtype=np.uint32), depth)
        words = np.add.reduce(_mix(words ^ salts.reshape(2, *[1] * (words.ndim - 2), -1)), axis=-1, dtype=np.uint32)
    return words


@jax.jit
def _row_hashes_on_device(x: jax.Array) -> jax.Array:
    """The hashes over the last axis, [2, *axes before it]."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    salts = _salts(jnp.arange(x.shape[-1], dtype=jnp.uint32), depth=0)
    return jnp.stack([jnp.sum(_mix(bits ^ own), axis=-1, dtype=jnp.uint32) for own in salts])


def _row_hashes_of_shards(x: jax.Array) -> np.ndarray:
    """The same by the CPU kernel, shard by shard where they lie; what several devices hold is hashed once."""
    words = np.zeros((2, *x.shape[:-1]), np.uint32)
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            *rows, columns = shard.index
            words[(slice(None), *rows)] += _row_hashes(np.asarray(shard.data), columns.start or 0)
    return words


def _row_hashes(x: np.ndarray, first: int) -> np.ndarray:
    """The hashes over the last axis, which begins at place `first`, of several threads side by side."""
    columns = x.shape[-1]
    salts = _salts(np.arange(first, first + columns, dtype=np.uint32), depth=0)
    rows = np.ascontiguousarray(x).reshape(-1, columns)
    step = max(1, BLOCK_BYTES // (columns * x.itemsize))

    def hashes(start: int) -> np.ndarray:
        block = rows[start : start + step]
        words = np.empty((2, len(block)), np.uint32)
        sizes = ctypes.c_int(x.itemsize), ctypes.c_int64(len(block)), ctypes.c_int64(columns)
        build.library().tokenzero_row_hashes(_pointer(block), *sizes, _pointer(salts), _pointer(words))
        return words

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # a call of the library holds no lock of Python's
        words = list(threads.map(hashes, range(0, len(rows), step)))
    return np.concatenate(words, axis=-1).reshape(2, *x.shape[:-1])


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _salts(places: Any, depth: int) -> Any:
    """What the words at these places of an axis are mixed with, for each of the two hashes: [2, places] uint32."""
    xp = np if isinstance(places, np.ndarray) else jnp
    return xp.stack([_mix(places + np.uint32(seed + (depth << 28))) for seed in SEEDS])


def _mix(x: Any) -> Any:
    """An invertible scrambling of uint32 words (Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31/)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
