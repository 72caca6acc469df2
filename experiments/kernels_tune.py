"""Find the best sizes of the GPU kernels for each shape on this machine's GPU, and write them into their tables.

Run `python -m experiments.kernels_tune` on a Hopper GPU; `--dry-run` prints them and leaves the files alone.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from experiments.gpu_bench import FULL, paged, seconds
from model.kernels import paged_decode, paged_prefill

Shape = tuple[int, int, int]  # head_dim, group, page_size
# Llama 3 8B, Qwen2 7B, Qwen3 32B, Llama 3.2 1B.
SHAPES: tuple[Shape, ...] = ((128, 4, 64), (128, 7, 64), (128, 8, 64), (64, 4, 64))
HEADS = 32


def candidates(module: ModuleType) -> Iterator[Any]:
    """Every tuning of a kernel that is worth a try; some will not fit a shape."""
    if module is paged_prefill:
        for block_q, block_kv, stages in product((64, 128), (64, 128, 256), (2, 3, 4)):
            yield paged_prefill.Tuning(block_q, block_kv, stages)
        for block_kv, stages in product((64, 128), (2, 3, 4)):
            yield paged_prefill.Tuning(64, block_kv, stages, overlap=True)
    else:
        for block_kv, stages, waves in product((64, 128), (2, 4, 6, 8), (1, 2, 4)):
            yield paged_decode.Tuning(block_kv, stages, waves)


def best(kernel: Callable, module: ModuleType, shape: Shape, prefix: int, chunk: int) -> tuple[Any, float]:
    """The fastest tuning of a kernel at a shape, and its seconds for one sequence of `chunk` tokens behind a prefix."""
    head_dim, group, page = shape
    config = replace(FULL.model, head_dim=head_dim, num_heads=HEADS // group * group, num_kv_heads=HEADS // group)
    q, pool, layer, batch = paged(replace(FULL, model=config, page=page), [prefix], [chunk])
    found = []
    for tuning in candidates(module):
        try:
            taken = seconds(jax.jit(partial(kernel, tuning=tuning)), q, pool, layer, batch, budget=0.1)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            continue  # too much shared memory, or a page that does not divide the block
        found.append((taken, tuning))
    taken, tuning = min(found, key=lambda pair: pair[0])
    return tuning, taken


def with_table(source: str, table: dict[Shape, Any]) -> str:
    """A kernel file's source with `table` as its TUNED."""
    lines = []
    for shape, tuning in sorted(table.items()):
        sizes = ", ".join(f"{field.name}={getattr(tuning, field.name)}" for field in fields(tuning))
        lines.append(f"    {shape}: Tuning({sizes}),\n")
    head = "TUNED: dict[tuple[int, int, int], Tuning] = {"
    changed, count = re.subn(rf"{re.escape(head)}[^}}]*}}", lambda _: f"{head}\n{''.join(lines)}}}", source)
    assert count == 1, "the kernel file has no TUNED table"
    return changed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.kernels_tune", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print what is best, write nothing")
    parser.add_argument("--only", choices=("paged_prefill", "paged_decode"), help="tune this kernel")
    args = parser.parse_args()
    console = Console()
    if jax.default_backend() != "gpu":
        parser.error(f"there is no GPU, JAX found {jax.default_backend()}")
    kernels = (
        (paged_prefill, paged_prefill.paged_prefill, 0, 16_384),
        (paged_decode, paged_decode.paged_decode, 53_247, 1),
    )
    for module, kernel, prefix, chunk in kernels:
        if args.only not in (None, kernel.__name__):
            continue
        table, path = dict(module.TUNED), Path(str(module.__file__))
        for shape in track(SHAPES, kernel.__name__, console=console):
            table[shape], taken = best(kernel, module, shape, prefix, chunk)
            console.print(f"{shape}: {table[shape]}, {taken * 1e3:.3f} ms")
            if not args.dry_run:
                path.write_text(with_table(path.read_text(), table))


if __name__ == "__main__":
    main()
