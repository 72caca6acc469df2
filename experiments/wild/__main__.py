"""The wild curve: `python -m experiments.wild TRACES`, of recorded sessions of coding agents.

TRACES is a folder or an archive in the format of https://github.com/callanjfox/kv-cache-tester; no model runs. It
counts what an unlimited cache reuses, why prompts stop matching it and what that costs, what granularity and lifetimes
cost, and writes figures and a summary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.wild import summary, ttl
from experiments.wild.classify import rows
from experiments.wild.costs import machines
from experiments.wild.figures import draw_all
from experiments.wild.granularity import PLACEMENTS, from_states
from experiments.workloads.agentx import SOURCE, Trace, read_traces, trace_names

RESULTS = Path("experiments/results/wild")


def measure(traces: Iterable[Trace]) -> dict[str, Any]:
    """All figures of these sessions as JSON values; they are held one at a time."""
    made, states, kept = [], np.zeros((len(PLACEMENTS), 2), np.int64), np.zeros(len(ttl.LIFETIMES_S) + 1, np.int64)
    for number, trace in enumerate(traces):
        made.append(rows(trace, number))
        states += from_states(trace)
        kept += ttl.kept(trace)
    found = np.concatenate(made)
    return {
        "overall": summary.overall(found),
        "causes": summary.causes(found),
        "breaks": summary.breaks(found),
        "by_length": summary.binned(found, found["tokens"], summary.LENGTHS),
        "by_idle_s": summary.binned(found, found["idle_s"], summary.IDLE_S),
        "granularity": summary.granularity(found),
        "states": summary.states(found, states, len(made)),
        "lifetimes": summary.lifetimes(found, kept),
        **summary.by_call(found),
    }


def print_table(found: dict[str, Any], console: Console) -> None:
    """The shares by cause for a terminal."""
    about = found["overall"]
    asked = f"{about['requests']:,} requests, {about['tokens'] / 1e9:,.2f}G prompt tokens"
    title = f"{asked}, of which an unlimited cache reuses {about['reused']:.1%}"
    columns = ("cause", "requests", "of all", "of new tokens", "of ms, H200", "demo")
    grid = make_table(columns, ("cause",), title=title)
    for each in found["causes"]:
        names = ("share_of_requests", "share_of_new_tokens", "share_of_h200_s", "share_of_demo_s")
        grid.add_row(each["cause"], f"{each['requests']:,}", *(f"{each[name]:.2%}" for name in names))
    console.print(grid)


def main(argv: list[str] | None = None) -> None:
    """Count, print a table, write summary and figures."""
    cli = argparse.ArgumentParser(prog="python -m experiments.wild", description=__doc__.split("\n")[0])
    cli.add_argument("traces", type=Path, help=f"a folder or archive of traces, such as {SOURCE} has")
    cli.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    args, console, skipped = cli.parse_args(argv), Console(), list[str]()
    try:
        total = len(trace_names(args.traces))
        traces = read_traces(args.traces, skipped.append)
        found = measure(track(traces, "counting", total=total, console=console, transient=True))
    except (OSError, ValueError) as error:
        cli.error(str(error))
    for line in skipped:
        console.print(f"left out: {line}", style="yellow", highlight=False, soft_wrap=True)
    result = {
        "command": f"python -m experiments.wild {args.traces.name}",
        "source": SOURCE,
        "left_out": len(skipped),
        **found,
        "cost_models": {name: asdict(costs) for name, costs in machines().items()},
        **provenance(("tokenzero", "numpy")),
    }
    write_json(args.out / "summary.json", result, indent=1)
    draw_all(result, args.out)
    print_table(found, console)
    console.print(f"{len(skipped)} files left out; results in {args.out}")


if __name__ == "__main__":
    main()
