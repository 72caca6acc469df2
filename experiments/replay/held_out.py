"""Eviction rules compared on recorded agents: shares of prompt tokens found, by budget, with intervals.

The rules' constants were chosen on one half of the sessions; what is reported is of the other half.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.harness.figures import COLOURS, save, subplots
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.replay.eviction import POLICIES, Policy, replay_optimum, replay_rule, replay_session_optimum
from experiments.replay.recorded import Arrival, at_work, halves, read_recorded

BUDGETS = (1_000_000, 1_500_000, 2_000_000, 4_100_000, 8_200_000)  # tokens
RESAMPLES = 2000
OPTIMA: dict[str, Callable[[Sequence[Arrival], int], np.ndarray]] = {
    "optimum by session": replay_session_optimum,
    "optimum by page": replay_optimum,
}
NAMES = (*(policy.name for policy in POLICIES), *OPTIMA)


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    seats: int = 40  # sessions at a time
    sessions: int = 230  # of the half that is reported on
    seed: int = 1  # of the halves
    half: str = "held out"  # or "chosen on"


class Work:
    """The requests that are replayed; a process that is forked has them, too."""

    arrivals: Sequence[Arrival] = ()
    page_tokens: int = 64


def found(name: str, budget: int) -> np.ndarray:
    """Pages of each prompt that are found under a policy, [arrivals] int64."""
    pages, policies = budget // Work.page_tokens, {policy.name: policy for policy in POLICIES}
    policy: Policy | None = policies.get(name)
    if policy:
        return replay_rule(Work.arrivals, pages, policy, Work.page_tokens)
    return OPTIMA[name](Work.arrivals, pages)


def by_session(arrivals: Sequence[Arrival], values: Sequence[int] | np.ndarray) -> np.ndarray:
    """Sums of the arrivals' values, [sessions] int64."""
    sessions = np.array([arrival.session for arrival in arrivals])
    return np.bincount(sessions, np.asarray(values, float)).astype(np.int64)


def intervals(asked: np.ndarray, hits: dict[str, np.ndarray], seed: int = 0) -> dict[str, Any]:
    """Share found, and points over LRU with their interval of 95%, of each policy; by resampling sessions.

    `asked` and `hits` are pages by session, [sessions] int64.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(asked), size=(RESAMPLES, len(asked)))  # [resamples, sessions]
    totals = asked[drawn].sum(1)
    rows = {}
    for name, found in hits.items():
        gains = 100 * (found - hits["LRU"])[drawn].sum(1) / totals
        low, high = np.percentile(gains, [2.5, 97.5])
        rows[name] = {
            "found": round(float(100 * found.sum() / asked.sum()), 2),
            "over_lru": round(float(100 * (found - hits["LRU"]).sum() / asked.sum()), 2),
            "interval": [round(float(low), 2), round(float(high), 2)],
        }
    return rows


def compare(path: Path, plan: Plan, budgets: Sequence[int], jobs: int, out: Path, console: Console) -> dict[str, Any]:
    """Replay one half of the sessions under every policy; print a table, write the picture and the summary."""
    problems: list[str] = []
    chosen_on, held_out = halves(read_recorded(path, problems), plan.seed)
    sessions = (held_out if plan.half == "held out" else chosen_on)[: plan.sessions]
    Work.arrivals, Work.page_tokens = at_work(sessions, plan.seats), sessions[0].page_tokens
    asked = [len(arrival.pages) for arrival in Work.arrivals]
    tasks = [(name, budget) for budget in budgets for name in NAMES]
    pool: Any = nullcontext()
    if jobs > 1:
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"))  # the arrivals are not copied
    with pool as executor:
        results = found_by(tasks, executor, console)
    rows = []
    for budget in budgets:
        hits = {name: by_session(Work.arrivals, results[name, budget]) for name in NAMES}
        rows.append({"budget": budget, "policies": intervals(by_session(Work.arrivals, asked), hits)})
    summary = {
        "half": plan.half,
        "sessions": len(sessions),
        "at_once": plan.seats,
        "requests": len(asked),
        "tokens": sum(asked) * Work.page_tokens,
        "skipped": len(problems),
        "budgets": rows,
        **provenance(("tokenzero", "numpy")),
    }
    write_json(out / "eviction.json", summary)
    draw(summary, out / "eviction.png")
    console.print(table(summary))
    return summary


def found_by(
    tasks: Sequence[tuple[str, int]], executor: Executor | None, console: Console
) -> dict[tuple[str, int], np.ndarray]:
    """The pages found of each task, a policy and a budget."""
    results = (executor.map if executor else map)(found, *zip(*tasks, strict=True))
    return dict(zip(tasks, track(results, "replaying", len(tasks), console=console, transient=True), strict=True))


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    title = (
        f"Prompt tokens found, %: {summary['requests']:,} requests of {summary['sessions']} sessions "
        f"({summary['half']}), {summary['at_once']} at once"
    )
    grid = make_table(("budget", *NAMES), title=title)
    for row in summary["budgets"]:
        cells = []
        for name in NAMES:
            cell = row["policies"][name]
            low, high = cell["interval"]
            cells.append(f"{cell['found']:.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if name != "LRU" else ""))
        grid.add_row(f"{row['budget'] / 1e6:.1f}M", *cells)
    grid.caption = "in brackets: points over LRU, 95% of resampled sessions"
    return grid


def draw(summary: dict[str, Any], path: Path) -> None:
    """Points over LRU by budget, with intervals, one line a policy."""
    figure, axes = subplots(3.8, 7)
    budgets = [row["budget"] / 1e6 for row in summary["budgets"]]
    shown = [name for name in NAMES if name != "LRU"]
    for name, colour in zip(shown, [*COLOURS, "#666666", "#999999"], strict=False):
        rows = [row["policies"][name] for row in summary["budgets"]]
        gains = np.array([row["over_lru"] for row in rows])
        spread = np.abs(np.array([row["interval"] for row in rows]).T - gains)
        axes.errorbar(budgets, gains, spread, marker="o", markersize=4, capsize=2, color=colour, label=name)
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{budget:g}M" for budget in budgets])
    axes.minorticks_off()
    axes.set_xlabel("tokens in the cache (log scale)")
    axes.set_ylabel("points over LRU")
    title = f"Prompt tokens found beyond LRU, {summary['at_once']} recorded agents at once"
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False)
    save(figure, path)
