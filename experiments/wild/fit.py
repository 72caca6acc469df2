"""Fit synthetic sessions to recorded ones: `python -m experiments.wild.fit TRACES` writes `workloads/fitted.json`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.harness.report import write_json
from experiments.wild.classify import NAMES, Cause, rows
from experiments.wild.summary import BLOCK
from experiments.workloads.agentx import SOURCE, Trace, read_traces, trace_names
from experiments.workloads.fitted import FITTED, LEVELS, Break, Fit

PAUSE_EDGES_S = [15.0, 60.0, 300.0, 1200.0, 3600.0]
FIRST_EDGES = [8_192.0, 65_536.0, 163_840.0]  # tokens
WINDOWS = (130_000, 170_000)  # tokens, between which clients with a window compact
KINDS = (Cause.HEAD, Cause.BEHIND_HEAD, Cause.LATER, Cause.BRANCH)


def quantiles(values: np.ndarray, digits: int = 1) -> list[float]:
    """The quantiles of values at LEVELS; zeros of no values."""
    known = values[~np.isnan(values.astype(float))]
    if not len(known):
        return [0.0] * len(LEVELS)
    return [round(float(v), digits) for v in np.percentile(known, LEVELS)]


def break_of(rows: np.ndarray, cause: Cause) -> Break:
    """How requests of one cause leave the prompt before them."""
    rows = rows[rows["cause"] == cause]
    before, reused = np.maximum(1, rows["before"]), rows["reused"].astype(float)
    by_head, shrinks = cause in (Cause.BEHIND_HEAD, Cause.COMPACTION), cause is Cause.COMPACTION
    return Break(
        behind_head=quantiles(BLOCK * reused - rows["head"]) if by_head else [],
        kept=[] if by_head else quantiles(np.minimum(1, reused / before), 4),
        change_tokens=[] if shrinks else quantiles(BLOCK * (rows["blocks"].astype(float) - before)),
        length=quantiles(rows["blocks"] / before, 4) if shrinks else [],
    )


def binned_rates(hit: np.ndarray, values: np.ndarray, edges: list[float]) -> list[float]:
    """The share of requests that are hit ([requests] bool), by bins of a value."""
    bins = np.digitize(values, edges)
    return [round(float(hit[bins == b].mean()) if (bins == b).any() else 0.0, 5) for b in range(len(edges) + 1)]


def fit(found: np.ndarray, api_times: np.ndarray) -> Fit:
    """The fit to the rows of all requests, [requests] ROW, and the durations of answers, [answers] float64."""
    main, later = ~found["subagent"], found["before"] >= 0
    first = main & (found["number"] == 0)
    pauses = found[later]
    waits, idle = pauses["waits_for_person"], pauses["idle_s"]
    subs = found["subagent"] & (found["before"] < 0)
    per_session = np.bincount(found["session"][main])
    sub_requests = np.full(1, found["subagent"].sum() / max(1, subs.sum()))  # the mean
    begun = np.maximum(0, found["blocks"] * BLOCK - found["head"])
    first_bins = np.digitize(begun[first], FIRST_EDGES)
    longest = np.zeros(len(per_session), np.int64)
    np.maximum.at(longest, found["session"][main], found["tokens"][main])
    before = pauses["before"][pauses["cause"] == Cause.COMPACTION] * BLOCK
    full = before[(before > WINDOWS[0]) & (before <= WINDOWS[1])]
    small = found["tokens"][first] <= WINDOWS[0]  # [sessions]: a longer first prompt has no window of this size
    counts = per_session[found["session"][first]]
    appended = found[found["cause"] == Cause.APPEND]
    return Fit(
        sessions=int(first.sum()),
        head_tokens=quantiles(found["head"][first]),
        first_tokens=quantiles(begun[first]),
        first_edges=FIRST_EDGES,
        requests=[quantiles(counts[first_bins == b]) for b in range(len(FIRST_EDGES) + 1)],
        appended_tokens=quantiles((appended["blocks"] - appended["reused"]) * BLOCK),
        output_tokens=quantiles(found["output"]),
        api_time_s=quantiles(api_times, 2),
        end_turn=round(float((waits == 1).mean()), 4),
        tool_pause_s=quantiles(idle[waits != 1]),
        person_pause_s=quantiles(idle[waits == 1]),
        pause_edges_s=PAUSE_EDGES_S,
        break_rates={NAMES[k]: binned_rates(pauses["cause"] == k, idle, PAUSE_EDGES_S) for k in KINDS},
        window_tokens=quantiles(full),
        unlimited=round(float((longest[small] > WINDOWS[1]).sum() / max(1, (longest[small] > WINDOWS[0]).sum())), 4),
        compaction_rate=round(float((pauses["cause"] == Cause.COMPACTION).sum() - len(full)) / len(pauses), 5),
        breaks={NAMES[kind]: break_of(found, kind) for kind in (*KINDS, Cause.COMPACTION)},
        subagents=round(float(subs.sum() / max(1, main.sum())), 5),
        subagent_requests=quantiles(sub_requests),
        subagent_head_tokens=quantiles(found["head"][subs]),
        subagent_first_tokens=quantiles(begun[subs]),
    )


def fit_traces(traces: Iterable[Trace]) -> Fit:
    """The fit to sessions; they are held one at a time."""
    made, times = [], list[list[float]]()
    for number, trace in enumerate(traces):
        made.append(rows(trace, number))
        times.append([r.api_time_s for r in trace.requests if r.api_time_s is not None])
    return fit(np.concatenate(made), np.array([*itertools.chain(*times)]))


def main(argv: list[str] | None = None) -> None:
    """Read the traces and write the fit."""
    cli = argparse.ArgumentParser(prog="python -m experiments.wild.fit", description=__doc__.split("\n")[0])
    cli.add_argument("traces", type=Path, help=f"a folder or archive of traces, such as {SOURCE} has")
    cli.add_argument("--out", type=Path, default=FITTED, help="(default: %(default)s)")
    args, console = cli.parse_args(argv), Console()
    try:
        traces, total = read_traces(args.traces), len(trace_names(args.traces))
        found = fit_traces(track(traces, "fitting", total=total, console=console, transient=True))
    except (OSError, ValueError) as error:
        cli.error(str(error))
    write_json(args.out, msgspec.to_builtins(found), indent=None)
    console.print(f"fitted to {found.sessions} sessions: {args.out}")


if __name__ == "__main__":
    main()
