"""Tables and pictures of simulated fleets."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from experiments.harness.figures import COLOURS, panels, plain, save, time_label
from experiments.harness.report import make_table
from experiments.routing.gateway import OURS

COLUMNS = ("policy", "hits", "TTFT p50", "p90", "p99", "imbalance", "busy", "bytes/request")


def load_label(load: Any) -> str:
    """A load in words; it is a `Load`, or the same as JSON values."""
    get = load.get if isinstance(load, dict) else lambda name: getattr(load, name)
    arrivals = "" if get("arrivals") == "trace" else f", {get('arrivals')}"
    if get("slow"):
        arrivals += f", {get('slow'):.0%} half as fast"
    if get("trace") == "mooncake":
        return f"{get('replicas')} replicas, {get('rate'):g} times as fast{arrivals}"
    if get("trace") == "plan":
        return f"{get('replicas')} replicas"
    return f"{get('replicas')} replicas, {get('rate'):g} agents each{arrivals}"


def medians(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each policy's figures of a load, the median over the seeds."""
    runs = result["runs"]
    return {
        policy: {name: median(run["policies"][policy][name] for run in runs) for name in figures}
        for policy, figures in runs[0]["policies"].items()
    }


def table(result: dict[str, Any]) -> Table:
    """A load's figures for a terminal: medians over the seeds."""
    seeds = [run["seed"] for run in result["runs"]]
    title = f"{load_label(result['load'])}: {result['runs'][0]['requests']:,} requests, medians of seeds {seeds}"
    grid = make_table(COLUMNS, words=("policy",), title=title)
    for policy, figures in medians(result).items():
        grid.add_row(
            policy,
            f"{figures['hit_rate']:.1%}",
            *(f"{figures[name]:.3f} s" for name in ("ttft_p50", "ttft_p90", "ttft_p99")),
            f"{figures['imbalance']:.2f}",
            f"{figures['busy']:.0%}",
            f"{figures['published_bytes'] / figures['requests']:,.0f}",
        )
    limits = {name: median(run["bounds"][name] for run in result["runs"]) for name in result["runs"][0]["bounds"]}
    grid.caption = "hits of " + ", of ".join(f"{name}: {rate:.1%}" for name, rate in limits.items())
    return grid


def draw(summary: dict[str, Any], path: Path) -> None:
    """For each load, the p90 of TTFT over the hit rate: a point for each policy, its median over the seeds."""
    results = summary["results"]
    figure, axes = panels(1, len(results), 1.2 + 3.9 * len(results), 4.3, squeeze=False)
    for number, (result, plot) in enumerate(zip(results, axes[0], strict=True)):
        plain(plot)
        for policy, figures in medians(result).items():
            ours = policy == OURS
            x, y = 100 * figures["hit_rate"], 1000 * figures["ttft_p90"]
            plot.plot(x, y, "o", markersize=8 if ours else 5, color=COLOURS[1] if ours else COLOURS[0])
            plot.annotate(policy, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
        limit = median(run["bounds"]["infinite"] for run in result["runs"])
        plot.axvline(100 * limit, color="#666666", linewidth=0.8, linestyle=":")
        plot.set_yscale("log")
        plot.yaxis.set_major_formatter(time_label)
        plot.yaxis.set_minor_formatter(time_label)
        plot.tick_params(axis="y", which="minor", labelsize=6)
        plot.set_xlabel("prompt tokens found in a cache, %")
        plot.set_title(load_label(result["load"]), fontsize=9, loc="left")
        plot.margins(x=0.18)
        if not number:
            plot.set_ylabel("time to first token, 90th percentile (log scale)")
    figure.suptitle(f"{summary['trace']}: dotted is one cache without a limit", fontsize=10, x=0.01, ha="left")
    save(figure, path)
