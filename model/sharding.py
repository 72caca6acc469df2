"""Tensor parallelism: one model on several devices, each with a part of every layer.

The logical axes of all arrays are those that their annotations in `params.py` and `kv.py` name; `SPLIT` says once which
of them are divided, and over what. Attention and the feed-forward block are divided by heads and by inner size, as in
Megatron-LM (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053), so a layer needs two sums over the devices.

The mesh has two axes. `kv` divides the KV heads, and the pool with them. Where there are more devices than KV heads,
`group` divides the query heads of each KV head, whose keys and values then are on every device of a group.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int32

from model.batch import Array
from model.config import ModelConfig
from model.kv import KVPool
from model.params import Experts, Layer, PackedLayers, Params, Recurrent
from model.quantized import Quantized

KV, GROUP = EVERY = ("kv", "group")

# What each logical axis may be divided over: the first choice that divides its length and repeats no axis of the mesh
# in an array. An empty one keeps the axis whole. Recurrent layers are on one device yet. Experts are on all devices:
# each has a part of the ffn of every one, so that all have the same work.
SPLIT: dict[str, tuple[tuple[str, ...], ...]] = {
    "kv_heads": (EVERY, (KV,)),
    "group": ((GROUP,), ()),
    "ffn": (EVERY,),
    "vocab": (EVERY, ()),
    "state_heads": (EVERY, ()),
}

# What only asks for sizes takes a mesh without devices, too.
AnyMesh = Mesh | AbstractMesh
Collective = Callable[[jax.Array], jax.Array]


def make_mesh(config: ModelConfig, count: int, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh that divides a model over the first `count` devices, or None for one device, which needs no mesh.

    Raises ValueError where the model's heads or its feed-forward size do not divide by the count, or where there are
    fewer devices.
    """
    possible = device_counts(config)
    if config.recurrent_layers and count > 1:
        raise ValueError(f"a {config.family} model has recurrent layers, which take one device: {count} are asked for")
    if count not in possible:
        raise ValueError(
            f"a model of {config.num_heads} query heads, {config.num_kv_heads} KV heads and a feed-forward size of "
            f"{' and '.join(map(str, ffn_sizes(config)))} does not divide over {count} devices: use {one_of(possible)}"
        )
    found = jax.devices() if devices is None else list(devices)
    if count > len(found):
        use = f"use {one_of([n for n in possible if n <= len(found)])}"
        if found[0].platform == "cpu":
            use += f", or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        raise ValueError(f"{count} devices are asked for, {len(found)} are there ({found[0].platform}): {use}")
    if count == 1:
        return None
    kv = min(count, config.num_kv_heads)
    return Mesh(np.array(found[:count]).reshape(kv, count // kv), EVERY)


def device_counts(config: ModelConfig) -> list[int]:
    """The numbers of devices that a model divides over.

    Each device has the same number of query heads and feed-forward units, and either whole KV heads of its own or a
    share of the queries of one.
    """
    if config.recurrent_layers:
        return [1]
    kv_heads, divided = config.num_kv_heads, (config.num_heads, *ffn_sizes(config))
    return [
        count
        for count in range(1, config.num_heads + 1)
        if not any(size % count for size in divided) and (kv_heads % count == 0 or count % kv_heads == 0)
    ]


def ffn_sizes(config: ModelConfig) -> list[int]:
    """The inner sizes of a model's feed-forward blocks: dense, of an expert, of its shared experts."""
    experts = config.experts
    sizes = [config.ffn_size, *([experts.ffn_size, experts.shared_ffn_size] if experts else [])]
    return [size for size in sizes if size]


def one_of(counts: Sequence[int]) -> str:
    """Numbers as text: "1, 2 or 4"."""
    *others, last = map(str, counts)
    return f"{', '.join(others)} or {last}" if others else last


def pool_heads(config: ModelConfig, mesh: Mesh | None) -> int:
    """KV heads of the pool that each device holds."""
    return config.num_kv_heads // (1 if mesh is None else mesh.shape[KV])


def partition_specs(arrays: Params | Layer | PackedLayers | Experts | KVPool, mesh: AnyMesh) -> Any:
    """The same dataclass with a PartitionSpec in place of each array; anything with a `shape` passes for an array.

    Raises ValueError for an axis that does not divide, for weights that are packed for the CPU kernels, and for
    quantised ones.
    """
    kind: Any = type(arrays)
    if isinstance(arrays, PackedLayers):
        raise ValueError("layers are PackedLayers, expected a Layer: shard them before they are packed")

    def specs(name: str, value: Any) -> Any:
        if isinstance(value, tuple) and name == "layers":
            return tuple(partition_specs(layer, mesh) for layer in value)
        if isinstance(value, Recurrent):
            raise ValueError(f"{name} layers take one device, expected attention to divide over {mesh.size}")
        if value is None:
            return None
        if isinstance(value, Experts):
            return partition_specs(value, mesh)
        if isinstance(value, Quantized):
            raise ValueError(f"{name} is quantised, expected full precision to divide it over {mesh.size} devices")
        return spec_of(kind, name, value.shape, mesh)

    return kind(**{field.name: specs(field.name, getattr(arrays, field.name)) for field in dataclasses.fields(kind)})


def spec_of(kind: type, name: str, shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """The PartitionSpec of the field `name` of a dataclass, for an array of this shape."""
    axes = logical_axes(kind)[name][-len(shape) :]  # a layer that is apart has no `layers`
    parts: list[tuple[str, ...] | None] = []
    for axis, length in zip(axes, shape, strict=True):
        used = {name for part in parts for name in part or ()}  # an axis of the mesh divides one of the array
        fitting = (c for c in SPLIT.get(axis, ((),)) if length % math.prod(mesh.shape[name] for name in c) == 0)
        choices = [c for c in fitting if used.isdisjoint(c)]
        if not choices:
            raise ValueError(f"{name} has {length} {axis}, which do not divide over {mesh.size} devices: use make_mesh")
        parts.append(tuple(name for name in choices[0] if mesh.shape[name] > 1) or None)
    while parts and parts[-1] is None:  # as jit returns them
        parts.pop()
    return PartitionSpec(*parts)


@cache
def logical_axes(kind: type) -> dict[str, tuple[str, ...]]:
    """The names of the axes of each field, read from its annotation; of several annotations, the first."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        array = (typing.get_args(hint) or (hint,))[0]
        if hasattr(array, "dim_str"):
            found[name] = tuple(array.dim_str.replace("*", "").split())
    return found


def shardings(arrays: Params | Layer | KVPool, mesh: AnyMesh) -> Any:
    """The same dataclass with a NamedSharding in place of each array, as `partition_specs` has it.

    Of arrays as a checkpoint stores them, these are the shardings to load them with; `divide_groups` does the rest.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(arrays, mesh))


def pool_sharding(config: ModelConfig, mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of the pool's keys and of its values, by KV heads; for `kv.empty_pool`."""
    if mesh is None:
        return None
    shape = (config.attention_layers, 1, config.num_kv_heads, 1, config.head_dim)
    return NamedSharding(mesh, spec_of(KVPool, "k", shape, mesh))


def shard_params(params: Params, mesh: Mesh | None) -> Params:
    """Stacked params, as a checkpoint stores them, on the devices of a mesh and in the form that `forward` takes."""
    if mesh is None:
        return params
    return divide_groups(jax.device_put(params, shardings(params, mesh)), mesh)


def divide_groups(params: Params, mesh: AnyMesh) -> Params:
    """Stacked params that lie as `shardings` says, with the queries of each KV head divided over its group of devices.

    Queries, key and value of a KV head are one array, so each device keeps its own queries and a copy of key and value:
    `qkv` is then [layers, devices, group / devices of a KV head + 2, head_dim, embed]. Nothing is sent for it.
    """
    devices = mesh.shape[GROUP]
    if devices == 1:
        return params

    def own_queries(array: jax.Array) -> jax.Array:
        count = (array.shape[2] - 2) // devices
        queries = jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(GROUP) * count, count, axis=2)
        return jnp.concatenate([queries, array[:, :, -2:]], axis=2)

    def divide(array: jax.Array) -> jax.Array:
        before, after = PartitionSpec(None, KV), PartitionSpec(None, EVERY)
        divided: jax.Array = jax.jit(jax.shard_map(own_queries, mesh=mesh, in_specs=before, out_specs=after))(array)
        return divided

    def divide_run(run: Layer | PackedLayers) -> Layer:
        assert isinstance(run, Layer)
        assert run.stacked
        assert isinstance(run.qkv, jax.Array)
        bias = None if run.qkv_bias is None else divide(run.qkv_bias)
        return dataclasses.replace(run, qkv=divide(run.qkv), qkv_bias=bias)

    return dataclasses.replace(params, layers=tuple(map(divide_run, params.layers)))


# Within a device's part of a forward pass.


def summed(x: jax.Array) -> jax.Array:
    """The sum over all devices."""
    total: jax.Array = jax.lax.psum(x, EVERY)
    return total


def gathered(x: Float[jax.Array, "rows part"]) -> Float[jax.Array, "rows whole"]:
    """All devices' parts side by side."""
    whole: jax.Array = jax.lax.all_gather(x, EVERY, axis=1, tiled=True)
    return whole


def embedded(embed: Float[jax.Array, "part embed"], tokens: Int32[Array, "tokens"]) -> Float[jax.Array, "tokens embed"]:
    """The embeddings of tokens, from a table of which each device has a part of the rows."""
    row = jnp.asarray(tokens) - jax.lax.axis_index(EVERY) * embed.shape[0]
    mine = (row >= 0) & (row < embed.shape[0])
    return summed(jnp.where(mine[:, None], embed[jnp.where(mine, row, 0)], 0))
