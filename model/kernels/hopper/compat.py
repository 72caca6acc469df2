"""The differences between JAX 0.10.2 and 0.11 in Mosaic GPU, in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AbstractMesh, AxisType

plgpu: Any = mosaic_gpu  # its names and signatures depend on the version
JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
# The interpreter of 0.10 lacks layout_cast, and its parameters are private.
CAN_INTERPRET = JAX_VERSION >= (0, 11)


def transposed(ref: Any) -> Any:
    """A view of a 2D shared-memory ref with its axes swapped."""
    return ref.transpose((1, 0)) if JAX_VERSION >= (0, 11) else plgpu.transpose_ref(ref, (1, 0))


def load(ref: Any, layout: Any) -> jax.Array:
    """The contents of a shared-memory ref in registers of the given layout; the ref need not be swizzled."""
    if JAX_VERSION >= (0, 11):
        return plgpu.load(ref, layout=layout, optimized=False)
    return plgpu.load(ref, (), layout=layout, optimized=False)


def generic_read(ref: Any) -> jax.Array:
    """The contents of a ref, for the interpreter in place of wgmma; with the fence that TMA needs after such reads."""
    value = ref[...]
    plgpu.commit_smem()
    return value


def queries_by_keys(q: Any, k: Any, interpreted: bool) -> jax.Array:
    """Scores [query_rows, keys] in float32 of two shared-memory refs; returns when the product is done."""
    if interpreted:
        return jnp.dot(q[...], generic_read(k).T, preferred_element_type=jnp.float32)

    def product(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, q, transposed(k))
        return accumulator[...]

    return pl.run_scoped(product, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))


def plus_probs_by_values(total: jax.Array, probs: jax.Array, v: Any, interpreted: bool) -> jax.Array:
    """`total` + `probs` @ `v`, the probabilities in registers, the values in shared memory; returns when it is done."""
    if interpreted:
        return total + jnp.dot(probs, generic_read(v), preferred_element_type=jnp.float32)
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, probs, v))(plgpu.ACC.init(total))


def values_then_scores(
    total: jax.Array, probs: jax.Array, v: Any, q: Any, k: Any, issued: Callable[[], None], interpreted: bool
) -> tuple[jax.Array, jax.Array]:
    """`plus_probs_by_values` and `queries_by_keys`, issued back to back; then call `issued`, and wait for both."""
    if interpreted:
        total, scores = plus_probs_by_values(total, probs, v, interpreted), queries_by_keys(q, k, interpreted)
        issued()
        return total, scores

    def issue(refs: tuple[Any, Any]) -> None:
        plgpu.wgmma(refs[0], probs, v)
        plgpu.wgmma(refs[1], q, transposed(k))
        issued()

    none = plgpu.layout_cast(jnp.zeros((q.shape[0], k.shape[0]), jnp.float32), plgpu.Layout.WGMMA)
    return pl.run_state(issue)((plgpu.ACC.init(total), plgpu.ACC.init(none)))


def interpreter(detect_races: bool = False) -> Any:
    """The value of `interpret` that simulates a kernel's threads and barriers on the CPU; needs CAN_INTERPRET."""
    return plgpu.InterpretGPUParams(detect_races=detect_races)


def hopper(mesh: AbstractMesh | None = None) -> contextlib.AbstractContextManager[None]:
    """A context in which kernels lower for an H200 on any machine, or for those of a mesh that `h200s` has made."""
    if JAX_VERSION < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import use_abstract_mesh

    return use_abstract_mesh(mesh or h200s((1,), ("x",)))


def h200s(sizes: tuple[int, ...], names: tuple[str, ...]) -> AbstractMesh:
    """A mesh of H200s that are not there, to lower for."""
    automatic = (AxisType.Auto,) * len(sizes)
    if JAX_VERSION < (0, 11):
        return AbstractMesh(sizes, names, automatic)
    from jax.sharding import AbstractDevice

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return AbstractMesh(sizes, names, automatic, abstract_device=device)


def races_found() -> bool:
    """Whether the interpreter's last kernel had a data race."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return gpu_callbacks.get_races().races_found
