"""The cost of saving pages for the requests that make them: cold prefill and decode with and without a store.

`python -m experiments.bench.write_back --model DIR --directory DIR`: two engines in one process, which differ only in
the store, answer the same fresh prompts in turn; the writer finishes between two prompts. The store is in
`--directory`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cache.tiers import Tiers
from experiments.bench.timing import timed_tokens
from experiments.harness.provenance import provenance
from experiments.harness.report import write_json
from model import checkpoint
from model.kernels.dispatch import arranged
from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings

RESULTS = Path("experiments/results/bench/write_back.json")
PAGE_TOKENS = 64


@dataclass(frozen=True)
class Config:
    """What is measured."""

    prompt_tokens: int = 8192
    output_tokens: int = 64
    rounds: int = 15
    store_bytes: int = 4 * 10**9


@dataclass(frozen=True)
class Answered:
    """One request: ms to its first token, and ms between each two that follow."""

    first_ms: float
    gaps_ms: tuple[float, ...]


def make_engines(folder: Path, config: Config, directory: Path) -> dict[str, Engine]:
    """The two engines on one checkpoint, started; their pools hold a few prompts, so that later ones evict."""
    shape, params = checkpoint.load(folder, "float32")
    longest = config.prompt_tokens + config.output_tokens
    settings = EngineSettings(num_pages=3 * (longest // PAGE_TOKENS + 2), max_model_len=longest, page_size=PAGE_TOKENS)
    fingerprint = checkpoint.fingerprint(shape, params)
    stores = {"without": None, "with": Tiers(str(directory), config.store_bytes, 0)}
    params = arranged(params, PAGE_TOKENS)
    engines = {name: Engine(params, shape, settings, fingerprint, tiers) for name, tiers in stores.items()}
    for engine in engines.values():
        engine.start()
    return engines


def ask(engine: Engine, tokens: np.ndarray, count: int) -> Answered:
    """Time one request of `tokens` ([tokens] int32) from its submission on; raises RuntimeError if it fails."""
    times = [1e3 * at for at, _ in timed_tokens(engine, tokens, count)]
    return Answered(times[0], tuple(float(gap) for gap in np.diff(times)))


def measure(engines: dict[str, Engine], config: Config, console: Console) -> dict[str, list[Answered]]:
    """All answers by engine; the first round, which warms up, is left out."""
    rng, order = np.random.default_rng(0), random.Random(0)
    answers: dict[str, list[Answered]] = {name: [] for name in engines}
    for number in track(range(config.rounds + 1), "measuring", console=console, transient=True):
        tokens = rng.integers(3, engines["with"].config.vocab_size, config.prompt_tokens).astype(np.int32)
        for name in order.sample(list(engines), len(engines)):
            answered = ask(engines[name], tokens, config.output_tokens)
            answers[name] += [answered] if number else []
            if tiers := engines[name].core.tiers:
                tiers.writer.flush()
    return answers


def summarise(answers: dict[str, list[Answered]]) -> dict[str, Any]:
    """Medians by engine, and of the ratios with over without, round by round."""
    arms = {}
    for name, answered in answers.items():
        gaps = [gap for a in answered for gap in a.gaps_ms]
        arms[name] = {
            "first_token_ms": round(median(a.first_ms for a in answered), 2),
            "between_tokens_ms": round(median(gaps), 3),
            "between_tokens_p99_ms": round(quantiles(gaps, n=100)[-1], 3),
            "first_tokens_ms": [round(a.first_ms, 2) for a in answered],
        }
    pairs = list(zip(answers["with"], answers["without"], strict=True))
    return {
        "arms": arms,
        "ratios": {
            "first_token": round(median(a.first_ms / b.first_ms for a, b in pairs), 4),
            "between_tokens": round(median(sum(a.gaps_ms) / sum(b.gaps_ms) for a, b in pairs), 4),
        },
    }


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    config, ratios = summary["config"], summary["ratios"]
    title = f"Cold prompts of {config['prompt_tokens']:,} tokens, {config['output_tokens']} sampled, ms"
    grid = Table("store", "first token", "between tokens", "p99", title=title, box=SIMPLE_HEAD)
    for name, arm in summary["arms"].items():
        cells = (arm["first_token_ms"], arm["between_tokens_ms"], arm["between_tokens_p99_ms"])
        grid.add_row(name, *(f"{ms:,.1f}" for ms in cells))
    grid.add_row("ratio", f"{ratios['first_token']:.3f}", f"{ratios['between_tokens']:.3f}", "")
    return grid


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.write_back", description=__doc__.split("\n")[0])
    cli.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    cli.add_argument("--directory", type=Path, help="on the disk to write to (default: the temp folder)")
    cli.add_argument("--prompt-tokens", type=int, default=Config.prompt_tokens)
    cli.add_argument("--rounds", type=int, default=Config.rounds)
    cli.add_argument("--out", type=Path, default=RESULTS, help=f"where the numbers go (default: {RESULTS})")
    args = cli.parse_args(arguments)
    config, console = Config(prompt_tokens=args.prompt_tokens, rounds=args.rounds), Console()
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        engines = make_engines(args.model, config, Path(folder))
        try:
            answers = measure(engines, config, console)
        finally:
            for engine in engines.values():
                engine.stop()
    summary = {"config": asdict(config), "dtype": "float32"} | summarise(answers) | provenance()
    write_json(args.out, summary)
    console.print(table(summary))
    console.print(f"numbers in {args.out}")


if __name__ == "__main__":
    main()
