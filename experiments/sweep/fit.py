"""The cost model of a run: constants with intervals, how well they predict, and what a volatile token costs.

`python -m experiments.sweep.fit RUN` fits TTFT(n, p) of serve.cost.model to a sweep's medians and writes
RUN/cost_model.json, which `python -m serve --cost-model` loads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.harness.report import make_table, write_json
from experiments.sweep.run_folder import Cell, RunError, cells, load
from model.config import ModelConfig
from model.families import load_config
from serve.cost.file import file_contents
from serve.cost.fit import TERMS, accuracy, fit_cost_model, held_out, intervals
from serve.cost.model import Constants, cost_model

FILE = "cost_model.json"
# Where in a prompt a volatile token is priced.
PRICED = (0.0, 0.25, 0.5, 0.75, 0.9)
UNITS = {
    "fixed": "a request",
    "linear": "a computed token",
    "attention": "a pair of tokens",
    "match": "a cached token",
    "restore": "a restored token",
}


def fit_cells(found: Sequence[Cell], config: ModelConfig | None, seed: int = 0) -> dict[str, Any]:
    """The cost model's file, as JSON values, from the medians of one model on one machine.

    Raises ValueError for too few points, or for medians of several models or page sizes.
    """
    if len({(cell.point.model, cell.point.page_size) for cell in found}) != 1:
        raise ValueError("a cost model is of one model and page size: choose them with --model and --page-size")
    samples = [cell.sample() for cell in found]
    constants = fit_cost_model(samples)
    return file_contents(
        constants,
        config,
        intervals_95=intervals(samples, seed),
        held_out=accuracy(measured_ms(found), held_out(samples, seed) * 1e3),
        points=len(samples),
        model=found[0].point.model,
        page_size=found[0].point.page_size,
        prices=prices(constants, config, max(cell.prompt_tokens for cell in found)),
    )


def measured_ms(found: Sequence[Cell]) -> np.ndarray:
    """The measured medians, [cells], in ms."""
    return np.array([cell.ttft_ms for cell in found])


def prices(constants: Constants, config: ModelConfig | None, prompt: int) -> list[dict[str, Any]]:
    """The cost of one volatile token by its position in a prompt: all tokens after it are computed again."""
    flops = cost_model(config).flops if config else None
    positions = [round(share * prompt) for share in PRICED]
    return [
        {
            "prompt_tokens": prompt,
            "position": at,
            "ms": constants.compute_s(at, prompt) * 1e3,
            "flops": flops and flops(at, prompt),
        }
        for at in positions
    ]


def model_config(model: str) -> ModelConfig | None:
    """The shape of a run's model; None where it is an endpoint's, or its checkpoint is gone."""
    try:
        return load_config(model)
    except OSError:
        return None


def fit_run(folder: Path, model: str = "", page_size: int = 0, seed: int = 0) -> tuple[dict[str, Any], list[Cell]]:
    """Fit a run's cells, all or those of one model and page size, and write the cost model next to them.

    Raises RunError for a folder that holds no run, ValueError for cells that no model can be fitted to.
    """
    found = [
        cell
        for cell in cells(load(folder), seed)
        if model in ("", cell.point.model) and page_size in (0, cell.point.page_size)
    ]
    if not found:
        raise ValueError(f"{folder} has no measurement of that model and page size: leave out --model and --page-size")
    fitted = fit_cells(found, model_config(found[0].point.model), seed)
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    write_json(folder / FILE, fitted | {"session": sessions[-1]})
    return fitted, found


def constants_of(fitted: dict[str, Any]) -> Constants:
    """The constants of a cost model's JSON."""
    return Constants(**fitted["constants"])


def constants_table(fitted: dict[str, Any]) -> Table:
    """Constants with their intervals, in microseconds."""
    columns = ("constant", "microseconds", "95% interval", "for")
    grid = make_table(columns, words=("constant",), caption=accuracy_line(fitted))
    for term in TERMS:
        value, (low, high) = fitted["constants"][term], fitted["intervals_95"][term]
        grid.add_row(term, f"{value * 1e6:,.4g}", f"{low * 1e6:,.4g} - {high * 1e6:,.4g}", UNITS[term])
    return grid


def accuracy_line(fitted: dict[str, Any]) -> str:
    """The error for points that the fit has not seen, in a line."""
    error, r_squared = fitted["held_out"]["median_relative_error"], fitted["held_out"]["r_squared"]
    return f"held-out points: median error {error:.1%}, R² {r_squared:.4f} ({fitted['points']} points, 5 folds)"


def prices_table(fitted: dict[str, Any]) -> Table:
    """The price of one volatile token by position."""
    caption = f"one volatile token in {fitted['prices'][0]['prompt_tokens']:,} tokens"
    grid = make_table(("at position", "costs, ms", "GFLOP"), caption=caption)
    for price in fitted["prices"]:
        gflop = f"{price['flops'] / 1e9:,.1f}" if price["flops"] else ""
        grid.add_row(f"{price['position']:,}", f"{price['ms']:,.1f}", gflop)
    return grid


def crossover_table(constants: Constants, bytes_per_token: int) -> Table:
    """The position from which on reading a token from a tier is faster than computing it, by the tier's speed."""
    columns = ("a tier that reads, MB/s", "beats recompute from position")
    grid = make_table(columns, caption=f"{bytes_per_token:,} bytes of KV a token")
    always = bytes_per_token / constants.linear if constants.linear else 1e9
    for speed in (always / 16, always / 8, always / 4, always / 2, always):
        at = constants.crossover(bytes_per_token / speed)
        grid.add_row(f"{speed / 1e6:,.0f}", "never" if at == float("inf") else f"{at:,.0f}")
    return grid


def main(argv: list[str] | None = None) -> int:
    """Fit, write, print."""
    cli = argparse.ArgumentParser(prog="python -m experiments.sweep.fit", description=__doc__)
    cli.add_argument("run", type=Path, help="a sweep's folder")
    cli.add_argument("--model", default="", help="of a run over several models")
    cli.add_argument("--page-size", type=int, default=0, help="of a run over several page sizes")
    args = cli.parse_args(argv)
    try:
        fitted, found = fit_run(args.run, args.model, args.page_size)
    except (RunError, ValueError, OSError) as error:
        print(f"fit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    console = Console()
    console.print(constants_table(fitted))
    console.print(prices_table(fitted))
    if config := model_config(found[0].point.model):
        from model.kv import bytes_per_token

        dtype = json.loads((args.run / FILE).read_text())["session"]["dtype"]
        console.print(crossover_table(constants_of(fitted), bytes_per_token(config, dtype)))
    console.print(f"{args.run / FILE}: load it with `python -m serve --cost-model`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
