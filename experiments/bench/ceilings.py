"""This machine's ceilings: GFLOP/s of float32 matrix products and GB/s read, by XLA and by torch.

Benchmarks measure them in the same run as the speeds that they bound, and take the larger library's. `best` combines
several measurements, since other load on a machine only lowers them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

SUM_BYTES = 256 * 2**20  # summed: several times the size of any processor cache

Shape = tuple[int, int, int]  # rows, inner, columns
CUBES: tuple[Shape, ...] = ((1024, 1024, 1024), (2048, 2048, 2048))


@dataclass(frozen=True)
class Ceilings:
    """By library, `xla` and `torch`: GFLOP/s of the best float32 product, and GB/s of a sum."""

    gflops: dict[str, float]
    read_gbs: dict[str, float]

    @property
    def best_gflops(self) -> float:
        """The larger of both libraries'."""
        return max(self.gflops.values())

    @property
    def best_read_gbs(self) -> float:
        """The larger of both libraries'."""
        return max(self.read_gbs.values())


def least_seconds(run: Callable[[], object], repeats: int) -> float:
    """The shortest of `repeats` runs, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure(shapes: Iterable[Shape], repeats: int = 5, sum_bytes: int = SUM_BYTES) -> Ceilings:
    """Multiply matrices of all shapes and sum `sum_bytes` of float32 numbers, in both libraries on their threads."""
    rng = np.random.default_rng(0)
    multiply = jax.jit(jnp.matmul)
    products: dict[str, list[float]] = {"xla": [], "torch": []}
    for rows, inner, columns in sorted(set(shapes)):
        left = rng.standard_normal((rows, inner), np.float32)
        right = rng.standard_normal((inner, columns), np.float32)
        billions = 2e-9 * rows * inner * columns
        products["xla"].append(
            billions / least_seconds(ready(multiply, jnp.asarray(left), jnp.asarray(right)), repeats)
        )
        products["torch"].append(
            billions / least_seconds(partial(torch.matmul, torch.from_numpy(left), torch.from_numpy(right)), repeats)
        )
    return Ceilings({library: max(rates) for library, rates in products.items()}, read_gbs(sum_bytes, repeats))


def read_gbs(sum_bytes: int, repeats: int = 5) -> dict[str, float]:
    """GB/s at which each library sums `sum_bytes` of float32 numbers, again and again.

    A processor's cache may hold some of them: what is compared with it must read as many bytes.
    """
    numbers, billions = np.ones(sum_bytes // 4, np.float32), sum_bytes / 1e9
    return {
        "xla": billions / least_seconds(ready(jax.jit(jnp.sum), jnp.asarray(numbers)), repeats),
        "torch": billions / least_seconds(partial(torch.sum, torch.from_numpy(numbers)), repeats),
    }


def ready(function: Callable[..., jax.Array], *arrays: jax.Array) -> Callable[[], object]:
    """A call that returns when its result is ready."""
    return lambda: function(*arrays).block_until_ready()


def best(measured: Iterable[Ceilings]) -> Ceilings:
    """By library, the largest of several measurements."""
    measured = list(measured)
    return Ceilings(
        {name: max(m.gflops[name] for m in measured) for name in measured[0].gflops},
        {name: max(m.read_gbs[name] for m in measured) for name in measured[0].read_gbs},
    )
