"""How many kernels a decode step launches on an H200, counted in its compiled program, without a GPU.

`python -m experiments.gpu.launches` needs what `experiments.gpu.aot` needs (`make kernels-aot`). It compiles the
forward pass of an 8B llama in bf16 for one new token a sequence, with stacked and with separate layers, with Triton's
matrix products (XLA's default) and with cuBLAS's, and counts from XLA's dump of what it will run: kernels and copies on
the device, what the host launches (a command buffer, which is a CUDA graph, is one), and the bytes of weights and other
arrays that are copied. Counts are no times.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.gpu.aot import Variant, forward_with, on_h200
from experiments.gpu.sizes import LLAMA_8B
from experiments.harness.report import make_table, write_json

RESULTS = Path(f"experiments/results/gpu/launches-jax-{jax.__version__}.json")
SEQS = (1, 8, 64)
PRODUCTS = {"Triton": True, "cuBLAS": False}  # who computes matrix products: xla_gpu_enable_triton_gemm
# Thunks that hold others, and one that only waits; every other one is a kernel, a library call or a copy.
HOLDERS = ("kCommandBuffer", "kWhile", "kDynamicSliceFusion", "kAsyncStart", "kSequential", "kConditional")
WAITS = ("kAsyncDone",)
THUNK = re.compile(r"( *)\d+: (k\w+)")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}


@dataclass(frozen=True)
class Thunk:
    """A command of a compiled program; a while loop's `children` are those of its body."""

    kind: str
    children: tuple[Thunk, ...] = ()


@dataclass(frozen=True)
class Count:
    """What one run of a program does."""

    launched: int  # kernels, library calls and copies on the device
    by_host: int  # of these, and of command buffers, what the host launches
    copied_mb: float  # of arrays that are copied as they are


def thunks(text: str) -> tuple[Thunk, ...]:
    """The commands of XLA's dump of a thunk sequence, whose indentation nests them."""
    found = list[tuple[int, str]]()  # indentation and kind
    for line in text.splitlines():
        if match := THUNK.match(line):
            found.append((len(match[1]), match[2]))
        elif line.strip() == "body:":
            found.append((len(line) - len(line.lstrip()) + 2, "body"))
    return _nested(found)


def _nested(found: list[tuple[int, str]]) -> tuple[Thunk, ...]:
    made, at = list[Thunk](), 0
    while at < len(found):
        indent, kind = found[at]
        end = next((i for i in range(at + 1, len(found)) if found[i][0] <= indent), len(found))
        inside = found[at + 1 : end]
        if kind == "kWhile":  # what comes before its body is its condition, which a counted loop does not run
            body = next(i for i, each in enumerate(inside) if each == (indent + 4, "body"))
            inside = inside[body + 1 :]
        made.append(Thunk(kind, _nested(inside)))
        at = end
    return tuple(made)


def computations(program: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation of a compiled program by name, and the name of the entry."""
    found, entry = dict[str, list[str]](), ""
    for paragraph in program.split("\n\n"):
        if head := re.match(r"\s*(ENTRY )?%?([\w.-]+) \(", paragraph):
            found[head[2]] = paragraph.strip().splitlines()[1:]
            entry = head[2] if head[1] else entry
    return found, entry


def trip_counts(program: str) -> list[int]:
    """How often each while loop runs: in the order of the thunks, a loop before those in its body.

    Raises ValueError for a loop whose count XLA does not know.
    """
    found, entry = computations(program)

    def of(name: str) -> Iterator[int]:
        for line in found[name]:
            if body := re.search(r" while\(.*body=%?([\w.-]+)", line):
                yield trips(line)
                yield from of(body[1])

    return list(of(entry))


def trips(line: str) -> int:
    """The trip count of a while instruction."""
    if count := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(count[1])
    raise ValueError(f"a while loop without a known trip count, which the host has to wait for: {line.strip()[:200]}")


def copied_bytes(program: str) -> int:
    """The bytes that a run of the program copies or slices out as they are, loops included."""
    found, entry = computations(program)

    def copied(name: str) -> int:
        """Of a fusion that only copies."""
        root = next(line for line in found[name] if line.lstrip().startswith("ROOT"))
        return array_bytes(root) if re.search(r" (?:copy|dynamic-slice|slice)\(", root) else 0

    def of(name: str) -> int:
        total = 0
        for line in found[name]:
            called = re.search(r"(?:calls|body)=%?([\w.-]+)", line)
            if " while(" in line and called:
                total += trips(line) * of(called[1])
            elif re.search(r" fusion(?:-start)?\(", line) and called:
                total += copied(called[1])
            elif " copy(" in line:
                total += array_bytes(line)
        return total

    return of(entry)


def array_bytes(line: str) -> int:
    """The size of the array that an instruction makes."""
    shape = re.search(r"= (\w+)\[([\d,]*)\]", line)
    if shape is None or shape[1] not in WIDTHS:
        raise ValueError(f"an instruction with a shape that is not known: {line.strip()[:200]}")
    return WIDTHS[shape[1]] * math.prod(int(size) for size in shape[2].split(",") if size)


def count(sequence: tuple[Thunk, ...], loops: Iterator[int]) -> tuple[int, int]:
    """Launches on the device and by the host; `loops` are the trip counts of the loops to come."""
    launched = by_host = 0
    for thunk in sequence:
        times = next(loops) if thunk.kind == "kWhile" else 1
        inside, host = count(thunk.children, loops)
        if thunk.kind not in HOLDERS + WAITS:
            inside, host = 1, 1
        elif thunk.kind == "kCommandBuffer":
            host = 1
        launched, by_host = launched + times * inside, by_host + times * host
    return launched, by_host


def counted(traced: Any, triton: bool) -> Count:
    """Compile a traced program, and count."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_gpu_enable_triton_gemm": triton}
        program = traced.lower().compile(compiler_options=options).as_text()
        # The second name is there only if a pass has changed the sequence.
        dumps = [*Path(folder).glob("*thunk_sequence.txt"), *Path(folder).glob("*thunk_sequence_after_*.txt")]
        sequence = thunks(dumps[-1].read_text())
    launched, by_host = count(sequence, iter(trip_counts(program)))
    return Count(launched, by_host, round(copied_bytes(program) / 1e6, 3))


def table(rows: list[dict[str, Any]], layers: int) -> Table:
    """A row for each program."""
    columns = ("sequences", "layers", "products", "launches", "a layer", "by the host", "copied, MB")
    title = f"a decode step of an 8B llama with {layers} layers, compiled for an H200, jax {jax.__version__}"
    grid = make_table(columns, words=("layers", "products"), title=title)
    for row in rows:
        grid.add_row(
            str(row["seqs"]),
            row["layers"],
            row["products"],
            f"{row['launched']:,}",
            f"{row['launched'] / layers:.1f}",
            f"{row['by_host']:,}",
            f"{row['copied_mb']:,.1f}",
        )
    return grid


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m experiments.gpu.launches", description=__doc__.split("\n")[0])
    cli.add_argument("--layers", type=int, default=LLAMA_8B.num_layers, help="(default: %(default)s)")
    cli.add_argument("--seqs", nargs="+", type=int, default=list(SEQS), help="sequences (default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # else the plug-in looks for a driver
    config, sharding, console = replace(LLAMA_8B, num_layers=args.layers), on_h200(), Console(width=110)
    cases = [(seqs, stacked, products) for seqs in args.seqs for stacked in (True, False) for products in PRODUCTS]
    rows = []
    for seqs, stacked, products in track(cases, "compiling", console=console):
        variant = Variant("paged_decode", config.head_dim, config.group, 64, seqs, 1)
        traced, _ = forward_with(variant, config, sharding, stacked)
        about = {"seqs": seqs, "layers": "stacked" if stacked else "separate", "products": products}
        rows.append(about | asdict(counted(traced, PRODUCTS[products])))
    versions = {"jax": jax.__version__, "dtype": str(jnp.bfloat16.dtype), "num_layers": args.layers}
    write_json(args.out, versions | {"rows": rows})
    console.print(table(rows, args.layers))


if __name__ == "__main__":
    main()
