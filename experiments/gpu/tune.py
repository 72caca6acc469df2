"""Find the best sizes of the GPU kernels for each shape on this machine's GPU, and write them into their tables.

Run `python -m experiments.gpu.tune` on a Hopper GPU. `--dry-run` prints them and leaves the files alone, `--out`
keeps what every size took. A size whose result differs from the default's is left out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.gpu.baselines import first_line
from experiments.gpu.provenance import provenance
from experiments.gpu.sections import TOLERANCE, paged, seconds
from experiments.gpu.sizes import FULL
from experiments.harness.report import write_json
from model.kernels.hopper import decode as paged_decode
from model.kernels.hopper import prefill as paged_prefill

Shape = tuple[int, int, int]  # head_dim, group, page_size
# Llama 3 8B, Qwen2 7B, Qwen3 32B, Llama 3.2 1B.
SHAPES: tuple[Shape, ...] = ((128, 4, 64), (128, 7, 64), (128, 8, 64), (64, 4, 64))
HEADS = 32


def candidates(module: ModuleType) -> Iterator[Any]:
    """Every tuning of a kernel that is worth trying; some do not fit a shape."""
    if module is paged_prefill:
        for block_q, block_kv, stages in product((64, 128), (64, 128, 256), (2, 3, 4)):
            yield paged_prefill.Tuning(block_q, block_kv, stages)
    else:
        for block_kv, stages, waves in product((64, 128), (2, 4, 6, 8), (1, 2, 4)):
            yield paged_decode.Tuning(block_kv, stages, waves)


def race(
    kernel: Callable[..., Any], module: ModuleType, shape: Shape, prefix: int, chunk: int
) -> Iterator[tuple[Any, float | None, str]]:
    """Every tuning of a kernel at a shape: its seconds for `chunk` tokens after a prefix, or why it failed.

    Ends early if one breaks the GPU's context: all later ones would fail as well.
    """
    head_dim, group, page = shape
    config = replace(FULL.model, head_dim=head_dim, num_heads=HEADS // group * group, num_kv_heads=HEADS // group)
    q, pool, layer, batch = paged(replace(FULL, model=config, page=page), [prefix], [chunk])
    expected = np.asarray(jax.jit(kernel)(q, pool, layer, batch).astype(jnp.float32))
    for tuning in candidates(module):
        function = jax.jit(partial(kernel, tuning=tuning))
        try:
            error = float(np.abs(np.asarray(function(q, pool, layer, batch).astype(jnp.float32)) - expected).max())
            taken = seconds(function, q, pool, layer, batch, budget=0.1)
        except (ValueError, NotImplementedError) as refusal:
            # Too much shared memory, or a page that does not divide the block.
            yield tuning, None, first_line(refusal)
        except jax.errors.JaxRuntimeError as fault:
            yield tuning, None, first_line(fault)
            return
        else:
            yield (tuning, taken, "") if error < TOLERANCE else (tuning, None, f"off by {error}")


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
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu.tune", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print what is best, write nothing")
    parser.add_argument("--only", choices=("paged_prefill", "paged_decode"), help="tune this kernel")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), metavar="N", help="the first so many (default: all)")
    parser.add_argument("--out", type=Path, help="a JSON file for what every size took")
    parser.add_argument("--commit", help="the commit that is measured, on a machine without git or a checkout")
    args = parser.parse_args()
    console = Console()
    if jax.default_backend() != "gpu":
        parser.error(f"tuning needs a Hopper GPU, JAX found {jax.default_backend()}: run it on a machine with one")
    kernels: tuple[tuple[ModuleType, Any, int, int], ...] = (
        (paged_prefill, paged_prefill.paged_prefill, 0, 16_384),
        (paged_decode, paged_decode.paged_decode, 53_247, 1),
    )
    rows: list[dict[str, Any]] = []
    result = {"provenance": provenance(FULL, smoke=False, revision=args.commit), "tunings": rows}
    for module, kernel, prefix, chunk in kernels:
        if args.only not in (None, kernel.__name__):
            continue
        table, path = dict(module.TUNED), Path(str(module.__file__))
        for shape in track(SHAPES[: args.shapes], kernel.__name__, console=console):
            found: list[tuple[float, Any]] = []
            for tuning, taken, refused in race(kernel, module, shape, prefix, chunk):
                console.print(f"{shape}: {tuning}, {refused if taken is None else f'{taken * 1e3:.3f} ms'}")
                found += [(taken, tuning)] if taken is not None else []
                rows.append({"kernel": kernel.__name__, "shape": shape, "tuning": asdict(tuning), "seconds": taken})
                rows[-1] |= {"refused": refused} if refused else {}
                if args.out:
                    write_json(args.out, result, indent=1)
            if not found:
                continue
            best, table[shape] = min(found, key=lambda pair: pair[0])
            console.print(f"best of {shape}: {table[shape]}, {best * 1e3:.3f} ms")
            if not args.dry_run:
                path.write_text(with_table(path.read_text(), table))


if __name__ == "__main__":
    main()
