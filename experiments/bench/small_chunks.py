"""Chunks of few tokens behind a cached prefix: their time, and its share of the best that the machine could do.

`python -m experiments.bench.small_chunks` needs the `test` extra. It runs the engine's compiled steps alone, from the
packing of the batch until the host has the sampled token. The best is the roofline's bound
(https://doi.org/10.1145/1498765.1498785): the chunk's arithmetic at the rate of this machine's best matrix product, or
the bytes of its weights, keys and values at the rate of its memory, whichever takes longer. Both rates are measured in
the same run.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.bench.ceilings import CUBES, Ceilings, best, measure
from experiments.bench.prefill_decode import SIZES, make_engine, products, write_llama
from experiments.bench.timing import Passes
from experiments.bench.work import kv_bytes, prefill_flops, weight_bytes
from experiments.harness.figures import COLOURS, plain, save, subplots, tokens_label
from experiments.harness.other_load import start_watch, warning
from experiments.harness.provenance import machine, provenance
from experiments.harness.report import make_table, write_json
from model.config import ModelConfig

RESULTS = Path("experiments/results/bench/small_chunks.json")
CHUNKS, PREFIXES = (1, 4, 5, 8, 16, 24, 32, 64), (0, 4096, 16_384)
GOAL, GOAL_CHUNKS = 0.6, (4, 32)  # of the bound, for chunks from and to so many tokens
F32 = 4  # bytes a number
PASSES = 5  # of each chunk in a round

Json = dict[str, Any]


def needed(config: ModelConfig, prefix: int, chunk: int) -> Json:
    """The arithmetic and the bytes of a chunk, attention and the head of its last token included."""
    total = prefix + chunk
    read = weight_bytes(config, F32) + kv_bytes(config, total, F32)
    return {"gflop": prefill_flops(config, total, prefix) / 1e9, "mb": read / 1e6}


def with_bound(row: Json, ceilings: Ceilings) -> Json:
    """The row with the least ms that this machine's ceilings allow, what sets them, the share, and the goal."""
    compute, memory = row["gflop"] / ceilings.best_gflops * 1e3, row["mb"] / ceilings.best_read_gbs
    bound = max(compute, memory)
    share = bound / median(row["ms"])
    least, most = GOAL_CHUNKS
    goal = {"at_least": GOAL, "reached": share >= GOAL} if least <= row["chunk"] <= most else None
    limit = "matrix products" if compute > memory else "memory"
    return row | {"bound_ms": round(bound, 3), "bound_by": limit, "of_bound": round(share, 3), "goal": goal}


def run(
    name: str, chunks: list[int], prefixes: list[int], repeats: int, sum_bytes: int | None, console: Console
) -> tuple[list[Json], Ceilings]:
    """A row for each prefix and chunk, and the ceilings: all chunks of a prefix take turns."""
    size, longest = SIZES[name], max(prefixes) + max(chunks)
    prompt = np.random.default_rng(0).integers(3, size.vocab, longest).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), size, longest + 1)
        engine = make_engine(Path(folder), longest + 1)
    rows, measured = list[Json](), list[Ceilings]()
    shapes = [*CUBES, *products(size, 1024)]
    try:
        passes = Passes(engine, prompt)
        for prefix in prefixes:
            work = {chunk: needed(engine.config, prefix, chunk) for chunk in chunks}
            least_read = int(1e6 * min(each["mb"] for each in work.values()))
            times: dict[int, list[float]] = {chunk: [] for chunk in chunks}
            for number in track(range(repeats + 1), f"{name}, prefix of {prefix} tokens", console=console):
                for chunk in chunks:
                    taken = [1e3 * passes.seconds(prefix, chunk) for _ in range(PASSES)]
                    times[chunk] += taken if number else []  # the first round warms up
            measured.append(measure(shapes, sum_bytes=sum_bytes or least_read))
            rows += [
                {"model": name, "prefix": prefix, "chunk": chunk, **work[chunk], "ms": [round(ms, 4) for ms in found]}
                for chunk, found in times.items()
            ]
    finally:
        engine.stop()
    # The matrix products are the same for each prefix; memory is as fast as for the bytes that the prefix needs.
    compute = best(measured).gflops
    bounded = [with_bound(row, Ceilings(compute, measured[prefixes.index(row["prefix"])].read_gbs)) for row in rows]
    return bounded, best(measured)


def table(rows: list[Json], ceilings: Ceilings, threads: int, others: float) -> Table:
    """Each chunk's time, its bound, and whether the goal is reached."""
    columns = ("llama", "prefix", "chunk", "ms", "bound, ms", "by", "of the bound", "goal", "")
    grid = make_table(columns, words=("llama", "by", ""), title=f"chunks of few tokens, float32, {threads} threads")
    for prefix in dict.fromkeys(row["prefix"] for row in rows):
        for row in (row for row in rows if row["prefix"] == prefix):
            goal = row["goal"]
            grid.add_row(
                row["model"],
                f"{prefix:,}",
                str(row["chunk"]),
                f"{median(row['ms']):.2f}",
                f"{row['bound_ms']:.2f}",
                row["bound_by"],
                f"{row['of_bound']:.0%}",
                f">= {goal['at_least']:.0%}" if goal else "",
                ("reached" if goal["reached"] else "missed") if goal else "",
            )
        grid.add_section()
    grid.caption = (
        f"ceilings: {ceilings.best_gflops:,.1f} GFLOP/s, {ceilings.best_read_gbs:,.1f} GB/s at best{warning(others)}"
    )
    return grid


def draw(rows: list[Json], path: Path) -> None:
    """The share of the bound over the chunk's length, a line for each prefix, and the goal."""
    figure, axes = subplots()
    plain(axes)
    prefixes = dict.fromkeys(row["prefix"] for row in rows)
    for colour, prefix in zip(COLOURS, prefixes, strict=False):
        points = [(row["chunk"], row["of_bound"]) for row in rows if row["prefix"] == prefix]
        label = f"behind {tokens_label(prefix)} tokens" if prefix else "no prefix"
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
    axes.hlines(GOAL, *GOAL_CHUNKS, "black", "dashed", lw=1.2, label="goal")
    axes.set_xscale("log", base=2)
    chunks = sorted({row["chunk"] for row in rows})
    axes.set_xticks(chunks, [str(chunk) for chunk in chunks])
    axes.minorticks_off()
    axes.set_ylim(0, max(1.0, *(row["of_bound"] for row in rows)) * 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("tokens of the chunk")
    axes.set_ylabel("share of the best possible speed")
    axes.legend(frameon=False)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON and the figure beside it."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.small_chunks", description=__doc__.split("\n")[0])
    cli.add_argument("--model", choices=list(SIZES), default="28M")
    cli.add_argument("--chunks", nargs="+", type=int, default=list(CHUNKS), metavar="TOKENS")
    cli.add_argument("--prefixes", nargs="+", type=int, default=list(PREFIXES), metavar="TOKENS")
    cli.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    cli.add_argument("--sum-bytes", type=int, help="for the read ceiling (default: what the shortest chunk reads)")
    cli.add_argument("--out", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    threads, console = machine()["cores"], Console(width=110)
    torch.set_num_threads(threads)
    others_since = start_watch()
    rows, ceilings = run(args.model, args.chunks, args.prefixes, args.repeats, args.sum_bytes, console)
    others = others_since()
    about = {"dtype": "float32", "threads": threads, "other_load": others, "ceilings": asdict(ceilings)}
    write_json(args.out, about | {"rows": rows} | provenance())
    draw(rows, args.out.with_suffix(".png"))
    console.print(table(rows, ceilings, threads, others))


if __name__ == "__main__":
    main()
