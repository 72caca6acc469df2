"""What a choice of the router takes, and what its index takes up, with many replicas of a million pages each.

`python -m experiments.bench.router` needs no model. Every replica's region of the index is full, a part of it with
prompts that requests ask for, and each has prefills in flight. Updates are increments as replicas publish them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from serve.cost.model import Constants
from serve.router.request import RoutedRequest
from serve.router.router import Router
from serve.router.summary import Increment, Snapshot

RESULTS = Path("experiments/results/bench/router.json")
GOAL = {"p50_ms": 1.0, "p99_ms": 3.0, "bytes_a_page": 64.0}
COSTS = Constants(fixed=5e-3, linear=2.3e-5, attention=8.6e-10)


@dataclass(frozen=True)
class Config:
    """What is routed, and among which replicas."""

    replicas: int = 64
    pages: int = 1_000_000  # of each replica
    prompt: int = 52_000  # tokens
    page_sizes: tuple[int, ...] = (64, 16)
    prompts: int = 100  # that replicas hold a part of, by page size
    in_flight: int = 4  # prefills on each replica
    increment: int = 1024  # pages that come and go in one
    repeats: int = 1000


def draw(rng: np.random.Generator, pages: int) -> np.ndarray:
    """Keys of pages, [pages] uint64."""
    return rng.integers(0, 1 << 64, pages, dtype=np.uint64)


def shared_prompts(config: Config, rng: np.random.Generator) -> dict[int, list[np.ndarray]]:
    """Prompts by page size, each [pages] uint64; a third of each is the same system prompt."""
    made = {}
    for size in config.page_sizes:
        count = config.prompt // size + 1
        system = draw(rng, count // 3)
        made[size] = [np.concatenate([system, draw(rng, count - len(system))]) for _ in range(config.prompts)]
    return made


def fill(config: Config, prompts: dict[int, list[np.ndarray]], rng: np.random.Generator) -> Router:
    """A router whose replicas are full: all hold the system prompts, and four of them a part of each prompt."""
    router = Router()
    for number in range(config.replicas):
        router.add(f"r{number}", COSTS, config.pages)
    held: list[list[np.ndarray]] = [[] for _ in range(config.replicas)]
    for prompt in (each for many in prompts.values() for each in many):
        for number in range(config.replicas):
            held[number].append(prompt[: len(prompt) // 3])
        for number in rng.integers(0, config.replicas, 4).tolist():
            held[number].append(prompt[: rng.integers(len(prompt) // 3, len(prompt))])
    for number, parts in enumerate(held):
        known = np.unique(np.concatenate(parts))
        all_keys = np.concatenate([known, draw(rng, max(0, config.pages - len(known)))])
        router.published(f"r{number}", Snapshot(1, all_keys))
    return router


def ask(config: Config, id: str, keys: np.ndarray, size: int) -> RoutedRequest:
    """A request for a prompt."""
    return RoutedRequest(id, keys, config.prompt, size, agent=id)


def milliseconds(times: list[float]) -> dict[str, float]:
    """Median and 99th percentile of seconds, in milliseconds."""
    return {f"p{q}_ms": round(1e3 * float(np.percentile(times, q)), 3) for q in (50, 99)}


def time_choices(
    config: Config, router: Router, prompts: list[np.ndarray], size: int, rng: np.random.Generator
) -> dict[str, Any]:
    """The wall time and the CPU time of `route`, and the wall time of `sent`, which follows each."""
    routes, cpu, sends = [], [], []
    for i in range(config.repeats):
        asked = ask(config, f"{size}/{i}", prompts[rng.integers(len(prompts))], size)
        begin, used = time.perf_counter(), time.thread_time()
        choice = router.route(asked, 0.0)
        cpu.append(time.thread_time() - used)
        routes.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        router.sent(asked, choice, 0.0)
        sends.append(time.perf_counter() - begin)
        router.failed(asked.id, 0.0)
    return {"route": milliseconds(routes), "route_cpu": milliseconds(cpu), "sent": milliseconds(sends)}


def time_updates(config: Config, router: Router, rng: np.random.Generator) -> float:
    """Pages a second that increments add and remove."""
    changed, seconds = 0, 0.0
    before = {name: draw(rng, 0) for name in router.replicas}
    for sequence in (2, 3, 4):
        for name, removed in before.items():
            added = draw(rng, config.increment)
            begin = time.perf_counter()
            router.published(name, Increment(sequence, added, removed))
            seconds += time.perf_counter() - begin
            changed += len(added) + len(removed)
            before[name] = added
    return changed / seconds


def measure(config: Config) -> dict[str, Any]:
    """All figures."""
    rng = np.random.default_rng(0)
    prompts = shared_prompts(config, rng)
    begin = time.perf_counter()
    router = fill(config, prompts, rng)
    filled = time.perf_counter() - begin
    pages, size = sum(router.index.pages.values()), config.page_sizes[0]
    for number in range(config.replicas * config.in_flight):
        name = f"r{number % config.replicas}"
        asked = ask(config, f"busy{number}", draw(rng, config.prompt // size + 1), size)
        router.sent(asked, router.route(asked, 0.0, among=[name]), 0.0)
    choices = {str(each): time_choices(config, router, prompts[each], each, rng) for each in config.page_sizes}
    return {
        "pages": pages,
        "table_bytes": router.index.nbytes,
        "bytes_a_page": round(router.index.nbytes / pages, 1),
        "snapshot_pages_per_s": round(pages / filled),
        "increment_pages_per_s": round(time_updates(config, router, rng)),
        "choices_by_page_size": choices,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the goal, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.router", description=__doc__.split("\n")[0])
    cli.add_argument("--replicas", type=int, default=Config.replicas, help="(default: %(default)s)")
    cli.add_argument("--pages", type=int, default=Config.pages, help="of each replica (default: %(default)s)")
    cli.add_argument("--repeats", type=int, default=Config.repeats, help="(default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    config, console = Config(replicas=args.replicas, pages=args.pages, repeats=args.repeats), Console()
    result = measure(config)
    write_json(args.out, {"config": asdict(config), "goal": GOAL} | result | provenance())
    grid = make_table(("page size", "what", "p50 ms", "p99 ms"), words=("what",))
    for size, each in result["choices_by_page_size"].items():
        for what, times in each.items():
            grid.add_row(size, what, *(f"{value:.3f}" for value in times.values()))
    console.print(grid)
    console.print(
        f"{result['pages']:,} pages, {result['bytes_a_page']} bytes each; "
        f"{result['increment_pages_per_s']:,} pages a second of increments; goal: {GOAL}"
    )


if __name__ == "__main__":
    main()
