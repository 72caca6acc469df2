"""Whether the simulator says what real replicas do: TTFT and hits of one plan on four replicas, and simulated.

`python -m experiments.bench.calibration --model DIR`. First one agent after another holds its session, once all shapes
are compiled: the cost model is fitted to their TTFT, with nothing else at work. Then as many agents as there are
replicas hold theirs at the same time, in rounds: replicas share so many cores that the simulated median of these rounds
is the measured one. Then eight agents hold theirs. What they asked is written as a plan, which the simulator replays
with the fitted constants on so many cores: of these eight, nothing was fitted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
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
from experiments.harness.server import wait_until_compiled
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
ALONE, TOGETHER = 6, 3  # sessions one after another, and rounds of one session on each replica

Talk = list[Timing]  # one agent's requests, in order


def hold(url: str, numbers: Sequence[int]) -> list[Talk]:
    """Agents' sessions, all at the same time."""
    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(lambda number: converse(url, number), numbers))


def timings_of(rounds: Iterable[Sequence[Talk]]) -> list[Timing]:
    """All requests of some rounds."""
    return [timing for talks in rounds for talk in talks for timing in talk]


def plan_of(talks: Sequence[Talk]) -> Workload:
    """What agents asked, whose sessions share nothing and only grow."""
    lanes = []
    for agent, talk in enumerate(talks):
        pages = np.arange(agent * MOST_PAGES, (agent + 1) * MOST_PAGES, dtype=np.int32)
        asked = [Request(agent, pages[: t.prompt_tokens // PAGE], t.prompt_tokens, t.output_tokens, 0.0) for t in talk]
        lanes.append(Lane(0.0, asked))
    return Workload("calibration", PAGE, lanes)


def engine_of(timings: Sequence[Timing], num_pages: int) -> Engine:
    """A simulated replica that takes what these requests took, beside which nothing was at work."""
    constants = fit_cost_model([Sample(t.prompt_tokens, t.cached_tokens, 0, t.ttft_ms / 1e3) for t in timings])
    steps = [(t.total_ms - t.ttft_ms) / 1e3 / (t.output_tokens - 1) for t in timings if t.output_tokens > 1]
    return Engine(constants, median(steps), 0.0, num_pages, PAGE)


def cores_of(rounds: Sequence[Sequence[Talk]], engine: Engine) -> float:
    """The cores that replicas share, to 1%: with these the simulated median TTFT of the rounds is the measured one."""
    real = median(t.ttft_ms for t in timings_of(rounds)) / 1e3
    low, high = 0.1, float(REPLICAS)
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        said = median(ttft for talks in rounds for ttft in replayed(plan_of(talks), engine, middle)[0])
        low, high = (middle, high) if said > real else (low, middle)
    return math.sqrt(low * high)


def figures(ttft_s: Sequence[float], hit_rate: float) -> dict[str, float]:
    """Quantiles of TTFT in ms, and the hit rate."""
    p50, p90 = np.quantile(ttft_s, [0.5, 0.9]).tolist()
    return {"ttft_p50_ms": round(p50 * 1e3, 1), "ttft_p90_ms": round(p90 * 1e3, 1), "hit_rate": round(hit_rate, 4)}


def replayed(plan: Workload, engine: Engine, cores: float) -> tuple[list[float], float]:
    """TTFT in seconds of a plan's requests on replicas like this one that share so many cores, and the hit rate."""
    fleet = make_fleet(OURS, [engine] * REPLICAS, 0, cores=cores)
    fleet.run(plan)
    return [each.first_token - each.sent for each in fleet.answered], measure(fleet).hit_rate


def simulated(plan: Workload, engine: Engine, cores: float) -> dict[str, float]:
    """The figures of a plan on replicas like this one that share so many cores."""
    return figures(*replayed(plan, engine, cores))


def raw(talks: Iterable[Talk]) -> list[list[list[float]]]:
    """Of each request of some agents: prompt, cached and output tokens, TTFT and the whole time in ms."""
    columns = ("prompt_tokens", "cached_tokens", "output_tokens", "ttft_ms", "total_ms")
    return [[[round(getattr(t, name), 1) for name in columns] for t in talk] for talk in talks]


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, measure and simulate; write plan and result."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.calibration", description=__doc__.split("\n")[0])
    cli.add_argument("--model", required=True, metavar="DIR")
    cli.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    args = cli.parse_args(argv)
    console = Console()
    with routed(args.model, "ttft") as server:
        wait_until_compiled(server)
        hold(server.url, [90])  # one more, for what is still slow at first
        others = start_watch()
        alone = [hold(server.url, [number]) for number in range(100, 100 + ALONE)]
        firsts = range(200, 200 + 10 * TOGETHER, 10)
        together = [hold(server.url, range(first, first + REPLICAS)) for first in firsts]
        talks = hold(server.url, range(AGENTS))
        other_load = others()
    token_bytes = bytes_per_token(load_config(Path(args.model)), np.dtype(np.float32))
    engine, plan = engine_of(timings_of(alone), POOL_MIB * 2**20 // (PAGE * token_bytes)), plan_of(talks)
    timings, cores = timings_of([talks]), cores_of(together, engine)
    cached, prompt = sum(t.cached_tokens for t in timings), sum(t.prompt_tokens for t in timings)
    real = figures([t.ttft_ms / 1e3 for t in timings], cached / prompt)
    said = simulated(plan, engine, cores)
    result: dict[str, Any] = {
        "constants": asdict(engine.constants),
        "step_s": engine.step_s,
        "cores": round(cores, 2),
        "real": real,
        "simulated": said,
        "simulated without shared cores": simulated(plan, engine, math.inf),
        "p50_error": round(said["ttft_p50_ms"] / real["ttft_p50_ms"] - 1, 3),
        "other_load": other_load,
        "requests": {"alone": raw(t for [t] in alone), "together": [raw(r) for r in together], "eight": raw(talks)},
    }
    write_plan(args.output.with_name("calibration-plan.json"), plan)
    write_json(args.output, result | provenance(PACKAGES))
    for name, value in result.items():
        if name != "requests":
            console.print(name, value)
    console.print(warning(result["other_load"]))


if __name__ == "__main__":
    main()
