"""Where the time of a decode step goes, compared with llama.cpp's and with reading what it must read.

`python -m experiments.bench.decode_step` needs the `test` extra, and for llama.cpp's bars the `llama-cpp` extra. The
engine decodes after a cached prompt; then the parts of its step are timed alone: the sampling, and the forward pass, of
which the profiler tells our kernels' share. What the engine takes beyond these two is its host and the hand-over of
tokens, where they do not overlap the device. All sides take turns on the same cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.bench.ceilings import read_gbs
from experiments.bench.kernel_share import kernel_share
from experiments.bench.llama_cpp import FLASH, OURS, PLAIN, continue_llama, load_llama, write_gguf
from experiments.bench.prefill_decode import SIZES, make_engine, write_llama
from experiments.bench.timing import Passes, StepParts, timed_tokens
from experiments.bench.work import kv_bytes, weight_bytes
from experiments.harness.figures import COLOURS, plain, save, subplots, tokens_label
from experiments.harness.other_load import start_watch, warning
from experiments.harness.provenance import PACKAGES, machine, provenance
from experiments.harness.report import make_table, write_json
from serve.engine.core import EngineCore

RESULTS = Path("experiments/results/bench/decode_step.json")
F32 = 4  # bytes a number
PARTS = {  # of an engine's step, which they add up to
    "kernels": "our kernels",
    "xla": "rest of the forward pass (XLA)",
    "sampling": "sampling",
    "rest": "rest: host, hand-over",
}
THREAD = ("schedule", "dispatch", "sample", "collect")  # what the engine's thread does in a turn
ALONE = 16  # steps timed alone in a round
GREY = "#999999"

Json = dict[str, Any]


def record_turns(core: EngineCore) -> list[dict[str, float]]:
    """A list that grows by one entry a turn of this engine: the seconds of each of `THREAD` on its thread.

    `schedule` is all that is not the others; `collect` is mostly the wait for the device.
    """
    turns: list[dict[str, float]] = []
    current: defaultdict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args)
            finally:
                current[name] += time.perf_counter() - begin

        return call

    turn = timed("turn", core.step)

    def recorded() -> None:
        current.clear()
        turn()
        others = {name: current[name] for name in THREAD[1:]}
        turns.append({"schedule": current["turn"] - sum(others.values())} | others)

    for owner, name, function in (
        *((core.runner, name, timed(name, getattr(core.runner, name))) for name in THREAD[1:]),
        (core, "step", recorded),
    ):
        setattr(owner, name, function)
    return turns


def split(step_ms: float, forward_ms: float, sampling_ms: float, share: float | None) -> dict[str, float]:
    """The parts of an engine's step, which add up to it unless its device parts alone take longer than all of it."""
    kernels = forward_ms * (share or 0.0)
    parts = {"kernels": kernels, "xla": forward_ms - kernels, "sampling": sampling_ms}
    return parts | {"rest": max(0.0, step_ms - sum(parts.values()))}


def medians_ms(times: list[dict[str, float]]) -> dict[str, float]:
    """By name, the median in milliseconds of all seconds."""
    return {name: round(1e3 * median(each[name] for each in times), 4) for name in times[0]}


def llama_decode_ms(model: Any, prompt: np.ndarray, count: int) -> float:
    """Milliseconds a token of llama.cpp, after a prompt whose keys and values it holds but for the last token's."""
    model.n_tokens = len(prompt) - 1
    return 1e3 / continue_llama(model, prompt[-1:], count).decode


def engine_decode_ms(engine: Any, prompt: np.ndarray, count: int) -> float:
    """Milliseconds a token of the engine, after a prompt that it may have cached."""
    sampled = timed_tokens(engine, prompt, count)
    return 1e3 * (sampled[-1][0] - sampled[0][0]) / (len(sampled) - 1)


def steps_alone(passes: Passes, context: int) -> list[StepParts]:
    """The parts of some decode steps after so many tokens."""
    return [passes.decode_parts(context) for _ in range(ALONE)]


def profile(name: str, contexts: list[int], output: int, repeats: int, threads: int, console: Console) -> list[Json]:
    """A model's rows, one a context."""
    size, total = SIZES[name], max(contexts) + output
    prompt = np.random.default_rng(0).integers(3, size.vocab, max(contexts) + 1).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_llama(Path(folder), size, total)
        engine = make_engine(Path(folder), total)
        stack.callback(engine.stop)
        llamas = {}
        if importlib.util.find_spec("llama_cpp"):
            write_gguf(Path(folder), Path(folder) / "model.gguf")
            llamas = {
                side: load_llama(Path(folder) / "model.gguf", total, threads, side == FLASH) for side in (PLAIN, FLASH)
            }
        passes, turns = Passes(engine, prompt), record_turns(engine.core)
        rows = []
        for context in contexts:
            sides: dict[str, list[float]] = {side: [] for side in (OURS, *llamas)}
            before, alone, read = prompt[:context], list[StepParts](), list[dict[str, float]]()
            needed = {"weights": weight_bytes(engine.config, F32), "kv": kv_bytes(engine.config, context, F32)}
            for model in llamas.values():
                model.reset()
                model.eval(before.tolist())
            for number in track(range(repeats + 1), f"{name}, {context} tokens", console=console):
                if number == 1:  # the first round has filled caches and warmed up
                    turns.clear()
                    alone.clear()
                    sides = {side: [] for side in sides}
                sides[OURS].append(engine_decode_ms(engine, before, output))
                for side, model in llamas.items():
                    sides[side].append(llama_decode_ms(model, before, output))
                alone += steps_alone(passes, context)
                read.append(read_gbs(int(sum(needed.values()))))
            share = kernel_share(partial(steps_alone, passes, context))
            rows.append(row(name, context, needed, sides, alone, turns, share, read))
    return rows


def row(
    name: str,
    context: int,
    needed: dict[str, float],
    sides: dict[str, list[float]],
    alone: list[StepParts],
    turns: list[dict[str, float]],
    share: float | None,
    read: list[dict[str, float]],
) -> Json:
    """What one context's measurements come to; times in milliseconds a token, medians."""
    gbs = max(rate for rates in read for rate in rates.values())
    bound, ours = sum(needed.values()) / gbs / 1e6, median(sides[OURS])
    parts_alone = medians_ms([asdict(parts) for parts in alone])
    parts = split(ours, parts_alone["forward"], parts_alone["sampling"], share)
    theirs = min((median(ms) for side, ms in sides.items() if side != OURS), default=None)
    return {
        "model": name,
        "context": context,
        "needed_mb": {kind: round(count / 1e6, 3) for kind, count in needed.items()},
        "read_gbs": round(gbs, 2),
        "bound_ms": round(bound, 3),
        "ms": {side: [round(each, 3) for each in ms] for side, ms in sides.items()},
        "parts_ms": {part: round(ms, 4) for part, ms in parts.items()},
        "kernels_share_of_forward": None if share is None else round(share, 3),
        "alone_ms": parts_alone,
        "engine_thread_ms": medians_ms(turns),
        "of_read_ceiling": round(bound / ours, 3),
        "llama_cpp_over_ours": None if theirs is None else round(theirs / ours, 3),
    }


def table(rows: list[Json], threads: int, others: float) -> Table:
    """Each step's parts, the whole, llama.cpp's two ways, the bound, and the work of the engine's thread."""
    columns = ("llama", "context", *PARTS, "step", PLAIN, "flash", "ratio", "bound", "of bound", "pack", *THREAD)
    title = f"ms of a decode step, float32, {threads} threads"
    grid = make_table(columns, words=("llama",), title=title)
    for row in rows:
        sides = {side: f"{median(ms):.2f}" for side, ms in row["ms"].items()}
        ratio = row["llama_cpp_over_ours"]
        grid.add_row(
            row["model"],
            f"{row['context']:,}",
            *(f"{row['parts_ms'][part]:.2f}" for part in PARTS),
            sides[OURS],
            sides.get(PLAIN, "-"),
            sides.get(FLASH, "-"),
            "-" if ratio is None else f"{ratio:.2f}",
            f"{row['bound_ms']:.2f}",
            f"{row['of_read_ceiling']:.0%}",
            f"{row['alone_ms']['pack']:.2f}",
            *(f"{row['engine_thread_ms'][part]:.2f}" for part in THREAD),
        )
    said = ", ".join(f"{key}: {text}" for key, text in PARTS.items())
    grid.caption = (
        f"{said}\nratio: the faster llama.cpp's ms over ours; bound: the bytes needed at the measured rate\n"
        f"{', '.join(THREAD)}: what the engine's thread does in a turn; collect is its wait for the device"
        f"{warning(others)}"
    )
    return grid


def draw(rows: list[Json], path: Path) -> None:
    """A stacked bar for each engine's step, beside it llama.cpp's faster way, and the bound as a line across both."""
    figure, axes = subplots()
    plain(axes)
    width = 0.36

    def label(at: int, text: str) -> str:
        return text if at == 0 else "_nolegend_"

    for at, row in enumerate(rows):
        bottom = 0.0
        for colour, (part, text) in zip(COLOURS, PARTS.items(), strict=False):
            ms = row["parts_ms"][part]
            axes.bar(at - width / 2, ms, width, bottom, color=colour, label=label(at, text))
            bottom += ms
        theirs = [median(ms) for side, ms in row["ms"].items() if side != OURS]
        if theirs:
            axes.bar(at + width / 2 + 0.02, min(theirs), width, color=GREY, label=label(at, "llama.cpp's faster way"))
        text = label(at, "reading weights, keys and values")
        axes.hlines(row["bound_ms"], at - width, at + width + 0.02, "black", "dashed", lw=1.2, label=text)
    names = [f"{row['model']}, {tokens_label(row['context'])}" for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("ms of a decode step")
    axes.legend(frameon=False)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON and the figure beside it."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.decode_step", description=__doc__.split("\n")[0])
    cli.add_argument("--models", nargs="+", choices=list(SIZES), default=["28M", "135M"])
    cli.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096], metavar="TOKENS")
    cli.add_argument("--output", type=int, default=48, metavar="TOKENS", help="tokens to decode (default: %(default)s)")
    cli.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    threads, console = machine()["cores"], Console(width=190)
    torch.set_num_threads(threads)
    others_since = start_watch()
    rows = [
        row for name in args.models for row in profile(name, args.contexts, args.output, args.repeats, threads, console)
    ]
    others = others_since()
    result = {"dtype": "float32", "threads": threads, "other_load": others, "rows": rows}
    write_json(args.out, result | provenance((*PACKAGES, "llama-cpp-python")))
    draw(rows, args.out.with_suffix(".png"))
    console.print(table(rows, threads, others))


if __name__ == "__main__":
    main()
