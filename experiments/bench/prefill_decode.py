"""Prefill and decode compared with transformers + torch: the same weights, cores and run, in turns.

`python -m experiments.bench.prefill_decode` needs the `test` extra. Ours runs in float32 through the engine, with
chunks, pages and sampling; torch runs transformers' own model with SDPA and its KV cache, in float32 and in bfloat16,
greedily, without the cost of `generate`. The machine's ceilings are measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.bench.ceilings import CUBES, SUM_BYTES, Ceilings, Shape, best, measure
from experiments.bench.timing import timed_tokens
from experiments.bench.work import kv_bytes, prefill_flops, weight_bytes
from experiments.harness.provenance import machine, provenance
from experiments.harness.report import make_table, write_json
from model import checkpoint
from model.config import ModelConfig
from model.kernels.dispatch import arranged
from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings

RESULTS = Path("experiments/results/bench/prefill_decode.json")
PHASES = ("prefill", "decode")
SIDES = {"tokenzero": 4, "torch f32": 4, "torch bf16": 2}  # bytes of each side's numbers
UNITS = {"gflops": "GFLOP/s", "gbs": "GB/s"}
WARM_UP = 1024  # tokens of the prompt that warms up, at most
# Prefill counts at 4K, against torch and against the matmul ceiling; of decode's two goals one is enough.
GOALS = {
    "prefill": {"torch f32": 1.8, "torch at best": 1.0, "of the ceiling at 4K": 0.75},
    "decode": {"torch f32": 1.3, "or of the ceiling": 0.85},
}


@dataclass(frozen=True)
class Size:
    """A llama's sizes; 64 channels a head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int


SIZES = {
    "28M": Size(512, 8, 8, 4, 1408, 8192),
    "95M": Size(768, 12, 12, 4, 2304, 16_384),
    "135M": Size(576, 30, 9, 3, 1536, 49_152),  # SmolLM2-135M's (https://huggingface.co/HuggingFaceTB/SmolLM2-135M)
}


@dataclass(frozen=True)
class Rates:
    """One side's speed on one prompt, in tokens per second, and what it generated."""

    prefill: float
    decode: float
    tokens: tuple[int, ...]


def write_llama(folder: Path, size: Size, max_position: int) -> LlamaForCausalLM:
    """A seeded random llama in float32, saved as a checkpoint; returns torch's copy."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=max_position,
        tie_word_embeddings=True,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def make_engine(folder: Path, tokens: int, quantize: str | None = None) -> Engine:
    """Our engine on the checkpoint, started, with room for one sequence of `tokens` and earlier ones."""
    config, params = checkpoint.load(folder, "float32", quantize=quantize)
    pages = 3 * (tokens // 64 + 2)
    settings = EngineSettings(num_pages=pages, max_model_len=tokens, max_num_seqs=1)
    engine = Engine(arranged(params, settings.page_size), config, settings)
    engine.start()
    return engine


def run_engine(engine: Engine, prompt: np.ndarray, count: int) -> Rates:
    """Prefill the prompt and decode `count` tokens, greedily, in the engine."""
    sampled = timed_tokens(engine, prompt, count)
    first, last = sampled[0][0], sampled[-1][0]
    return Rates(len(prompt) / first, (count - 1) / (last - first), tuple(token for _, token in sampled))


@torch.inference_mode()
def run_torch(model: LlamaForCausalLM, prompt: np.ndarray, count: int) -> Rates:
    """The same with transformers' model on torch."""
    begin = time.perf_counter()
    output = model(torch.tensor(prompt[None], dtype=torch.long), use_cache=True, logits_to_keep=1)
    tokens = [int(output.logits[0, -1].argmax())]
    first = time.perf_counter()
    while len(tokens) < count:
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        tokens.append(int(output.logits[0, -1].argmax()))
    end = time.perf_counter()
    return Rates(len(prompt) / (first - begin), (count - 1) / (end - first), tuple(tokens))


def compare(name: str, prompt_tokens: int, output_tokens: int, repeats: int, console: Console) -> dict[str, Any]:
    """All sides in turns on fresh prompts, after a warm-up each: tokens per second, and the work that they took."""
    size, rng = SIZES[name], np.random.default_rng(0)
    total = prompt_tokens + output_tokens
    with tempfile.TemporaryDirectory() as folder:
        model = write_llama(Path(folder), size, total)
        engine = make_engine(Path(folder), total)
    half: Any = copy.deepcopy(model)
    half.to(torch.bfloat16)
    sides: dict[str, Callable[[np.ndarray, int], Rates]] = {
        "tokenzero": lambda prompt, count: run_engine(engine, prompt, count),
        "torch f32": lambda prompt, count: run_torch(model, prompt, count),
        "torch bf16": lambda prompt, count: run_torch(half, prompt, count),
    }
    for run in sides.values():
        run(rng.integers(3, size.vocab, min(prompt_tokens, WARM_UP)).astype(np.int32), 4)
    rates: dict[str, list[Rates]] = {side: [] for side in sides}
    for _ in track(range(repeats), description=f"{name}, {prompt_tokens} tokens", console=console):
        prompt = rng.integers(3, size.vocab, prompt_tokens).astype(np.int32)
        for side, run in sides.items():
            rates[side].append(run(prompt, output_tokens))
    engine.stop()
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "same_output": agreed(rates["tokenzero"], rates["torch f32"]),
        "tokens_per_second": speeds(rates),
        "median_ratio": ratios(rates, "torch at best"),
        "work": work(engine.config, prompt_tokens, output_tokens),
    }


def agreed(ours: list[Rates], theirs: list[Rates]) -> str:
    """The number of prompts that both continue with the same tokens."""
    return f"{sum(a.tokens == b.tokens for a, b in zip(ours, theirs, strict=True))} of {len(ours)}"


def speeds(rates: dict[str, list[Rates]]) -> dict[str, dict[str, list[float]]]:
    """Tokens per second by side and phase, a number for each prompt."""
    return {
        side: {"prefill": [round(r.prefill, 1) for r in runs], "decode": [round(r.decode, 2) for r in runs]}
        for side, runs in rates.items()
    }


def ratios(rates: dict[str, list[Rates]], best: str) -> dict[str, dict[str, float]]:
    """The first side's ratios to the others and, under the name `best`, to the fastest: medians over the prompts."""
    ours, *others = rates
    made: dict[str, dict[str, float]] = {}
    for phase in PHASES:
        by_side = {side: [getattr(run, phase) for run in runs] for side, runs in rates.items()}
        found = {
            side: round(median(a / b for a, b in zip(by_side[ours], by_side[side], strict=True)), 3) for side in others
        }
        made[phase] = found | {best: found[max(others, key=lambda side: median(by_side[side]))]}
    return made


def work(config: ModelConfig, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    """GFLOP of the prefill, matrices and causal attention, and the MB that a decoded token reads at least, by side.

    A token reads the weights once, and the keys and values before it: of the prompt and half of the output, on average.
    """
    context = prompt_tokens + output_tokens / 2
    reads = {side: weight_bytes(config, width) + kv_bytes(config, context, width) for side, width in SIDES.items()}
    return {
        "prefill_gflop": round(prefill_flops(config, prompt_tokens) / 1e9, 3),
        "decode_mb": {side: round(read / 1e6, 3) for side, read in reads.items()},
    }


def with_ceilings(row: dict[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """The row with each side's median rates, and their shares of the machine's ceilings."""
    done: dict[str, Any] = {}
    for side, by_phase in row["tokens_per_second"].items():
        gflops = row["work"]["prefill_gflop"] * median(by_phase["prefill"]) / row["prompt_tokens"]
        read = row["work"]["decode_mb"][side] * median(by_phase["decode"]) / 1e3
        done[side] = {
            "prefill_gflops": round(gflops, 2),
            "of_matmul_ceiling": round(gflops / ceilings.best_gflops, 3),
            "decode_gbs": round(read, 2),
            "of_read_ceiling": round(read / ceilings.best_read_gbs, 3),
        }
    return row | {"achieved": done}


def products(size: Size, tokens: int) -> list[Shape]:
    """The matrix products of `tokens` tokens in a layer: queries, and both directions of the feed-forward."""
    return [(tokens, size.hidden, size.hidden), (tokens, size.hidden, size.ffn), (tokens, size.ffn, size.hidden)]


def table(rows: list[dict[str, Any]], ceilings: Ceilings, threads: int) -> Table:
    """Medians of all sides, our ratios to both of torch's, and shares of the ceilings."""
    columns = ("llama", "prompt", "phase", *SIDES, "/ f32", "/ bf16", "a second", "of the ceiling", "same output")
    title = f"tokens/s, tokenzero and transformers + torch (SDPA), {threads} threads"
    grid = make_table(columns, words=("llama", "phase"), title=title)
    for row in rows:
        ours = row["achieved"]["tokenzero"]
        for phase, unit, ceiling in (("prefill", "gflops", "of_matmul_ceiling"), ("decode", "gbs", "of_read_ceiling")):
            medians = (f"{median(row['tokens_per_second'][side][phase]):,.1f}" for side in SIDES)
            ratio = row["median_ratio"][phase]
            grid.add_row(
                row["model"],
                f"{row['prompt_tokens']:,}",
                phase,
                *medians,
                f"{ratio['torch f32']:.2f}",
                f"{ratio['torch bf16']:.2f}",
                f"{ours[f'{phase}_{unit}']:,.1f} {UNITS[unit]}",
                f"{ours[ceiling]:.0%}",
                row["same_output"],
            )
    flops, reads = (", ".join(f"{k} {v:,.1f}" for k, v in m.items()) for m in (ceilings.gflops, ceilings.read_gbs))
    goals = "; ".join(f"{phase} " + ", ".join(f"{k} {v}" for k, v in goal.items()) for phase, goal in GOALS.items())
    grid.caption = f"ceilings: float32 products {flops} GFLOP/s, sums {reads} GB/s\ngoals: {goals}"
    return grid


def repeats_of(prompt_tokens: int, repeats: int) -> int:
    """Fewer for prompts longer than 4,096 tokens, which take long."""
    return max(1, round(repeats * min(1.0, 4096 / prompt_tokens)))


def main(argv: list[str] | None = None) -> None:
    """Compare, print the table, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.prefill_decode", description=__doc__.split("\n")[0])
    cli.add_argument("--models", nargs="+", choices=list(SIZES), default=["28M", "95M"])
    cli.add_argument("--prompts", nargs="+", type=int, default=[4096, 16_384], metavar="TOKENS")
    cli.add_argument("--output", type=int, default=32, metavar="TOKENS", help="tokens to decode (default: %(default)s)")
    cli.add_argument("--repeats", type=int, default=5, help="prompts; fewer beyond 4,096 tokens (default: %(default)s)")
    cli.add_argument("--sum-bytes", type=int, default=SUM_BYTES, help="for the read ceiling (default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    threads = machine()["cores"]
    torch.set_num_threads(threads)
    console = Console(width=150)
    layers = [shape for name in args.models for shape in products(SIZES[name], min(1024, *args.prompts))]
    measured = [measure([*CUBES, *layers], sum_bytes=args.sum_bytes)]
    rows = []
    for name in args.models:
        for prompt in args.prompts:
            rows.append(compare(name, prompt, args.output, repeats_of(prompt, args.repeats), console))
            measured.append(measure([*CUBES, *layers], sum_bytes=args.sum_bytes))
    ceilings = best(measured)
    rows = [with_ceilings(row, ceilings) for row in rows]
    result = {"threads": threads, "ceilings": asdict(ceilings), "goals": GOALS, "rows": rows} | provenance()
    write_json(args.out, result)
    console.print(table(rows, ceilings, threads))


if __name__ == "__main__":
    main()
