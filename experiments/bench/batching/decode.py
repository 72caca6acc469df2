"""Aggregate decode throughput of several sessions, by how many run at once."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import jax.numpy as jnp
from rich.console import Console
from rich.progress import track

from cache.pool import pages_for
from experiments.bench.batching.setup import PAGE, Config, Json, drawing, rounded, started
from experiments.bench.timing import Asked
from experiments.workloads.random_model import random_params
from model.config import ModelConfig, RopeConfig
from model.kernels.dispatch import arranged
from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings

# The sizes of prefill_decode's llama of that name, which torch makes and this one does not.
MEDIUM = ModelConfig(
    family="llama",
    vocab_size=8192,
    embed_size=512,
    ffn_size=1408,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position=131_072,
    norm_eps=1e-6,
    rope=RopeConfig(),
    tie_embeddings=True,
)
SMALL = replace(MEDIUM, vocab_size=256, embed_size=64, ffn_size=128, num_layers=2, num_heads=4, num_kv_heads=2)
LLAMAS = {"28M": MEDIUM, "tiny": replace(SMALL, head_dim=16)}


def decode(config: Config, console: Console) -> Json:
    """Aggregate tokens per second of n sessions that decode after cached contexts, for each n in turn."""
    shape = LLAMAS[config.llama]
    params = arranged(replace(random_params(shape, jnp.dtype("float32")), lm_head=None), PAGE)
    most, length = max(config.sessions), config.context + config.output
    pages = (most + 1) * (pages_for(length, PAGE) + 1)
    chunk = min(config.chunk, config.context)
    settings = EngineSettings(pages, length, PAGE, max_num_seqs=most, max_prefill_tokens=chunk)
    draw = drawing(0, shape.vocab_size)
    contexts = [draw(config.context) for _ in range(most)]
    rates: dict[int, list[float]] = {n: [] for n in config.sessions}
    with started(Engine(params, shape, settings)) as engine:
        for _ in track(range(config.repeats), description="decode", console=console):
            for context in contexts:
                Asked(engine, context, 1).wait()
            for n in config.sessions:
                requests = [Asked(engine, context, config.output) for context in contexts[:n]]
                for request in requests:
                    request.wait()
                rates[n].append(window_rate(requests))
    rows = throughputs(rates)
    compared = config.sessions[0] == 1 and 8 in rows
    return {
        "llama": config.llama,
        "context": config.context,
        "sessions": rows,
        "eight_over_one": rows[8]["ratio"] if compared else None,
    }


def throughputs(rates: dict[int, list[float]]) -> dict[int, Json]:
    """By number of sessions: tokens a second of each round, their median, and the median ratio to the first number's.

    A ratio is taken within a round.
    """
    first, rows = next(iter(rates.values())), {}
    for n, measured in rates.items():
        ratio = median(a / b for a, b in zip(measured, first, strict=True))
        rows[n] = {"tokens_per_s": rounded(measured), "median": round(median(measured), 1), "ratio": round(ratio, 3)}
    return rows


def window_rate(requests: list[Asked]) -> float:
    """Tokens a second of all together, from where the last has begun to where the first has ended."""
    begin, end = max(r.times[0] for r in requests), min(r.times[-1] for r in requests)
    if end <= begin:
        raise ValueError("the requests never decoded together: raise --output")
    return sum(begin < at <= end for r in requests for at in r.times) / (end - begin)
