"""Prefill and decode compared with llama.cpp: the same float32 weights, cores and run, in turns.

`python -m experiments.bench.llama_cpp` needs the `llama-cpp` extra, whose installation compiles llama.cpp for this
machine, and the `test` extra. The random llama is written as a GGUF file too; keys and values are float32 on both
sides, and llama.cpp runs with and without its flash attention.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.bench.prefill_decode import (
    PHASES,
    SIZES,
    Rates,
    agreed,
    make_engine,
    ratios,
    run_engine,
    speeds,
    write_llama,
)
from experiments.harness.other_load import start_watch, warning
from experiments.harness.provenance import PACKAGES, machine, provenance
from experiments.harness.report import make_table, write_json
from experiments.workloads.gguf_file import LLAMA_LAYER as LAYER
from experiments.workloads.gguf_file import add_shape, tensors_of, write_tensors

RESULTS = Path("experiments/results/bench/llama_cpp.json")
OURS, PLAIN, FLASH = "tokenzero", "llama.cpp", "llama.cpp, flash attention"
GOALS = {"prefill": 1.6, "decode": 1.05}  # times llama.cpp's, the faster of flash attention on and off
BATCH, MICRO_BATCH = 2048, 512  # llama.cpp's own defaults


def need(module: str) -> ModuleType:
    """The module; exits with the command that installs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        sys.exit(f"{module} is missing ({error}): pip install 'tokenzero[llama-cpp,test]', which compiles llama.cpp")


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection, [heads × head_dim, embed], as llama.cpp's rotary embedding pairs them.

    Hugging Face's llama rotates channel i of a head together with channel i + head_dim / 2, llama.cpp channel 2i with
    2i + 1, by the same angle. So row 2i comes from row i, and row 2i + 1 from row i + head_dim / 2: queries and keys
    are permuted alike and their products stay what they were.
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])  # [heads, 2, head_dim / 2, embed]
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def gguf_tensors(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF's name and values of every tensor of a llama's checkpoint, its queries and keys interleaved."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, weight in tensors_of(folder, config["num_hidden_layers"], LAYER):
        kind = name.split(".")[-2]
        yield name, interleaved(weight, heads[kind]) if kind in heads else weight


def write_gguf(folder: Path, path: Path) -> None:
    """Write a llama's checkpoint, one that `write_llama` has made, as a GGUF file in float32.

    It has no tokenizer, only a vocabulary size, since it is run on token ids.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = need("gguf").GGUFWriter(path, "llama")
    add_shape(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    write_tensors(writer, gguf_tensors(folder, config))


def load_llama(path: Path, tokens: int, threads: int, flash: bool, batch: int = BATCH) -> Any:
    """llama.cpp's model and context for one sequence of `tokens`, which it reads `batch` at a time."""
    llama_cpp = need("llama_cpp")
    return llama_cpp.Llama(
        str(path),
        n_ctx=tokens,
        n_batch=batch,
        n_ubatch=min(batch, MICRO_BATCH),
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=flash,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )


def run_llama(model: Any, prompt: np.ndarray, count: int) -> Rates:
    """Prefill the prompt and decode `count` tokens, greedily, in llama.cpp."""
    model.reset()
    return continue_llama(model, prompt, count)


def continue_llama(model: Any, prompt: np.ndarray, count: int) -> Rates:
    """The same after the `model.n_tokens` tokens whose keys and values llama.cpp holds."""
    read = need("llama_cpp").llama_get_logits_ith

    def likeliest() -> int:
        return int(np.ctypeslib.as_array(read(model.ctx, -1), (model.n_vocab(),)).argmax())

    begin = time.perf_counter()
    model.eval(prompt.tolist())
    tokens = [likeliest()]
    first = time.perf_counter()
    while len(tokens) < count:
        model.eval(tokens[-1:])
        tokens.append(likeliest())
    end = time.perf_counter()
    return Rates(len(prompt) / (first - begin), (count - 1) / (end - first), tuple(tokens))


def compare(
    name: str, prompt_tokens: int, output_tokens: int, repeats: int, threads: int, console: Console
) -> dict[str, Any]:
    """All sides in turns on fresh prompts, after one warm-up each; medians, and the medians of the pairs' ratios."""
    size, rng = SIZES[name], np.random.default_rng(0)
    total = prompt_tokens + output_tokens
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), size, total)
        write_gguf(Path(folder), Path(folder) / "model.gguf")
        engine = make_engine(Path(folder), total)
        plain, flash = (load_llama(Path(folder) / "model.gguf", total, threads, flash) for flash in (False, True))
    sides: dict[str, Callable[[np.ndarray, int], Rates]] = {
        OURS: lambda prompt, count: run_engine(engine, prompt, count),
        PLAIN: lambda prompt, count: run_llama(plain, prompt, count),
        FLASH: lambda prompt, count: run_llama(flash, prompt, count),
    }
    rates: dict[str, list[Rates]] = {side: [] for side in sides}
    for number in track(range(repeats + 1), description=f"{name}, {prompt_tokens} tokens", console=console):
        prompt = rng.integers(3, size.vocab, prompt_tokens).astype(np.int32)
        made = {side: run(prompt, output_tokens) for side, run in sides.items()}
        for side, result in made.items():
            rates[side] += [result] if number else []
    engine.stop()
    best = {phase: found["at best"] for phase, found in ratios(rates, "at best").items()}
    return {
        "model": name,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "same_output": {side: agreed(rates[OURS], rates[side]) for side in (PLAIN, FLASH)},
        "tokens_per_second": speeds(rates),
        "median_ratio": best,
        "goals": judged(best),
    }


def table(rows: list[dict[str, Any]], threads: int, others: float = 0.0) -> Table:
    """Medians of all sides, and our ratio to the faster of llama.cpp's flash attention on and off."""
    columns = ("llama", "prompt", "phase", OURS, PLAIN, FLASH, "ratio", "goal", "", "same output")
    title = f"tokens/s, tokenzero and llama.cpp, float32, {threads} threads"
    grid = make_table(columns, words=("llama", "phase", ""), title=title)
    for row in rows:
        for phase in PHASES:
            medians = (f"{median(row['tokens_per_second'][side][phase]):,.1f}" for side in (OURS, PLAIN, FLASH))
            goal = row["goals"][phase]
            grid.add_row(
                row["model"],
                f"{row['prompt_tokens']:,}",
                phase,
                *medians,
                f"{goal['measured']:.2f}",
                f">= {goal['at_least']}",
                "reached" if goal["reached"] else "missed",
                "; ".join(row["same_output"].values()),
            )
    grid.caption = "ratio: to the faster of llama.cpp's flash attention on and off" + warning(others)
    return grid


def judged(measured: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """By phase, our ratio to llama.cpp, its goal, and whether it is reached."""
    return {
        phase: {"measured": measured[phase], "at_least": goal, "reached": measured[phase] >= goal}
        for phase, goal in GOALS.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Compare, print the table, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.llama_cpp", description=__doc__.split("\n")[0])
    cli.add_argument("--models", nargs="+", choices=list(SIZES), default=["28M", "135M"])
    cli.add_argument("--prompts", nargs="+", type=int, default=[1024, 4096], metavar="TOKENS")
    cli.add_argument("--output", type=int, default=48, metavar="TOKENS", help="tokens to decode (default: %(default)s)")
    cli.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    for module in ("llama_cpp", "gguf"):
        need(module)
    threads, console = machine()["cores"], Console(width=150)
    others_since = start_watch()
    rows = [
        compare(name, prompt, args.output, args.repeats, threads, console)
        for name in args.models
        for prompt in args.prompts
    ]
    others = others_since()
    about = {"dtype": "float32", "threads": threads, "other_load": others, "rows": rows}
    write_json(args.out, about | provenance((*PACKAGES, "llama-cpp-python", "gguf")))
    console.print(table(rows, threads, others))


if __name__ == "__main__":
    main()
