"""The time to find a prompt's cached prefix as the cache grows to a million pages of many agents' sessions.

`python -m experiments.bench.index` needs no model: pages are numbers. The cache is filled as the engine fills it, with
sessions that share a prefix, continue and branch; then prompts of 52K tokens are matched, and grow by a chunk each
while the cache is full.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cache.pool import pages_for
from cache.prefix_cache import PrefixCache
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json

T = TypeVar("T")

RESULTS = Path("experiments/results/bench/index.json")
GOAL_MS = 2.0  # a match with a million pages, p99
VOCAB = 128_256
ARRAY_BYTES = sys.getsizeof(np.zeros(0, np.int32))  # of an array without its numbers


@dataclass(frozen=True)
class Config:
    """What the cache is filled with, and what is matched; lengths in tokens."""

    page: int = 64
    prompt: int = 52_000
    shared_prefix: int = 20_000  # of all sessions of one client and project
    sessions: int = 12  # with one shared prefix; each branches off the one before, in that prefix or after it
    chunk: int = 1024  # that a session grows by in a request
    repeats: int = 200

    @property
    def cases(self) -> dict[str, int]:
        """By name, how many tokens of a prompt match."""
        quarter = self.prompt // 4 // self.page * self.page
        middle = {"mid-page": 2 * quarter + self.page // 2 + 1}
        return {"hit": self.prompt, "25%": quarter, "50%": 2 * quarter, "75%": 3 * quarter, **middle, "miss": 0}


def draw(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Random token ids, [tokens] int32."""
    return rng.integers(0, VOCAB, tokens, dtype=np.int32)


def sessions_with_a_shared_prefix(config: Config, rng: np.random.Generator) -> list[np.ndarray]:
    """The prompts of the sessions with one shared prefix, [prompt] int32 each."""
    prompts = [draw(rng, config.prompt)]
    while len(prompts) < config.sessions:
        shared = int(rng.integers(config.shared_prefix, (config.shared_prefix + config.prompt) // 2))
        prompts.append(np.concatenate([prompts[-1][:shared], draw(rng, config.prompt - shared)]))
    return prompts


def request(store: PrefixCache, prompt: np.ndarray) -> None:
    """One request's calls on the cache, as the engine makes them."""
    lease, _ = store.extend(store.match(prompt[:-1]), len(prompt))
    store.insert(lease, prompt)
    store.release(lease)


def turns(config: Config, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless prompts: the sessions of a prefix take turns, each a chunk longer every time; then the next prefix."""
    while True:
        prompts = sessions_with_a_shared_prefix(config, rng)
        for end in range(config.shared_prefix, config.prompt + config.chunk, config.chunk):
            yield from (prompt[:end] for prompt in prompts)


def fill(config: Config, pages: int, progress: Progress) -> tuple[PrefixCache, list[np.ndarray]]:
    """A cache that is full except for room for one request, and some whole prompts in it."""
    rng = np.random.default_rng(0)
    store = PrefixCache(pages + pages_for(config.prompt + config.chunk, config.page) + 1, config.page)
    task = progress.add_task(f"filling {pages:,} pages", total=pages)
    whole: list[np.ndarray] = []
    for prompt in turns(config, rng):
        cached = store.pool.num_pages - store.pool.free_pages
        if cached >= pages:
            break
        progress.update(task, completed=cached)
        request(store, prompt)
        if len(prompt) == config.prompt and store.peek(prompt) == len(prompt):
            whole.append(prompt)
    progress.remove_task(task)
    return store, whole


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Milliseconds, and the result."""
    begin = time.perf_counter()
    made = function()
    return 1e3 * (time.perf_counter() - begin), made


def time_matches(store: PrefixCache, whole: list[np.ndarray], config: Config) -> dict[str, list[float]]:
    """Milliseconds of matching a prompt that is there up to each case's position; prompts and cases take turns."""
    rng = np.random.default_rng(1)
    times: dict[str, list[float]] = {case: [] for case in config.cases}
    for _ in range(config.repeats):
        for case, at in config.cases.items():
            prompt = whole[rng.integers(len(whole))].copy()
            if at < len(prompt):
                prompt[at:] = draw(rng, len(prompt) - at)
                prompt[at] = VOCAB  # an id that is never drawn: the match ends here
            ms, lease = timed(partial(store.match, prompt))
            assert lease.reused == at, f"{case}: {lease.reused} tokens matched, expected {at}"
            store.release(lease)
            times[case].append(ms)
    return times


def time_growth(store: PrefixCache, whole: list[np.ndarray], config: Config) -> dict[str, list[float]]:
    """Milliseconds of each step of a request that adds a chunk to a cached prompt, while the store is full."""
    rng = np.random.default_rng(2)
    filler = store.extend(store.match(draw(rng, 1)), store.pool.free_pages * config.page)[0]
    times: dict[str, list[float]] = {"match": [], "extend": [], "insert": [], "release": []}
    for _ in range(config.repeats):
        prompt = np.concatenate([whole[rng.integers(len(whole))], draw(rng, config.chunk)])
        evicted = store.stats().pages_evicted
        match_ms, lease = timed(partial(store.match, prompt[:-1]))
        extend_ms, (lease, _) = timed(partial(store.extend, lease, len(prompt)))
        insert_ms, _ = timed(partial(store.insert, lease, prompt))
        release_ms, _ = timed(partial(store.release, lease))
        assert store.stats().pages_evicted > evicted, "the store was not full: nothing was evicted"
        for step, ms in zip(times, (match_ms, extend_ms, insert_ms, release_ms), strict=True):
            times[step].append(ms)
    store.release(filler)
    return times


def tree_bytes(store: PrefixCache) -> int:
    """Bytes that tree and pool hold: arrays, each buffer once, nodes and their tables. Evicted ends still count."""
    pool, index = store.pool, store.tree
    buffers = {id(array): array.nbytes for array in (pool.ref_counts, pool.free_stack, index.held)}
    held = 0
    for node in index.nodes():
        held += sys.getsizeof(node) + sys.getsizeof(node.children) + 2 * ARRAY_BYTES
        for array in (node.tokens, node.pages):
            buffer = array if array.base is None else array.base
            buffers[id(buffer)] = buffer.nbytes
    return held + sum(buffers.values())


def quantiles(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and 99th percentile of each list."""
    return {name: {f"p{q}": round(float(np.percentile(ms, q)), 4) for q in (50, 99)} for name, ms in times.items()}


def measure(config: Config, pages: int, progress: Progress) -> dict[str, Any]:
    """One row: a cache of `pages` pages, filled, matched in and grown."""
    seconds, (store, whole) = timed(lambda: fill(config, pages, progress))
    nodes = sum(1 for _ in store.tree.nodes())
    cached = store.pool.num_pages - store.pool.free_pages
    return {
        "pages": cached,
        "tokens": cached * config.page,
        "nodes": nodes,
        "prompts": len(whole),
        "fill_s": round(seconds / 1e3, 1),
        "bytes_per_page": round(tree_bytes(store) / cached, 1),
        "match_ms": quantiles(time_matches(store, whole, config)),
        "growth_ms": quantiles(time_growth(store, whole, config)),
    }


def table(rows: list[dict[str, Any]], config: Config) -> Table:
    """p50 / p99 for a terminal."""
    columns = ("what", *(f"{row['pages']:,} pages" for row in rows))
    grid = make_table(columns, words=("what",), title=f"ms, p50 / p99; prompts of {config.prompt:,} tokens")
    for group, title in (("match_ms", "match, "), ("growth_ms", f"{config.chunk:,} more tokens, ")):
        for name in rows[0][group]:
            cells = (f"{row[group][name]['p50']:.3f} / {row[group][name]['p99']:.3f}" for row in rows)
            grid.add_row(title + name, *cells)
    grid.add_row("bytes a page", *(f"{row['bytes_per_page']:.0f}" for row in rows))
    grid.add_row("nodes", *(f"{row['nodes']:,}" for row in rows))
    return grid


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the goal, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.index", description=__doc__.split("\n")[0])
    cli.add_argument("--pages", nargs="+", type=int, default=[10**4, 10**5, 10**6], help="(default: %(default)s)")
    cli.add_argument("--prompt", type=int, default=Config.prompt, metavar="TOKENS", help="(default: %(default)s)")
    cli.add_argument(
        "--shared-prefix", type=int, default=Config.shared_prefix, metavar="TOKENS", help="(default: %(default)s)"
    )
    cli.add_argument("--repeats", type=int, default=Config.repeats, help="(default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    config, console = Config(prompt=args.prompt, shared_prefix=args.shared_prefix, repeats=args.repeats), Console()
    with Progress(console=console, transient=True) as progress:
        rows = [measure(config, pages, progress) for pages in args.pages]
    worst = max(ms["p99"] for ms in rows[-1]["match_ms"].values())
    goal = {"match_p99_ms": GOAL_MS, "slowest_case_p99_ms": worst}
    result = {"config": asdict(config), "cases": config.cases, "goal": goal, "rows": rows} | provenance()
    write_json(args.out, result)
    console.print(table(rows, config))
    console.print(
        f"goal: any match below {GOAL_MS} ms at the 99th percentile; with {rows[-1]['pages']:,} pages: {worst}"
    )


if __name__ == "__main__":
    main()
