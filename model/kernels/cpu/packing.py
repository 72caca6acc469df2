"""Weights in the order in which the CPU kernels read them: `matmul.h` says why."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Shaped, UInt8, UInt32

from model.kernels.cpu import build, paged_attention
from model.kernels.cpu.build import PACK
from model.params import Experts, Layer, PackedLayers, Params
from model.quantized import Quantized, QuantizedPanels

WORD = 8  # 4-bit values in 32 bits, as in matmul.h


def pack(params: Params, page_size: int, consume: bool = False) -> Params:
    """Stacked weights in the kernels' order, for a pool of this page size.

    With `consume`, each matrix of `params` is deleted when it is packed, so that memory never holds all of them twice.
    Raises ValueError for what `unsupported_reason` names.
    """
    if reason := unsupported_reason(params, page_size):
        raise ValueError(reason)
    layers = tuple(pack_layers(run, consume) for run in params.layers if isinstance(run, Layer))
    embed = panels(params.embed, consume=consume)
    head = None if params.lm_head is None else panels(params.lm_head, consume=consume)
    return Params(embed, layers, params.final_norm, head)


def pack_layers(layers: Layer, consume: bool = False) -> PackedLayers:
    """Stacked layers in the kernels' order; with `consume`, their matrices are deleted."""
    assert layers.attn_norm is not None
    assert layers.mlp_norm is not None
    assert layers.qkv is not None
    assert layers.out is not None
    count, embed = layers.attn_norm.shape
    experts = layers.experts
    gate_up, down = (experts.shared_gate_up, experts.shared_down) if experts else (layers.gate_up, layers.down)

    def optional(array: jax.Array | None) -> Float32[jax.Array, "layers outputs"]:
        return jnp.zeros((count, 0), jnp.float32) if array is None else array.reshape(count, -1)

    def lacking(*shape: int) -> Float32[jax.Array, "..."]:
        return jnp.zeros((count, *shape, panel_width()), jnp.float32)

    return PackedLayers(
        attn_norm=layers.attn_norm,
        qkv=panels(layers.qkv, shape=(count, -1, embed), consume=consume),
        qkv_bias=bias_panels(optional(layers.qkv_bias)),
        q_norm=optional(layers.q_norm),
        k_norm=optional(layers.k_norm),
        out=panels(layers.out, shape=(count, embed, -1), consume=consume),
        out_bias=bias_panels(optional(layers.out_bias)),
        mlp_norm=layers.mlp_norm,
        gate_up=lacking(0, embed) if gate_up is None else panels(gate_up, 2, (count, -1, embed), consume),
        gate_up_bias=bias_panels(optional(layers.gate_up_bias), parts=2),
        down=lacking(-(-embed // panel_width()), 0) if down is None else panels(down, consume=consume),
        down_bias=bias_panels(optional(layers.down_bias)),
        **pack_experts(experts, count, embed, consume),
        sinks=optional(layers.sinks),
    )


def pack_experts(experts: Experts | None, count: int, embed: int, consume: bool) -> dict[str, Any]:
    """The fields of PackedLayers that are of `count` layers' experts; empty ones where there are none."""
    if experts is None:
        matrices = {"router": (0, embed), "experts_gate_up": (0, 0, embed), "experts_down": (0, 0, 0)}
        shapes = {name: (*shape, panel_width()) for name, shape in matrices.items()}
        shapes |= {"router_bias": (0,), "correction": (0,), "experts_gate_up_bias": (0, 0), "experts_down_bias": (0, 0)}
        return {name: jnp.zeros((count, *shape), jnp.float32) for name, shape in shapes.items()}
    numbers = experts.router.shape[1]

    def optional(array: jax.Array | None, *axes: int) -> Float32[jax.Array, "layers *experts outputs"]:
        return jnp.zeros((count, *axes, 0), jnp.float32) if array is None else array.reshape(count, *axes, -1)

    return {
        "router": panels(experts.router, consume=consume),
        "router_bias": optional(experts.router_bias),
        "correction": optional(experts.correction),
        "experts_gate_up": panels(experts.gate_up, 2, (count, numbers, -1, embed), consume),
        "experts_gate_up_bias": bias_panels(optional(experts.gate_up_bias, numbers), parts=2),
        "experts_down": panels(experts.down, consume=consume),
        "experts_down_bias": bias_panels(optional(experts.down_bias, numbers)),
    }


def panels(
    weight: Float32[jax.Array, "..."] | Quantized, parts: int = 1, shape: tuple[int, ...] = (), consume: bool = False
) -> Float32[jax.Array, "*layers panels inputs panel"] | QuantizedPanels:
    """Weights in panels of outputs, each input by input; every panel has an equal share of each of the `parts`.

    The outputs that fill the last panel up are zero. `shape` is [*layers, outputs, inputs], as `reshape` takes it,
    where `weight` has other axes. With `consume`, `weight` is deleted.
    """
    if isinstance(weight, Quantized):
        return _quantized_panels(weight, parts, (shape or weight.shape)[:-1], consume)
    return _array_panels(weight, parts, shape or weight.shape, consume)


def _array_panels(
    array: Shaped[jax.Array, "..."], parts: int, shape: tuple[int, ...], consume: bool
) -> Shaped[jax.Array, "*layers panels inputs panel"]:
    """The same of numbers of 8 or 32 bits."""
    packed: jax.Array = _packed(array, parts, shape, panel_width())
    if consume:
        packed.block_until_ready()
        array.delete()
    return packed


def _quantized_panels(weight: Quantized, parts: int, outputs: tuple[int, ...], consume: bool) -> QuantizedPanels:
    """A quantised matrix in panels: its values, scales and offsets are each packed as a matrix."""

    def packed(array: jax.Array) -> jax.Array:
        return _array_panels(array, parts, (*outputs, array.shape[-1]), consume)

    words = weight.values if weight.bits == 8 else _words(weight.values)
    made = QuantizedPanels(
        values=packed(words),
        scales=packed(weight.scales),
        bits=weight.bits,
        group=weight.group,
        inputs=weight.inputs,
        offsets=None if weight.offsets is None else packed(weight.offsets),
    )
    if consume and weight.bits == 4:
        weight.values.delete()
    return made


@jax.jit
def _words(packed: UInt8[jax.Array, "*outputs bytes"]) -> UInt32[jax.Array, "*outputs words"]:
    """Nibbles two to a byte, as eight to a word."""
    whole = jnp.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, -packed.shape[-1] % (WORD // 2))])
    return jax.lax.bitcast_convert_type(whole.reshape(*whole.shape[:-1], -1, WORD // 2), jnp.uint32)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _packed(weight: jax.Array, parts: int, shape: tuple[int, ...], width: int) -> jax.Array:
    rows = weight.reshape(shape)  # here, since a reshape of its own would be a copy
    *layers, outputs, inputs = rows.shape
    count = -(-outputs // width)  # parts have equal shares of the rows and of a panel
    rows = rows.reshape(-1, outputs, inputs)
    to = jax.ShapeDtypeStruct((len(rows), count, inputs, width), rows.dtype)
    packed: jax.Array = jax.ffi.ffi_call(PACK, to)(rows, parts=parts)
    return packed.reshape(*layers, *to.shape[1:])


def bias_panels(
    bias: Float32[jax.Array, "layers *experts outputs"], parts: int = 1
) -> Float32[jax.Array, "layers *experts padded"]:
    """Biases in the order of their outputs' panels, padded with zeros; none stay none."""
    if not bias.shape[-1]:
        return bias
    return _array_panels(bias[..., None], parts, (*bias.shape, 1), consume=False).reshape(*bias.shape[:-1], -1)


def panel_width() -> int:
    """Outputs of a panel: what the library was built with."""
    return int(ctypes.c_int.in_dll(build.library(), "tokenzero_panel").value)


def unsupported_reason(params: Params, page_size: int) -> str | None:
    """Why the kernels cannot run this model, and what they support; None if they can."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    for path, leaf in leaves:
        name, numbers = jax.tree_util.keystr(path)[1:], leaf.scales if isinstance(leaf, Quantized) else leaf
        if numbers.dtype != jnp.float32:
            return f"dtype of {name} is {numbers.dtype.name}, supported is float32"
        if isinstance(leaf, Quantized) and leaf.bits == 4 and leaf.group % WORD and leaf.group < leaf.inputs:
            return f"{name} of 4 bits is in groups of {leaf.group}, supported are multiples of {WORD}"
    for run in params.runs:
        if run.qkv is None or run.attn_norm is None or run.mlp_norm is None:
            return "layers are of a kind that is recurrent or mixes tokens or features alone, supported is attention"
    first = params.runs[0].qkv
    assert first is not None
    for name, size in (("head_dim", first.shape[-2]), ("page_size", page_size)):
        if size % paged_attention.ALIGNMENT:
            return f"{name} is {size}, supported are multiples of {paged_attention.ALIGNMENT}"
    return None
