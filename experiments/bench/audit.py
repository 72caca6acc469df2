"""The auditor's cost for the requests of a loaded engine: time to first token and between tokens, with and without it.

`python -m experiments.bench.audit --model DIR`: in each round a few concurrent sessions ask an engine turn by turn,
each some seconds after its last answer, with a growing prefix. A round runs once for each arm (condition), in random
order, on fresh texts: twice without an auditor, once with its default share of the device, and once with a share of 1,
so that it uses every idle moment. Ratios are taken within a round; those of the two arms without an auditor are the
noise.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.bench.timing import Asked
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from model import checkpoint
from model.kernels.dispatch import arranged
from serve.audit.auditor import Auditor, AuditSettings, attach, audit_pages
from serve.engine.engine import Engine
from serve.engine.runtime import set_up_jax
from serve.engine.settings import EngineSettings

RESULTS = Path("experiments/results/bench/audit.json")
PAGE_TOKENS = 64
# The share of the device in each arm.
ARMS = {"off": 0.0, "off again": 0.0, "default": AuditSettings.share, "always": 1.0}
FIGURES = ("ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "itl_p99_ms")

Json = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """The load."""

    rounds: int = 8
    sessions: int = 3
    turns: int = 5
    prefix: int = 4096  # tokens of a session's first prompt
    more: int = 96  # tokens that each further turn adds to prompt and answer
    output: int = 32
    pause: float = 1.0  # seconds between an answer and the next request, on average


@dataclass(frozen=True)
class Round:
    """What one arm measured in one round."""

    ttft_ms: tuple[float, ...]
    gaps_ms: tuple[float, ...]
    audited_tokens: int
    audit_seconds: float


def make_engine(folder: Path, config: Config) -> Engine:
    """An engine on a checkpoint with an auditor, not started; its pool holds the sessions of two rounds."""
    shape, params = checkpoint.load(folder, "float32")
    longest = config.prefix + config.turns * (config.more + config.output)
    pages = 2 * config.sessions * (longest // PAGE_TOKENS + 2)
    audit = AuditSettings()
    own = audit_pages(64 * (audit.max_tokens // PAGE_TOKENS + 2), PAGE_TOKENS, audit)
    settings = EngineSettings(pages, longest, PAGE_TOKENS, audit_pages=own)
    engine = Engine(arranged(params, PAGE_TOKENS), shape, settings, checkpoint.fingerprint(shape, params))
    attach(engine, audit)
    return engine


def session(engine: Engine, config: Config, seed: Sequence[int], pauses: Sequence[float]) -> list[Asked]:
    """Ask turn by turn; each prompt is the last one, its answer and new tokens."""
    rng, vocab = np.random.default_rng(seed), engine.config.vocab_size - 16  # special tokens come last
    tokens, done = rng.integers(0, vocab, config.prefix).astype(np.int32), list[Asked]()
    for pause in pauses:
        asked = Asked(engine, tokens, config.output)
        asked.wait()
        done.append(asked)
        new = rng.integers(0, vocab, config.more)
        tokens = np.concatenate([tokens, asked.tokens, new]).astype(np.int32)
        time.sleep(pause)
    return done


def run(engine: Engine, config: Config, number: int, arm: str) -> Round:
    """One round of one arm, with an auditor of its own. Pauses are the round's, texts the arm's.

    Raises RuntimeError if an audit fails or finds something wrong.
    """
    settings, share = engine.settings, replace(AuditSettings(), share=ARMS[arm])
    pool, chunk = engine.core.memory.pool, settings.max_mixed_prefill_tokens
    auditor = Auditor(share, engine.core.programs, pool, settings.audit_pages, settings.dtype, chunk)
    engine.idle_work = auditor
    waits = np.random.default_rng(number).exponential(config.pause, (config.sessions, config.turns))
    seeds = [[number, list(ARMS).index(arm), i] for i in range(config.sessions)]
    with ThreadPoolExecutor(config.sessions) as threads:
        sessions = threads.map(lambda seed, pauses: session(engine, config, seed, pauses), seeds, waits.tolist())
        asked = [each for done in sessions for each in done]
    if auditor.mismatches or auditor.failures:
        raise RuntimeError("an audit failed or found a mismatch: see the log above for its sequence")
    gaps = [1e3 * float(gap) for each in asked for gap in np.diff(each.times)]
    return Round(tuple(1e3 * a.ttft for a in asked), tuple(gaps), auditor.tokens, auditor.seconds)


def measure(engine: Engine, config: Config, console: Console) -> dict[str, list[Round]]:
    """All rounds by arm; the first one, which warms up, is left out."""
    order = random.Random(0)
    rounds: dict[str, list[Round]] = {arm: [] for arm in ARMS}
    for number in track(range(config.rounds + 1), "measuring", console=console, transient=True):
        for arm in order.sample(list(ARMS), len(ARMS)):
            found = run(engine, config, number, arm)
            rounds[arm] += [found] if number else []
    return rounds


def figures(found: Round) -> dict[str, float]:
    """The figures of one round."""
    ttft, gaps = np.percentile(found.ttft_ms, (50, 95)), np.percentile(found.gaps_ms, (50, 99))
    return dict(zip(FIGURES, map(float, (*ttft, *gaps)), strict=True))


def summarise(rounds: dict[str, list[Round]]) -> Json:
    """Medians by arm, and the ratios to the arm without an auditor, round by round.

    A ratio is within the noise if it lies between the least and the largest one of the second arm without an auditor.
    """
    by_arm = {arm: [figures(found) for found in measured] for arm, measured in rounds.items()}
    arms: Json = {}
    for arm, measured in by_arm.items():
        ratios = {f: [a[f] / b[f] for a, b in zip(measured, by_arm["off"], strict=True)] for f in FIGURES}
        arms[arm] = {
            "share": ARMS[arm],
            "audited_tokens": sum(found.audited_tokens for found in rounds[arm]),
            "audit_seconds": round(sum(found.audit_seconds for found in rounds[arm]), 3),
            **{f: round(median(m[f] for m in measured), 3) for f in FIGURES},
            "over_off": {f: round(median(ratios[f]), 4) for f in FIGURES},
            "over_off_rounds": {f: [round(ratio, 4) for ratio in ratios[f]] for f in FIGURES},
        }
    noise = arms["off again"]["over_off_rounds"]
    for arm in arms.values():
        arm["within_noise"] = {f: min(noise[f]) <= arm["over_off"][f] <= max(noise[f]) for f in FIGURES}
    return {"arms": arms}


def table(summary: Json) -> Table:
    """The summary for a terminal: each figure, and its median ratio to the first arm."""
    config = summary["config"]
    title = f"{config['sessions']} sessions at once, {config['turns']} turns each after {config['prefix']:,} tokens; ms"
    caption = "*: not within the noise of the two arms that are off"
    columns = ("auditor", "TTFT p50", "TTFT p95", "ITL p50", "ITL p99", "audited tokens")
    grid = make_table(columns, words=("auditor",), no_wrap=True, title=title, padding=0, caption=caption)
    for name, arm in summary["arms"].items():
        marks = {f: "" if arm["within_noise"][f] else "*" for f in FIGURES}
        cells = (f"{arm[f]:,.1f} {arm['over_off'][f]:.2f}x{marks[f]}" for f in FIGURES)
        grid.add_row(name, *cells, f"{arm['audited_tokens']:,}")
    return grid


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.audit", description=__doc__.split("\n")[0])
    cli.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    for name, value in asdict(Config()).items():
        text = f"default: {value}"
        cli.add_argument(f"--{name}", type=type(value), default=value, help=text)
    cli.add_argument("--out", type=Path, default=RESULTS, help=f"where the numbers go (default: {RESULTS})")
    args, console = cli.parse_args(arguments), Console()
    config = Config(**{name: getattr(args, name) for name in asdict(Config())})
    set_up_jax()
    engine = make_engine(args.model, config)
    engine.start()
    try:
        rounds = measure(engine, config, console)
    finally:
        engine.stop()
    summary = {"config": asdict(config), "dtype": "float32"} | summarise(rounds) | provenance()
    write_json(args.out, summary)
    console.print(table(summary))
    console.print(f"numbers in {args.out}")


if __name__ == "__main__":
    main()
