"""Synthetic sessions beside recorded ones: `python -m experiments.wild.synthetic`, after `python -m experiments.wild`.

Two kinds: those fitted to recorded sessions (`workloads/fitted.json`), and the agents of `experiments.replay`, whose
lengths, pauses and sub-agents were chosen by hand. Both are counted as recorded sessions are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.harness.figures import COLOURS, save, subplots
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.wild.__main__ import RESULTS, measure
from experiments.workloads.agentx import BLOCK, Agent, Trace, TraceRequest
from experiments.workloads.fitted import load_fit, sessions
from experiments.workloads.traces import Agents, agent

KEPT = ("overall", "causes", "breaks", "lifetimes", "granularity", "by_call")


def agents(work: Agents) -> Iterator[Trace]:
    """The calls of each of the agents at work as a trace, which side requests and sub-agents belong to."""
    for number in range(work.agents):
        known: dict[Hashable, int] = {}
        made = []
        for call in agent(work, number):
            name = call.session.partition(" ")[2]
            ids, tokens = chained_blocks(call.blocks, known), int(call.blocks[:, 1].sum())
            who = Agent(name, "" if name else None, 0, 0)
            made.append(TraceRequest(who, "made", call.time_s, tokens, 0, ids, "", None, None, None))
        yield Trace(f"{number}", f"{number}", BLOCK, 0, 0, made)


def chained_blocks(parts: np.ndarray, known: dict[Hashable, int]) -> np.ndarray:
    """Chained ids of the full blocks of a prompt ([blocks] int32), whose parts are [parts, 2] int32: id and tokens.

    `known` numbers the blocks of a session by the block before and the parts that reach into this one.
    """
    ends = np.cumsum(parts[:, 1])
    starts = np.arange(0, int(ends[-1]) - BLOCK + 1, BLOCK)
    first, last = np.searchsorted(ends, starts, "right"), np.searchsorted(ends, starts + BLOCK)
    names, before, ids = parts[:, 0].tolist(), 0, []
    for low, high in zip(first.tolist(), last.tolist(), strict=True):
        before = known.setdefault((before, *names[low : high + 1]), len(known) + 1)
        ids.append(before)
    return np.array(ids, np.int32)


def draw(recorded: dict[str, Any], made: dict[str, dict[str, Any]], path: Path) -> None:
    """Hit rates by the number of a request in its session: the median of each kind, and all of the recorded."""
    figure, axes = subplots()
    low, middle, high = (np.array(each, float) for each in zip(*recorded["by_call"], strict=True))  # [calls]
    numbers = np.arange(1, len(middle) + 1)
    axes.fill_between(numbers, 100 * low, 100 * high, color=COLOURS[0], alpha=0.15, linewidth=0)
    axes.plot(numbers, 100 * middle, color=COLOURS[0], label="recorded: median, and 5 to 95%")
    for (name, found), colour in zip(made.items(), COLOURS[1:], strict=False):
        low, middle, _ = (np.array(each, float) for each in zip(*found["by_call"], strict=True))
        axes.plot(numbers, 100 * middle, color=colour, label=f"{name}: median")
        axes.plot(numbers, 100 * low, color=colour, linewidth=0.7, linestyle="--", label=f"{name}: 5%")
    axes.set(xlabel="request of the session", ylabel="tokens read from an unlimited cache, %", ylim=(-2, 102))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, path)


def print_table(recorded: dict[str, Any], made: dict[str, dict[str, Any]], console: Console) -> None:
    """What the kinds of sessions have in common with recorded ones, for a terminal."""
    kinds = {"recorded": recorded, **made}
    grid = make_table(("", *kinds), ("",))
    for name in ("reused", "reads_per_write"):
        grid.add_row(name, *(f"{each['overall'][name]:,.4g}" for each in kinds.values()))
    for cause in recorded["causes"]:
        found = (next(c for c in each["causes"] if c["cause"] == cause["cause"]) for each in kinds.values())
        cells = (f"{c['share_of_requests']:.2%}, {c['share_of_new_tokens']:.1%}" for c in found)
        grid.add_row(f"{cause['cause']}: requests, tokens", *cells)
    console.print(grid)


def main(argv: list[str] | None = None) -> None:
    """Count both kinds, print a table, write summary and figure."""
    cli = argparse.ArgumentParser(prog="python -m experiments.wild.synthetic", description=__doc__.split("\n")[0])
    cli.add_argument("--sessions", type=int, default=700, help="fitted ones (default: %(default)s)")
    cli.add_argument("--agents", type=int, default=24, help="of those made by hand (default: %(default)s)")
    cli.add_argument("--calls", type=int, default=150, help="of each of them (default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    args, console = cli.parse_args(argv), Console()
    try:
        recorded = json.loads((args.out / "summary.json").read_text())
    except OSError as error:
        cli.error(f"{error}; `python -m experiments.wild TRACES` writes it")
    kinds = {
        "fitted": sessions(load_fit(), args.sessions),
        "by hand": agents(Agents(agents=args.agents, calls=args.calls)),
    }
    made = {}
    for name, traces in kinds.items():
        found = measure(traces)
        made[name] = {key: found[key] for key in KEPT}
    told = {"sessions": args.sessions, "agents": args.agents, "calls": args.calls}
    write_json(args.out / "synthetic.json", told | made | provenance(("tokenzero", "numpy")), indent=1)
    draw(recorded, made, args.out / "synthetic.png")
    print_table(recorded, made, console)
    console.print(f"results in {args.out}")


if __name__ == "__main__":
    main()
