"""The rate of a mixture of experts beside that of a dense model of the same active size, and of XLA's ragged product.

`python -m experiments.bench.experts` needs nothing but this project. All models have the same attention; a token of a
mixture goes through as many feed-forward units as one of the dense model, but of other experts than its neighbours.
They take turns in one process, so a ratio is of neighbours in time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.bench.work import prefill_flops
from experiments.harness.other_load import start_watch, warning
from experiments.harness.provenance import machine, provenance
from experiments.harness.report import make_table, write_json
from experiments.workloads.random_model import random_params
from model.batch import Batch
from model.config import ExpertsConfig, LayerKind, ModelConfig, RopeConfig
from model.decoder import forward
from model.kernels.dispatch import arranged
from model.kv import empty_pool
from model.params import Params, unstacked

RESULTS = Path("experiments/results/bench/experts.json")
PAGE = 64
GOAL = 0.6  # of the dense model's rate, in prefill

Json = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The shape of the models, and what is measured; lengths in tokens."""

    embed: int = 1024
    layers: int = 2
    heads: int = 8
    experts: int = 64
    per_token: int = 8
    expert_ffn: int = 384
    prompts: tuple[int, ...] = (256, 1024)
    repeats: int = 7


TINY = Sizes(embed=64, layers=2, heads=4, experts=8, per_token=2, expert_ffn=32, prompts=(32,), repeats=2)


def dense(sizes: Sizes) -> ModelConfig:
    """A model with as many feed-forward units as a token of the mixture goes through."""
    return ModelConfig(
        family="qwen3",
        vocab_size=256,
        embed_size=sizes.embed,
        ffn_size=sizes.per_token * sizes.expert_ffn,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.heads // 4,
        head_dim=sizes.embed // sizes.heads,
        max_position=4096,
        norm_eps=1e-6,
        rope=RopeConfig(),
        qk_norm=True,
        tie_embeddings=True,
    )


def mixture(sizes: Sizes) -> ModelConfig:
    """The mixture of experts."""
    return replace(
        dense(sizes),
        family="qwen3_moe",
        ffn_size=0,
        layers=(LayerKind(experts=True),) * sizes.layers,
        experts=ExpertsConfig(sizes.experts, sizes.per_token, sizes.expert_ffn),
    )


def passes(config: ModelConfig, params: Params, tokens: int) -> Callable[[], float]:
    """A call that runs a pass over so many new tokens of one sequence and returns its seconds; it has run once."""
    pool = [empty_pool(config, -(-tokens // PAGE), PAGE, jnp.float32)]
    step = jax.jit(partial(forward, config=config), donate_argnums=2)
    batch = Batch(
        tokens=np.random.default_rng(tokens).integers(0, config.vocab_size, tokens, dtype=np.int32),
        starts=np.asarray([0, tokens], np.int32),
        prefix=np.zeros(1, np.int32),
        block_table=np.arange(pool[0].num_pages, dtype=np.int32)[None],
        logit_indices=np.asarray([tokens - 1], np.int32),
        max_chunk=tokens,
    )

    def run() -> float:
        begin = time.perf_counter()
        logits, pool[0] = step(params, batch, pool[0])
        jax.block_until_ready(logits)
        return time.perf_counter() - begin

    run()
    return run


def measure(sizes: Sizes, console: Console) -> list[Json]:
    """A row for each prompt: FLOP/s of each model, median, and the mixture's share of the dense one's, by round."""
    models = {"dense": dense(sizes), "experts": mixture(sizes)}
    stacked = {name: random_params(config, jnp.dtype("float32")) for name, config in models.items()}
    by_xla = unstacked(stacked["experts"])
    packed = {name: arranged(params, PAGE) for name, params in stacked.items()}
    rows = []
    for prompt in (*sizes.prompts, 1):
        calls = {name: passes(models[name], packed[name], prompt) for name in models}
        calls["experts, XLA"] = passes(models["experts"], by_xla, prompt)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in track(range(sizes.repeats), description=f"{prompt} tokens", console=console):
            for name, call in calls.items():
                taken[name].append(call())
        flops = {name: prefill_flops(models[name.split(",")[0]], prompt) for name in calls}
        rate = {name: [flops[name] / seconds for seconds in taken[name]] for name in calls}
        ratios = [a / b for a, b in zip(rate["experts"], rate["dense"], strict=True)]
        rows.append(
            {
                "tokens": prompt,
                "ms": {name: [round(1e3 * s, 3) for s in seconds] for name, seconds in taken.items()},
                "gflops": {name: round(median(rates) / 1e9, 2) for name, rates in rate.items()},
                "of_dense": {"median": round(median(ratios), 3), "all": [round(ratio, 3) for ratio in ratios]},
            }
        )
    return rows


def table(rows: list[Json]) -> Table:
    """The rates for a terminal."""
    names = list(rows[0]["gflops"])
    grid = make_table(("new tokens", *(f"{name}, GFLOP/s" for name in names), "experts / dense"))
    for row in rows:
        rates = (f"{row['gflops'][name]:,.1f}" for name in names)
        grid.add_row(f"{row['tokens']:,}", *rates, f"{row['of_dense']['median']:.2f}")
    return grid


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.experts", description=__doc__.split("\n")[0])
    cli.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    cli.add_argument("--repeats", type=int, help=f"rounds (default: {Sizes.repeats})")
    cli.add_argument("--out", type=Path, default=RESULTS, help="(default: %(default)s)")
    args = cli.parse_args(argv)
    sizes, console = TINY if args.tiny else Sizes(), Console()
    sizes = replace(sizes, repeats=args.repeats or sizes.repeats)
    other_load = start_watch()
    rows = measure(sizes, console)
    share = other_load()
    result = {"dtype": "float32", "threads": machine()["cores"], "other_load": share, "goal": GOAL}
    write_json(args.out, result | {"sizes": asdict(sizes), "rows": rows} | provenance())
    console.print(table(rows), warning(share))


if __name__ == "__main__":
    main()
