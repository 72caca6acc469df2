"""Quantised weights: speed beside float32 and beside llama.cpp's Q8_0 and Q4_0, same shape, cores and run, in turns.

`python -m experiments.bench.quantized` needs the `llama-cpp` extra, whose installation compiles llama.cpp for this
machine, and the `test` extra. A random llama is quantised by `--quantize`'s rule for us and by llama.cpp's own tool for
it; keys and values are float32 on all sides. Random weights say nothing of quality: `experiments.quality` does.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.bench.llama_cpp import load_llama, need, run_llama, write_gguf
from experiments.bench.prefill_decode import PHASES, SIZES, Rates, make_engine, run_engine, speeds, write_llama
from experiments.harness.figures import COLOURS, panels, plain, save
from experiments.harness.other_load import start_watch, warning
from experiments.harness.provenance import PACKAGES, machine, provenance
from experiments.harness.report import make_table, write_json

RESULTS = Path("experiments/results/bench/quantized.json")
OURS = ("float32", "int8", "int4")
THEIRS = {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}  # by llama.cpp's constants
PAIRS = (("int8", "float32"), ("int4", "float32"), ("int8", "Q8_0"), ("int4", "Q4_0"))
GOALS = {"int8 / float32": 2.0, "int4 / float32": 2.8, "int8 / Q8_0": 0.9, "int4 / Q4_0": 0.9}  # of decode

Json = dict[str, Any]
Side = Callable[[np.ndarray, int], Rates]


def quantize_gguf(source: Path, target: Path, file_type: str) -> None:
    """Write a GGUF file of another type by llama.cpp's own quantisation. Raises RuntimeError if that fails."""
    llama_cpp = need("llama_cpp")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, file_type)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantise {source} as {file_type}")


def leave_out_extra_buffers() -> None:
    """Have llama.cpp load models without the buffers in which it repacks weights, for AMX or for wider products.

    In some virtual machines its AMX kernels end the process, though the processor names the feature.
    """
    bindings = need("llama_cpp.llama_cpp")
    defaults = bindings.llama_model_default_params

    def without() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    vars(bindings)["llama_model_default_params"] = without


def make_sides(folder: Path, tokens: int, threads: int) -> tuple[dict[str, list[Side]], list[Callable[[], None]], Json]:
    """The ways to run each side, what ends them, and the bytes of llama.cpp's files.

    llama.cpp has two ways, with flash attention and without, of which each phase takes the faster one.
    """
    sides: dict[str, list[Side]] = {}
    ends, sizes = [], {}
    for name in OURS:
        engine = make_engine(folder, tokens, None if name == "float32" else name)
        sides[name] = [partial(run_engine, engine)]
        ends.append(engine.stop)
    write_gguf(folder, folder / "model.gguf")
    for name, file_type in THEIRS.items():
        path = folder / f"{name}.gguf"
        quantize_gguf(folder / "model.gguf", path, file_type)
        sizes[name] = path.stat().st_size
        models = [load_llama(path, tokens, threads, flash) for flash in (False, True)]
        sides[name] = [partial(run_llama, model) for model in models]
    return sides, ends, sizes


def compare(name: str, prompt_tokens: int, output_tokens: int, repeats: int, threads: int, console: Console) -> Json:
    """All sides in turns on fresh prompts, after one warm-up each: tokens a second, and medians of ratios."""
    size, rng = SIZES[name], np.random.default_rng(0)
    total = prompt_tokens + output_tokens
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), size, total)
        sides, ends, sizes = make_sides(Path(folder), total, threads)
    rates: dict[str, list[Rates]] = {side: [] for side in sides}
    for number in track(range(repeats + 1), description=f"{name}, {prompt_tokens} tokens", console=console):
        prompt = rng.integers(3, size.vocab, prompt_tokens).astype(np.int32)
        for side, ways in sides.items():
            runs = [run(prompt, output_tokens) for run in ways]
            fastest = Rates(max(r.prefill for r in runs), max(r.decode for r in runs), runs[0].tokens)
            rates[side] += [fastest] if number else []
    for end in ends:
        end()
    found = {phase: ratios(rates, phase) for phase in PHASES}
    return {
        "model": name,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "gguf_bytes": sizes,
        "tokens_per_second": speeds(rates),
        "median_ratio": found,
        "goals": judged(found["decode"]),
    }


def ratios(rates: dict[str, list[Rates]], phase: str) -> dict[str, float]:
    """The medians over the prompts of the ratios of PAIRS."""
    speed = {side: [getattr(run, phase) for run in runs] for side, runs in rates.items()}
    return {
        f"{one} / {other}": round(median(a / b for a, b in zip(speed[one], speed[other], strict=True)), 3)
        for one, other in PAIRS
    }


def judged(decode: dict[str, float]) -> dict[str, Json]:
    """Each ratio of decode, its goal, and whether it is reached."""
    return {
        name: {"measured": decode[name], "at_least": goal, "reached": decode[name] >= goal}
        for name, goal in GOALS.items()
    }


def table(rows: list[Json], threads: int, others: float = 0.0) -> Table:
    """Medians of all sides, and the ratios; those of decode that miss their goal are marked."""
    pairs = [f"{one} / {other}" for one, other in PAIRS]
    title = f"tokens/s of quantised weights, {threads} threads; llama.cpp with or without flash attention, the faster"
    grid = make_table(("llama", "prompt", "phase", *OURS, *THEIRS, *pairs), words=("llama", "phase"), title=title)
    for row in rows:
        for phase in PHASES:
            found = row["median_ratio"][phase]
            missed = {name for name, goal in row["goals"].items() if phase == "decode" and not goal["reached"]}
            grid.add_row(
                row["model"],
                f"{row['prompt_tokens']:,}",
                phase,
                *(f"{median(row['tokens_per_second'][side][phase]):,.1f}" for side in (*OURS, *THEIRS)),
                *(f"{found[name]:.2f}{' missed' if name in missed else ''}" for name in pairs),
            )
    goals = ", ".join(f"{name} >= {goal}" for name, goal in GOALS.items())
    grid.caption = f"goals of decode: {goals}{warning(others)}"
    return grid


def draw(rows: list[Json], path: Path) -> None:
    """Bars of the tokens a second of all sides, decode and prefill beside each other."""
    figure, axes = panels(1, 2, 10, 4)
    labels = [f"{row['model']}, {row['prompt_tokens']:,}" for row in rows]
    sides = (*OURS, *THEIRS)
    width = 0.8 / len(sides)
    for each, phase in zip(axes, ("decode", "prefill"), strict=True):
        plain(each)
        for number, (side, colour) in enumerate(zip(sides, COLOURS, strict=False)):
            speed = [median(row["tokens_per_second"][side][phase]) for row in rows]
            places = np.arange(len(rows)) + (number - (len(sides) - 1) / 2) * width
            label = side if side in OURS else f"llama.cpp {side}"
            each.bar(places, speed, width * 0.9, color=colour, label=label)
        each.set_xticks(range(len(rows)), labels)
        each.set_xlabel("llama, tokens of its prompt")
        each.set_title(phase)
    axes[0].set_ylabel("tokens/s")
    axes[0].legend(frameon=False)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Compare, print the table, write the JSON and the figure beside it."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.quantized", description=__doc__.split("\n")[0])
    cli.add_argument("--models", nargs="+", choices=list(SIZES), default=["135M"])
    cli.add_argument("--prompts", nargs="+", type=int, default=[128, 1024], metavar="TOKENS")
    cli.add_argument("--output", type=int, default=48, metavar="TOKENS", help="tokens to decode (default: %(default)s)")
    cli.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    cli.add_argument(
        "--no-extra-buffers",
        action="store_true",
        help="llama.cpp without repacked weights, where its AMX kernels crash",
    )
    cli.add_argument("--out", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    for module in ("llama_cpp", "gguf"):
        need(module)
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    if args.no_extra_buffers:
        leave_out_extra_buffers()
    threads, console = machine()["cores"], Console(width=160)
    others_since = start_watch()
    rows = [
        compare(name, prompt, args.output, args.repeats, threads, console)
        for name in args.models
        for prompt in args.prompts
    ]
    others = others_since()
    about = {"kv": "float32", "threads": threads, "llama_cpp_repacks": not args.no_extra_buffers}
    about |= {"other_load": others, "rows": rows}
    write_json(args.out, about | provenance((*PACKAGES, "llama-cpp-python", "gguf")))
    draw(rows, args.out.with_suffix(".png"))
    console.print(table(rows, threads, others))


if __name__ == "__main__":
    main()
