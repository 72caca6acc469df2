"""A hybrid beside a dense llama of equal size: prefill and decode of a long prompt, and where the hybrid's time goes.

`python -m experiments.bench.hybrid` needs nothing but this project. Of the hybrid's layers, three of four are gated
delta nets, which do not read the past. Both models take turns in one process, so a ratio is of neighbours in time.
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

from experiments.harness.other_load import start_watch, warning
from experiments.harness.provenance import machine, provenance
from experiments.harness.report import make_table, write_json
from experiments.workloads.random_model import random_params
from model import recurrent
from model.batch import Batch
from model.config import ATTENTION, DELTA_NET, LayerKind, ModelConfig, RecurrentConfig, RopeConfig
from model.decoder import forward, mlp
from model.kernels.dispatch import arranged
from model.kv import empty_pool
from model.linear_attention import recurrence
from model.memory import parameters
from model.params import Params
from model.states import empty_states

RESULTS = Path("experiments/results/bench/hybrid.json")
PAGE = 64
GOALS = {"prefill": 1.3, "decode": 1.2}  # times the dense model's speed

Json = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured; lengths in tokens. The dense model is the 28M llama of `prefill_decode.py`."""

    embed: int = 512
    layers: int = 8
    heads: int = 8
    ffn: int = 1408
    vocab: int = 8192
    prompt: int = 16_384
    chunk: int = 1024
    decoded: int = 32
    repeats: int = 5


TINY = Sizes(embed=64, layers=4, heads=4, ffn=128, vocab=256, prompt=256, chunk=64, decoded=4, repeats=1)


def dense(sizes: Sizes) -> ModelConfig:
    """The llama."""
    return ModelConfig(
        family="llama",
        vocab_size=sizes.vocab,
        embed_size=sizes.embed,
        ffn_size=sizes.ffn,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.heads // 2,
        head_dim=sizes.embed // sizes.heads,
        max_position=2 * sizes.prompt,
        norm_eps=1e-6,
        rope=RopeConfig(),
        tie_embeddings=True,
    )


def hybrid(sizes: Sizes) -> ModelConfig:
    """A model like Qwen3.5 of as many layers and heads, with a feed-forward size that gives it as many parameters."""
    plain, dim = dense(sizes), sizes.embed // sizes.heads
    made = replace(
        plain,
        family="qwen3_5_text",
        layers=tuple(LayerKind(mixer=DELTA_NET if (i + 1) % 4 else ATTENTION) for i in range(sizes.layers)),
        recurrent=RecurrentConfig(sizes.heads // 2, sizes.heads, dim, dim, conv_width=4),
        qk_norm=True,
        query_gate=True,
        centred_norms=True,
        rope=RopeConfig(partial=0.25),
    )
    more = parameters(made) - parameters(plain)
    return replace(made, ffn_size=made.ffn_size - round(more / (3 * sizes.embed * sizes.layers * 16)) * 16)


class Model:
    """A model with a pool for one sequence, and compiled steps."""

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        self.config, self.sizes = config, sizes
        self.params = arranged(random_params(config, jnp.dtype("float32")), PAGE)
        self.pool = empty_pool(config, -(-(sizes.prompt + sizes.chunk) // PAGE), PAGE, jnp.float32)
        self.states = empty_states(config, 1) if config.recurrent_layers else None
        self.step = jax.jit(self.forward, donate_argnums=(2, 3))

    def forward(self, params: Params, batch: Batch, pool: Any, states: Any) -> tuple[Any, ...]:
        """The logits of the last token, the pool and the states."""
        if states is None:
            return *forward(params, batch, pool, self.config), None
        return forward(params, batch, pool, self.config, None, states)

    def run(self, prefix: int, count: int) -> np.ndarray:
        """Seconds of a step over `count` new tokens, and those of all cores: [2] float64."""
        batch = Batch(
            tokens=np.random.default_rng(prefix).integers(0, self.config.vocab_size, count, dtype=np.int32),
            starts=np.asarray([0, count], np.int32),
            prefix=np.asarray([prefix], np.int32),
            block_table=np.arange(self.pool.num_pages, dtype=np.int32)[None],
            logit_indices=np.asarray([count - 1], np.int32),
            max_chunk=count,
            reads=np.zeros(1, np.int32),
            writes=np.zeros(1, np.int32),
        )
        begin = np.asarray([time.perf_counter(), time.process_time()])
        logits, self.pool, self.states = self.step(self.params, batch, self.pool, self.states)
        jax.block_until_ready(logits)
        taken: np.ndarray = np.asarray([time.perf_counter(), time.process_time()]) - begin
        return taken


def measure(sizes: Sizes, console: Console) -> Json:
    """Seconds of each model and phase by round, and the median ratios of the llama's to the hybrid's.

    Seconds of the cores are steadier than those of the clock where other programs run.
    """
    models = {"dense": Model(dense(sizes), sizes), "hybrid": Model(hybrid(sizes), sizes)}
    for model in models.values():
        for count in (sizes.chunk, 1):
            model.run(0, count)
    taken: dict[str, dict[str, list[np.ndarray]]] = {phase: {name: [] for name in models} for phase in GOALS}
    for _ in track(range(sizes.repeats), description=f"{sizes.prompt:,} tokens", console=console):
        chunks = {name: np.zeros(2) for name in models}
        for prefix in range(0, sizes.prompt, sizes.chunk):  # chunk by chunk in turns
            for name, model in models.items():
                chunks[name] += model.run(prefix, sizes.chunk)
        for name, model in models.items():
            taken["prefill"][name].append(chunks[name])
            steps = [model.run(sizes.prompt + i, 1) for i in range(sizes.decoded)]
            taken["decode"][name].append(np.median(steps, axis=0))
    ratios = {phase: np.median(np.divide(of["dense"], of["hybrid"]), axis=0) for phase, of in taken.items()}
    return {
        "parameters": {name: parameters(model.config) for name, model in models.items()},
        "seconds": {
            phase: {name: np.stack(rows).round(5).tolist() for name, rows in of.items()} for phase, of in taken.items()
        },
        "faster": {phase: ratio.round(3).tolist() for phase, ratio in ratios.items()},
        "parts": parts(models["hybrid"], sizes),
    }


def parts(model: Model, sizes: Sizes) -> dict[str, float]:
    """Median milliseconds of all cores for the parts of one recurrent layer over a chunk, each compiled by itself."""
    config, layer = model.config, model.params.runs[0]
    assert layer.recurrent is not None
    assert config.recurrent is not None
    weights, r, tokens = layer.recurrent, config.recurrent, sizes.chunk
    normal = partial(jax.random.normal, dtype=jnp.float32)
    x = normal(jax.random.key(1), (tokens, sizes.embed))
    conv, gates = normal(jax.random.key(2), (tokens, r.channels)), normal(jax.random.key(3), (tokens, 2 * r.heads))
    batch = Batch(
        tokens=np.zeros(tokens, np.int32),
        starts=np.asarray([0, tokens], np.int32),
        prefix=np.zeros(1, np.int32),
        block_table=np.zeros((1, 1), np.int32),
        logit_indices=np.zeros(1, np.int32),
        max_chunk=tokens,
    )
    lengths, state = jnp.full(1, tokens, jnp.int32), jnp.zeros((1, r.heads, r.key_dim, r.value_dim))
    past, real = jnp.zeros((1, r.conv_width - 1, r.channels)), jnp.ones(tokens, bool)
    inputs = recurrent.recurrence_inputs(weights, conv, gates, r)
    calls: dict[str, Callable[[], Any]] = {
        "projection": partial(jax.jit(lambda x: recurrent.project(weights, x, r)), x),
        "convolution": partial(jax.jit(lambda x: recurrent.convolution(weights, x, batch, past)), conv),
        "recurrence": partial(jax.jit(lambda inputs: recurrence(inputs, batch, lengths, state)), inputs),
        "norm and output": partial(
            jax.jit(lambda x, z: recurrent.finish(weights, x, z, r, 1e-6, jnp.dtype("float32"))),
            inputs.values,
            conv[:, : r.values],
        ),
        "feed-forward": partial(jax.jit(lambda x: mlp(layer, x, real, config, lambda y: y)), x),
    }
    found = {}
    for name, call in calls.items():
        times = []
        for _ in range(2 + 3 * sizes.repeats):
            begin = time.process_time()
            jax.block_until_ready(call())
            times.append(time.process_time() - begin)
        found[name] = round(1e3 * median(times[2:]), 3)
    return found


def table(result: Json) -> Table:
    """The medians for a terminal."""
    grid = make_table(("phase", "dense, ms", "hybrid, ms", "times as fast", "by seconds of cores", "goal"))
    for phase, of in result["seconds"].items():
        times = (f"{1e3 * np.median(of[name], axis=0)[0]:,.1f}" for name in ("dense", "hybrid"))
        grid.add_row(phase, *times, *(f"{ratio:.2f}" for ratio in result["faster"][phase]), str(GOALS[phase]))
    for name, ms in result["parts"].items():
        grid.add_row(name, "", f"{ms:.2f}", "", "", "")
    return grid


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.hybrid", description=__doc__.split("\n")[0])
    cli.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    cli.add_argument("--repeats", type=int, help=f"rounds (default: {Sizes.repeats})")
    cli.add_argument("--out", type=Path, default=RESULTS, help="(default: %(default)s)")
    args = cli.parse_args(argv)
    sizes, console = TINY if args.tiny else Sizes(), Console()
    sizes = replace(sizes, repeats=args.repeats or sizes.repeats)
    other_load = start_watch()
    result = measure(sizes, console)
    share = other_load()
    about = {"dtype": "float32", "threads": machine()["cores"], "other_load": share, "goals": GOALS}
    write_json(args.out, about | {"sizes": asdict(sizes)} | result | provenance())
    console.print(table(result), warning(share))


if __name__ == "__main__":
    main()
