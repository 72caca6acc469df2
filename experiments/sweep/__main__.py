"""Sweeps: TTFT over prompt length, header position and the other axes of a config, each point measured in turn.

`python -m experiments.sweep CONFIG.toml` measures into a folder; the same command goes on where it was stopped. Points
come in a random order, each right after a request that leaves their shared prefix in the cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from experiments.harness.report import write_json
from experiments.sweep.config import ConfigError, points, read_config
from experiments.sweep.measure import run_sweep
from experiments.sweep.run_folder import Run, RunError, cells, summary, table
from experiments.sweep.targets import TargetError

RESULTS = Path("experiments/results/sweeps")


def main(argv: list[str] | None = None) -> int:
    """Check, measure, print the medians. Exit status 2 if nothing could be run, 1 if a target died half-way."""
    cli = argparse.ArgumentParser(prog="python -m experiments.sweep", description=__doc__)
    cli.add_argument("config", type=Path, help="a TOML file: see experiments/README.md")
    cli.add_argument("--out", type=Path, help=f"the run's folder (default: {RESULTS}/ and the config's name)")
    args = cli.parse_args(argv)
    folder, console = args.out or RESULTS / args.config.stem, Console()
    try:
        text = args.config.read_bytes()
        config = read_config(text)
        run = Run(folder, text)
    except (ConfigError, RunError, OSError) as error:
        return refuse(f"{args.config}: {error}", 2)
    wanted = len(points(config)) * config.repeats
    try:
        run_sweep(config, run, console)
    except (TargetError, OSError, ValueError) as error:
        if not run.measured:
            return refuse(f"{args.config}: the target does not answer: {error}; check [target] in the config", 2)
        kept = f"{len(run.measured)} of {wanted} measurements are kept in {folder}"
        return refuse(f"{args.config}: the target stopped answering: {error}; {kept}: the same command goes on", 1)
    except KeyboardInterrupt:
        return refuse(
            f"{len(run.measured)} of {wanted} measurements are kept in {folder}: the same command goes on", 130
        )
    found = cells(run.measured, config.seed)
    write_json(folder / "summary.json", summary(found), indent=1)
    console.print(table(found))
    console.print(f"{len(run.measured)} measurements in {folder}; `python -m experiments.plot {folder}` draws them")
    return 0


def refuse(message: str, status: int) -> int:
    """Print one line and return the exit status."""
    print(f"sweep: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
