"""Which router sends requests where their answers come soonest: traces on a simulated fleet, without a model.

`--trace` is the archive of AgentX, a .jsonl in Mooncake's format, or a plan (.json); without it, synthetic agents.
Each load of the config that belongs to the trace is played once for each policy and seed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.harness.provenance import provenance
from experiments.harness.report import write_json
from experiments.routing.config import Config, ConfigError, Load, engine_of, kind_of, read_config, workload_of
from experiments.routing.figures import draw, load_label, table
from experiments.routing.fleet import Fleet
from experiments.routing.gateway import OURS, FormulaGateway, Gateway, Meters, OurGateway
from experiments.routing.measure import bounds, measure
from experiments.routing.replica import Engine
from experiments.routing.workload import Workload

CONFIG = Path("experiments/configs/routing.toml")
RESULTS = Path("experiments/results/routing")


def make_fleet(policy: str, engines: list[Engine], seed: int, **options: Any) -> Fleet:
    """A fleet behind one gateway with this policy; `options` are those of `Fleet`."""

    def gateway(meters: Meters, number: int) -> Gateway:
        if policy == OURS:
            return OurGateway(engines[0].page_size)
        return FormulaGateway(policy, len(engines), meters, seed=1000 * seed + number)

    return Fleet(engines, gateway, shared_store=any(engine.restore_s for engine in engines), seed=seed, **options)


def play(workload: Workload, load: Load, policies: Iterable[str], engine: Engine, seed: int) -> dict[str, Any]:
    """One load with one seed under each policy, as JSON values."""
    slow = round(load.slow * load.replicas)
    engines = [engine.slowed(2) if number < slow else engine for number in range(load.replicas)]
    runs: dict[str, Any] = {}
    limits: dict[str, float] = {}
    for policy in policies:
        began = time.process_time()
        fleet = make_fleet(policy, engines, seed)
        answered = fleet.run(workload)
        runs[policy] = measure(fleet).as_json() | {"cpu_s": round(time.process_time() - began, 1)}
        limits = limits or bounds(answered, workload.page_size, load.replicas * engine.num_pages)
    return {"seed": seed, "requests": workload.requests, "bounds": limits, "policies": runs}


def simulate(config: Config, trace: Path | None, constants: Path | None, console: Console) -> list[dict[str, Any]]:
    """All loads of the config that belong to a trace, as JSON values. Raises ConfigError if there are none."""
    kind = kind_of(trace)
    loads = [load for load in config.loads if load.trace == kind]
    if not loads:
        raise ConfigError(f"the config has no load of trace = {kind!r}: add one")
    results = []
    for load in loads:
        runs = []
        for seed in track(config.seeds, load_label(load), console=console, transient=True):
            workload = workload_of(load, trace, seed)
            engine = engine_of(config.engine, workload.page_size, constants)
            runs.append(play(workload, load, config.policies, engine, seed))
        results.append({"load": {f: getattr(load, f) for f in load.__struct_fields__}, "runs": runs})
        console.print(table(results[-1]))
    return results


def merged(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results with the figures of a file's other policies, where load and seeds are the same.

    A file may be from before a load had all of its fields.
    """
    for result in now:
        for old in before:
            if old["load"].items() <= result["load"].items() and len(old["runs"]) == len(result["runs"]):
                for run, kept in zip(result["runs"], old["runs"], strict=True):
                    run["policies"] = kept["policies"] | run["policies"]
                    run["bounds"] = kept["bounds"]
    return now


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m experiments.routing", description=__doc__.split("\n")[0])
    cli.add_argument("--trace", type=Path, help="AgentX's .tar.xz, a .jsonl in Mooncake's format, or a plan's .json")
    cli.add_argument("--config", type=Path, default=CONFIG)
    cli.add_argument("--constants", type=Path, help="a cost model's file, used instead of the config's constants")
    cli.add_argument(
        "--only", action="append", metavar="POLICY", help="play this policy only, and keep the file's figures of others"
    )
    cli.add_argument("--out", type=Path, default=RESULTS)
    return cli


def main(arguments: list[str] | None = None) -> int:
    """Simulate, print tables, write JSON and picture; returns the exit status."""
    options, console = parser().parse_args(arguments), Console()
    try:
        config = read_config(options.config)
        if options.only:
            config = msgspec.structs.replace(config, policies=tuple(options.only))
        results = simulate(config, options.trace, options.constants, console)
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = options.trace.name.split(".")[0] if options.trace else "synthetic"
    path = options.out / f"{name}.json"
    if options.only and path.exists():
        results = merged(json.loads(path.read_text())["results"], results)
    summary = {
        "trace": name,
        "engine": {f: getattr(config.engine, f) for f in config.engine.__struct_fields__},
        "constants": str(options.constants) if options.constants else None,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "results": results,
    } | provenance(("tokenzero", "numpy"))
    write_json(path, summary)
    draw(summary, options.out / f"{name}.png")
    console.print(f"results in {options.out}")
    return 0


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    sys.exit(main())
