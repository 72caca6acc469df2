"""Measure the kernels, the forward pass and the engine on this machine's GPU, against what the same GPU can do at best.

Run `python -m experiments.gpu_bench`: under nine minutes, nothing to download. Results and a picture go to
`experiments/results/gpu/` after every figure, so that a run that is cut short keeps what it has. `--smoke` runs the
same code at tiny sizes on the CPU and XLA's path, for `.cache/gpu_smoke`; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

# Before JAX takes most of the memory for itself: torch wants some.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments.gpu.figure import draw
from experiments.gpu.provenance import Json, provenance
from experiments.gpu.sections import SECTIONS, add_shares
from experiments.gpu.sizes import FULL, MODELS, SMOKE, Sizes
from experiments.harness.report import write_json

RESULTS = Path(__file__).parent / "results" / "gpu"
COMPILED = Path(".cache/gpu_bench")


def run(
    sizes: Sizes,
    smoke: bool,
    folder: Path,
    console: Console,
    only: tuple[str, ...] = (),
    revision: str | None = None,
) -> Json:
    """Run the sections in order, writing the result after each figure; a failure is recorded and does not end the run.

    So is a wrong result, which raises AssertionError at the end: that kernel's figures are void, but those of the
    others and of the baselines count.
    """
    start = time.perf_counter()
    result: Json = {"provenance": provenance(sizes, smoke, revision)}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in only or SECTIONS:
            task = progress.add_task(name, total=1)
            rows = result[name] = []
            for row in section(name, sizes, end=start + sizes.budget_s):
                add_shares(row, *result.get("ceilings", [])[:1])
                rows.append(row)
                console.print(f"{name}: {summary(row)}")
                result["provenance"]["seconds"] = round(time.perf_counter() - start, 1)
                save(result, folder)
            progress.update(task, completed=1)
    draw(result, folder / "gpu_bench.png")
    if wrong := [row["wrong"] for row in result.get("correctness", []) if "wrong" in row]:
        raise AssertionError("; ".join(wrong))
    return result


def section(name: str, sizes: Sizes, end: float) -> Iterator[Json]:
    """A section's figures as they come, until the time `end`; the last one may be a failure with its reason.

    A section runs in its own process: a kernel that faults loses only that process's GPU context, one that hangs can be
    ended, and no section inherits memory that another has fragmented.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, sizes, sender), daemon=True)
    process.start()
    sender.close()  # the process now holds the only one: the pipe ends with it
    limit = sizes.model_figure_s if name in ("forward", "arms") else sizes.figure_s
    try:
        while receiver.poll(max(0.0, min(limit, end - time.perf_counter()))):
            yield receiver.recv()
        yield {"failed": f"no figure within {limit:g} s, or the budget of {sizes.budget_s:g} s was spent"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"failed": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def measure(name: str, sizes: Sizes, sender: Connection) -> None:
    """The body of a section's process: send each figure, or what went wrong."""
    if jax.default_backend() == "gpu":  # so that a second run spends its minutes on measuring
        jax.config.update("jax_compilation_cache_dir", str(COMPILED))
    try:
        for row in SECTIONS[name](sizes):
            sender.send(row)
    except Exception as error:  # such as a GPU with too little memory
        sender.send({"failed": f"{type(error).__name__}: {error}"})


def summary(row: Json) -> str:
    """A measurement in a few words."""
    words = [f"{key} {value}" for key, value in row.items() if isinstance(value, int | str)]
    words += [f"largest error {row['largest_error']:.1e}"] if "largest_error" in row else []
    words += [f"{row['seconds'] * 1e3:.2f} ms"] if "seconds" in row else []
    words += [f"{row['flops'] / 1e12:.0f} TFLOP/s"] if "flops" in row else []
    words += [f"{row['bytes_per_s'] / 1e9:.0f} GB/s"] if "bytes_per_s" in row else []
    return ", ".join(words)


def save(result: Json, folder: Path) -> None:
    """Write the numbers."""
    write_json(folder / "gpu_bench.json", result)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu_bench", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs; on CPUs as well")
    parser.add_argument("--model", default="llama-8b", choices=list(MODELS), help="shape (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=(), choices=list(SECTIONS), help="run these sections")
    default = "experiments/results/gpu, or a folder of the model's name in it"
    parser.add_argument("--out", type=Path, help=f"folder of the results (default: {default})")
    parser.add_argument("--redraw", action="store_true", help="only draw the folder's results again")
    parser.add_argument("--commit", help="the commit that is measured, on a machine without git or a checkout")
    args = parser.parse_args(argv)
    console = Console()
    if args.redraw:
        folder = args.out or RESULTS
        draw(json.loads((folder / "gpu_bench.json").read_text(encoding="utf-8")), folder / "gpu_bench.png")
        return
    if not args.smoke and jax.default_backend() != "gpu":
        parser.error(f"there is no GPU, JAX found {jax.default_backend()}: use --smoke to try the script")
    full, tiny = MODELS[args.model]
    sizes = replace(SMOKE, model=tiny) if args.smoke else replace(FULL, model=full)
    if args.smoke and jax.default_backend() == "gpu":
        sizes = replace(sizes, dtype="bfloat16", page=64)
    results = RESULTS if full is FULL.model else RESULTS / args.model
    folder = args.out or (Path(".cache/gpu_smoke") if args.smoke else results)
    run(sizes, args.smoke, folder, console, tuple(args.only), args.commit)
    console.print(f"results: {folder / 'gpu_bench.json'}")


if __name__ == "__main__":
    main()
