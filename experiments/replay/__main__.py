"""The hits of a cache of given size in a trace of calls: hit rates, reads per write, tokens and time saved.

No model runs. `python -m experiments.replay` sends the calls of agents at work through a PrefixCache, or with
`--trace FILE` those of a trace in Mooncake's format; `--live URL` sends them to a Messages endpoint as well.

`--policies --model DIR` compares eviction policies of a tier: the requests of agent sessions, rendered and tokenised as
the server does it, become keys of pages. LRU is the host tier itself; FIFO and Belady's optimum are computed as well.
`--policies --agentx PATH` compares rules over the real prefix cache, and the optimum, on recorded agents.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from dataclasses import asdict
from pathlib import Path

import httpx
import msgspec
from rich.console import Console

from experiments.harness.provenance import provenance
from experiments.harness.report import write_json
from experiments.replay.capacity import (
    CAPACITIES,
    COST_MODEL,
    ask,
    capacity_table,
    compare_capacities,
    least_capacity,
    outcome,
)
from experiments.replay.held_out import BUDGETS, Plan, compare
from experiments.replay.policies import Workload, compare_policies
from experiments.workloads.sessions import RELEASES
from experiments.workloads.traces import Agents, generate, read_mooncake
from serve.cost.file import CostFile

RESULTS = Path("experiments/results/replay")


def file_identity(path: Path) -> dict[str, str]:
    """A trace file's name and hash, which identify it anywhere."""
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m experiments.replay", description=__doc__.split("\n")[0])
    cli.add_argument("--trace", type=Path, help="JSONL in Mooncake's format (default: agents at work)")
    cli.add_argument("--agents", type=int, default=Agents.agents, help="(default: %(default)s)")
    cli.add_argument("--calls", type=int, default=Agents.calls, help="of each agent (default: %(default)s)")
    cli.add_argument("--release", choices=list(RELEASES), default=Agents.release, help="of the agents' client")
    cli.add_argument("--capacity", type=int, nargs="+", help="of the cache, in tokens; several may be named")
    cli.add_argument("--live", metavar="URL", help="send the calls to a Messages endpoint as well, without headers")
    cli.add_argument("--speed", type=float, default=math.inf, help="of --live, times the trace's (default: no pauses)")
    cli.add_argument("--cost-model", type=Path, default=COST_MODEL, help="prices tokens (default: %(default)s)")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--policies", action="store_true", help="compare eviction policies; needs --model or --agentx")
    cli.add_argument("--agentx", type=Path, help="recorded agents for --policies: a folder, or an archive")
    cli.add_argument("--jobs", type=int, default=1, help="of --agentx, processes (default: %(default)s)")
    cli.add_argument("--half", choices=("held out", "chosen on"), default="held out", help="of --agentx")
    cli.add_argument("--model", help="checkpoint folder whose tokenizer and template the policies' trace uses")
    cli.add_argument("--sessions", type=int, default=Workload.sessions, help="of the policies' trace")
    cli.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    return cli


def main(argv: list[str] | None = None) -> None:
    """Replay agents' calls, a trace file or, for the policies, agent sessions; print a table, write it as JSON."""
    cli = parser()
    args, console = cli.parse_args(argv), Console()
    if args.policies and not (args.model or args.agentx):
        cli.error(
            "--policies needs --model, a checkpoint folder such as `python -m experiments.demo_model DIR` writes, or "
            "--agentx, recorded agents"
        )
    for name in ("agents", "calls", "sessions", "speed"):
        if not getattr(args, name) > 0:
            cli.error(f"--{name} {getattr(args, name)}: expected more than 0")
    if args.policies and args.agentx:
        try:
            compare(args.agentx, Plan(half=args.half), args.capacity or BUDGETS, args.jobs, args.out, console)
        except (OSError, ValueError) as error:
            cli.error(f"--agentx {args.agentx}: {error}")
        return
    if args.policies:
        compare_policies(Workload(seed=args.seed, sessions=args.sessions), args.model, args.out, console)
        return
    work = Agents(seed=args.seed, agents=args.agents, calls=args.calls, release=args.release)
    try:
        costs = msgspec.json.decode(args.cost_model.read_bytes(), type=CostFile).constants
        calls = read_mooncake(args.trace) if args.trace else generate(work)
    except msgspec.MsgspecError as error:
        cli.error(
            f"{args.cost_model} is not a cost model: {error}; write one with `python -m experiments.sweep.fit RUN`"
        )
    except (OSError, ValueError) as error:
        cli.error(str(error))
    least = least_capacity(calls)
    if args.capacity and min(args.capacity) < least:
        cli.error(f"--capacity {min(args.capacity)}: expected at least {least} tokens, which the longest prompt needs")
    try:
        live = ask(args.live, calls, args.speed, console) if args.live else None
    except (httpx.HTTPError, LookupError, ValueError) as error:
        cli.error(f"--live {args.live}: expected a Messages endpoint, found {type(error).__name__}: {error}")
    compared = compare_capacities(calls, args.capacity or CAPACITIES, costs, console)
    if live is not None:
        compared["rows"].append({"header": "live", "capacity": None, **outcome(calls, live, costs)})
    summary = {
        "trace": file_identity(args.trace) if args.trace else asdict(work),
        "cost_model": {"file": str(args.cost_model), "constants": asdict(costs)},
        **compared,
        **provenance(("tokenzero", "numpy")),
    }
    path = args.out / f"{args.trace.stem if args.trace else 'agents'}.json"
    write_json(path, summary)
    console.print(capacity_table(summary))
    console.print(f"results in {path}")


if __name__ == "__main__":
    main()
