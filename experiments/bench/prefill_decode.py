"""Prefill and decode beside transformers + torch: the same weights, cores and run, taking turns.

`python -m experiments.bench.prefill_decode` needs the `test` extra. Ours runs through the engine, with chunks, pages
and sampling; torch runs transformers' own model with SDPA and its KV cache, greedily, without the cost of `generate`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.bench.timing import timed_tokens
from experiments.provenance import machine, provenance
from model import checkpoint
from model.params import unstacked
from serve.engine import Engine, EngineSettings

RESULTS = Path("experiments/results/bench/prefill_decode.json")


@dataclass(frozen=True)
class Size:
    """A llama's sizes; 64 channels a head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int


SIZES = {"28M": Size(512, 8, 8, 4, 1408, 8192), "95M": Size(768, 12, 12, 4, 2304, 16384)}


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
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def make_engine(folder: Path, tokens: int) -> Engine:
    """Our engine on the checkpoint, started, with room for one sequence of `tokens` and what came before it."""
    config, params = checkpoint.load(folder, "float32")
    pages = 3 * (tokens // 64 + 2)
    engine = Engine(unstacked(params), config, EngineSettings(num_pages=pages, max_model_len=tokens, max_batch=1))
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
    """Both sides in turns on fresh prompts, after one warm-up each; medians, and the medians of the pairs' ratios."""
    size, rng = SIZES[name], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        total = prompt_tokens + output_tokens
        model = write_llama(Path(folder), size, total)
        engine = make_engine(Path(folder), total)
    sides: dict[str, Callable[[np.ndarray, int], Rates]] = {
        "tokenzero": lambda prompt, count: run_engine(engine, prompt, count),
        "torch": lambda prompt, count: run_torch(model, prompt, count),
    }
    rates: dict[str, list[Rates]] = {side: [] for side in sides}
    agreed = 0
    for number in track(range(repeats + 1), description=f"{name}, {prompt_tokens} tokens", console=console):
        prompt = rng.integers(3, size.vocab, prompt_tokens).astype(np.int32)
        made = {side: run(prompt, output_tokens) for side, run in sides.items()}
        if number:
            for side, result in made.items():
                rates[side].append(result)
            agreed += made["tokenzero"].tokens == made["torch"].tokens
    engine.stop()
    pairs = list(zip(rates["tokenzero"], rates["torch"], strict=True))
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "same_output": f"{agreed} of {repeats}",
        "tokens_per_second": {
            side: {"prefill": [round(r.prefill, 1) for r in runs], "decode": [round(r.decode, 2) for r in runs]}
            for side, runs in rates.items()
        },
        "median_ratio": {
            "prefill": round(median(a.prefill / b.prefill for a, b in pairs), 3),
            "decode": round(median(a.decode / b.decode for a, b in pairs), 3),
        },
    }


def table(rows: list[dict[str, Any]], threads: int) -> Table:
    """Medians of both sides and their ratios."""
    grid = Table(title=f"tokens/s beside transformers + torch (SDPA), float32, {threads} threads", box=SIMPLE_HEAD)
    for column in ("llama", "prompt", "phase", "tokenzero", "torch", "ratio", "same output"):
        grid.add_column(column, justify="left" if column in ("llama", "phase") else "right")
    for row in rows:
        for phase in ("prefill", "decode"):
            ours, theirs = (median(row["tokens_per_second"][side][phase]) for side in ("tokenzero", "torch"))
            ratio, same = row["median_ratio"][phase], row["same_output"]
            grid.add_row(
                row["model"], f"{row['prompt_tokens']:,}", phase, f"{ours:,.1f}", f"{theirs:,.1f}", f"{ratio:.2f}", same
            )
    return grid


def main(argv: list[str] | None = None) -> None:
    """Compare, print the table, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.prefill_decode", description=__doc__.split("\n")[0])
    cli.add_argument("--models", nargs="+", choices=list(SIZES), default=["28M"])
    cli.add_argument("--prompts", nargs="+", type=int, default=[4096], metavar="TOKENS")
    cli.add_argument("--output", type=int, default=64, metavar="TOKENS", help="tokens to decode (default: 64)")
    cli.add_argument("--repeats", type=int, default=7)
    cli.add_argument("--out", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    threads = machine()["cores"]
    torch.set_num_threads(threads)
    console = Console()
    rows = [
        compare(name, prompt, args.output, args.repeats, console) for name in args.models for prompt in args.prompts
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"dtype": "float32", "threads": threads, "rows": rows} | provenance()
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    console.print(table(rows, threads))


if __name__ == "__main__":
    main()
