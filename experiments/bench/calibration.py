"""Whether the simulator says what real replicas do: TTFT and hits of one plan on four replicas, and simulated.

`python -m experiments.bench.calibration --model DIR`. First as many agents as there are replicas hold sessions at the
same time, one on each, so that nothing queues: the cost model is fitted to their TTFT, with all replicas at work on
this machine's cores. Then eight agents hold theirs. What they asked is written as a plan, which the simulator replays
with the fitted constants.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from experiments.bench.cluster import AGENTS, PACKAGES, POOL_MIB, REPLICAS, converse, routed
from experiments.harness.client import Timing
from experiments.harness.other_load import start_watch, warning
from experiments.harness.provenance import provenance
from experiments.harness.report import write_json
from experiments.routing.__main__ import make_fleet
from experiments.routing.gateway import OURS
from experiments.routing.measure import measure
from experiments.routing.plan import write_plan
from experiments.routing.replica import Engine
from experiments.routing.workload import Lane, Request, Workload
from model.families import load_config
from model.kv import bytes_per_token
from serve.cost.fit import Sample, fit_cost_model

RESULTS = Path("experiments/results/bench/calibration.json")
PAGE = 64  # tokens
MOST_PAGES = 1 << 16  # of a session; each has numbers of its own
ROUNDS = 2  # of sessions that the cost model is fitted to

Talk = list[Timing]  # one agent's requests, in order


def hold(url: str, numbers: Sequence[int]) -> list[Talk]:
    """Agents' sessions, all at the same time."""
    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(lambda number: converse(url, number), numbers))


def plan_of(talks: Sequence[Talk]) -> Workload:
    """What agents asked, whose sessions share nothing and only grow."""
    lanes = []
    for agent, talk in enumerate(talks):
        pages = np.arange(agent * MOST_PAGES, (agent + 1) * MOST_PAGES, dtype=np.int32)
        asked = [Request(agent, pages[: t.prompt_tokens // PAGE], t.prompt_tokens, t.output_tokens, 0.0) for t in talk]
        lanes.append(Lane(0.0, asked))
    return Workload("calibration", PAGE, lanes)


def engine_of(talks: Sequence[Talk], num_pages: int) -> Engine:
    """A simulated replica that takes what these requests took, none of which waited for another."""
    timings = [timing for talk in talks for timing in talk]
    constants = fit_cost_model([Sample(t.prompt_tokens, t.cached_tokens, 0, t.ttft_ms / 1e3) for t in timings])
    steps = [(t.total_ms - t.ttft_ms) / 1e3 / (t.output_tokens - 1) for t in timings if t.output_tokens > 1]
    return Engine(constants, median(steps), 0.0, num_pages, PAGE)


def figures(ttft_s: Sequence[float], hit_rate: float) -> dict[str, float]:
    """Quantiles of TTFT in ms, and the hit rate."""
    p50, p90 = np.quantile(ttft_s, [0.5, 0.9]).tolist()
    return {"ttft_p50_ms": round(p50 * 1e3, 1), "ttft_p90_ms": round(p90 * 1e3, 1), "hit_rate": round(hit_rate, 4)}


def simulated(plan: Workload, engine: Engine) -> dict[str, float]:
    """The figures of a plan on replicas like this one."""
    fleet = make_fleet(OURS, [engine] * REPLICAS, 0)
    fleet.run(plan)
    return figures([each.first_token - each.sent for each in fleet.answered], measure(fleet).hit_rate)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, measure and simulate; write plan and result."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.calibration", description=__doc__.split("\n")[0])
    cli.add_argument("--model", required=True, metavar="DIR")
    cli.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    args = cli.parse_args(argv)
    others, console = start_watch(), Console()
    with routed(args.model, "ttft") as server:
        alone = [talk for i in range(ROUNDS) for talk in hold(server.url, range(100 + 10 * i, 100 + 10 * i + REPLICAS))]
        talks = hold(server.url, range(AGENTS))
    token_bytes = bytes_per_token(load_config(Path(args.model)), np.dtype(np.float32))
    engine, plan = engine_of(alone, POOL_MIB * 2**20 // (PAGE * token_bytes)), plan_of(talks)
    timings = [timing for talk in talks for timing in talk]
    cached, prompt = sum(t.cached_tokens for t in timings), sum(t.prompt_tokens for t in timings)
    real, said = figures([t.ttft_ms / 1e3 for t in timings], cached / prompt), simulated(plan, engine)
    result: dict[str, Any] = {
        "constants": asdict(engine.constants),
        "step_s": engine.step_s,
        "real": real,
        "simulated": said,
        "p50_error": round(said["ttft_p50_ms"] / real["ttft_p50_ms"] - 1, 3),
        "other_load": others(),
    }
    write_plan(args.output.with_name("calibration-plan.json"), plan)
    write_json(args.output, result | provenance(PACKAGES))
    for name in ("constants", "step_s", "real", "simulated", "p50_error"):
        console.print(name, result[name])
    console.print(warning(result["other_load"]))


if __name__ == "__main__":
    main()
