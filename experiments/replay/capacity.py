"""The hits of a cache of given capacity in a trace of calls: hit rates, reads per write, tokens and time saved."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cache.pool import pages_for
from cache.prefix_cache import PrefixCache
from experiments.harness.client import prompt_counts
from experiments.harness.report import make_table
from experiments.workloads.traces import Call
from serve.cost.model import Constants

COST_MODEL = Path("experiments/results/sweeps/position/cost_model.json")
PAGE_TOKENS = 64
CAPACITIES = (250_000, 500_000, 1_000_000, 2_000_000, 4_000_000)  # tokens
ALL_PAGES = 2**22  # 268M tokens: more than 10^5 calls of agents write


def replay(prompts: Iterable[np.ndarray], store: PrefixCache) -> np.ndarray:
    """Tokens of each prompt ([tokens] int32), and how many of them were cached: [calls, 2] int64.

    One prompt after another is matched, as the engine does it, and kept. Answers are not: the next prompt has them.
    Raises PoolExhausted for a prompt that is longer than the store.
    """
    found = []
    for tokens in prompts:
        lease = store.match(tokens[:-1])
        found.append((len(tokens), lease.reused))
        lease, _ = store.extend(lease, len(tokens))
        store.insert(lease, tokens)
        store.release(lease)
    return np.array(found, np.int64).reshape(-1, 2)


def ask(url: str, calls: Sequence[Call], speed: float, console: Console) -> np.ndarray:
    """Send the calls as text to a Messages endpoint: tokens and cached tokens by its usage, [calls, 2] int64.

    Each is sent at its time, `speed` times as fast, but after the answer to the one before. Raises httpx.HTTPError if
    the endpoint does not answer, or answers with an error.
    """
    found, start = [], time.monotonic()
    with httpx.Client(base_url=url, timeout=600, headers={"anthropic-version": "2023-06-01"}) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        for call in track(calls, "asking", console=console, transient=True):
            time.sleep(max(0.0, call.time_s / speed - (time.monotonic() - start)))
            messages = [{"role": "user", "content": call.text()}]
            answer = client.post("/v1/messages", json={"model": model, "max_tokens": 1, "messages": messages})
            found.append(prompt_counts(answer.raise_for_status().json()["usage"]))
    return np.array(found, np.int64).reshape(-1, 2)


def outcome(calls: Sequence[Call], found: np.ndarray, costs: Constants) -> dict[str, Any]:
    """A summary of `found` ([calls, 2] int64, see `replay`), as JSON values.

    Percentiles 5, 50 and 95 of the hit rates by call leave out the first call of each session.
    """
    tokens, reused = found.T
    _, firsts = np.unique([call.session for call in calls], return_index=True)
    rates = np.delete(reused / tokens, firsts)
    seconds: Any = costs.ttft_s(tokens, 0) - costs.ttft_s(tokens, reused)  # [calls] float64
    return {
        "hit_rate_by_call": np.percentile(rates, [5, 50, 95]).round(4).tolist() if len(rates) else None,
        "hit_rate": round(float(reused.sum() / tokens.sum()), 4),
        "reads_per_write": round(float(reused.sum() / (tokens - reused).sum()), 2),
        "tokens_saved": int(reused.sum()),
        "ms_saved_per_call": round(float(1000 * seconds.mean()), 1),
    }


def compare_capacities(
    calls: Sequence[Call], capacities: Sequence[int], costs: Constants, console: Console
) -> dict[str, Any]:
    """The calls' summary for each capacity in tokens that they exceed and for one that holds everything, as JSON.

    Headers stripped, and then kept where calls have one. Capacities below the longest prompt are left out.
    """

    def run(header: bool, store: PrefixCache) -> dict[str, Any]:
        name = f"{'kept' if header else 'stripped'}, {store.pool.num_pages * PAGE_TOKENS:,} tokens"
        prompts = (call.tokens(header) for call in track(calls, name, console=console, transient=True))
        return outcome(calls, replay(prompts, store), costs)

    store = PrefixCache(ALL_PAGES, PAGE_TOKENS)
    unlimited = run(False, store)
    # One more page: a partly filled page is copied before it is continued.
    needed = (ALL_PAGES - store.pool.free_pages + 1) * PAGE_TOKENS
    del store
    sizes = [size for size in sorted(capacities) if least_capacity(calls) <= size < needed]
    rows = [{"header": "stripped", "capacity": s, **run(False, sized_store(s))} for s in sizes]
    rows.append({"header": "stripped", "capacity": needed, **unlimited})
    if any(len(call.header) for call in calls):
        rows += [{"header": "kept", "capacity": s, **run(True, sized_store(s))} for s in (*sizes, needed)]
    return {
        "page_tokens": PAGE_TOKENS,
        "calls": len(calls),
        "tokens": sum(int(call.blocks[:, 1].sum()) for call in calls),
        "rows": rows,
    }


def sized_store(capacity: int) -> PrefixCache:
    """An empty cache with room for `capacity` tokens, in whole pages."""
    return PrefixCache(capacity // PAGE_TOKENS, PAGE_TOKENS)


def least_capacity(calls: Iterable[Call]) -> int:
    """Tokens that the longest prompt with its header needs, in whole pages, with one page for a copy."""
    longest = max(int(call.header[:, 1].sum() + call.blocks[:, 1].sum()) for call in calls)
    return (pages_for(longest, PAGE_TOKENS) + 1) * PAGE_TOKENS


def capacity_table(summary: dict[str, Any]) -> Table:
    """The summaries for a terminal."""
    title = f"{summary['calls']:,} calls, {summary['tokens'] / 1e6:,.0f}M tokens: the share that was cached"
    columns = ("header", "capacity", "5%", "50%", "95%", "all", "reads/write", "saved")
    grid = make_table(columns, no_wrap=True, title=title)
    for row in summary["rows"]:
        by_call = [f"{rate:.1%}" for rate in row["hit_rate_by_call"] or ()] or ["-"] * 3
        ends = (f"{row['hit_rate']:.1%}", f"{row['reads_per_write']:,.1f}", f"{row['ms_saved_per_call'] / 1000:,.2f} s")
        capacity = f"{row['capacity'] / 1e6:,.2f}M" if row["capacity"] else ""
        grid.add_row(row["header"], capacity, *by_call, *ends)
    grid.add_section()
    grid.add_row("published", "", "85%", "", "97%", "97.2%", "11.7", "")
    grid.caption = (
        "5, 50, 95%: percentiles by call, from a session's second on; saved: a call. Published: NVIDIA, coding agents; "
        "the 97.2% of four."
    )
    return grid
