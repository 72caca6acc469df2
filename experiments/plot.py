"""The figures of a run: `python -m experiments.plot RUN` writes PNGs next to its measurements.

position.png: TTFT over the mismatch position, one line a prompt length, with the fitted cost model. predicted.png: the
model's predictions for points that it has not seen, over what was measured. arms.png: the arms side by side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.harness.figures import COLOURS, save, subplots, time_label, tokens_label
from experiments.sweep.fit import accuracy_line, constants_of, constants_table, fit_run, measured_ms
from experiments.sweep.run_folder import Cell, RunError, by_length, cells, load
from serve.cost.fit import held_out
from serve.cost.model import Constants

ARM_COLOURS = dict(
    zip(("stable", "varying", "stripped", "restarted", "relocated", "tools-first", "evicted"), COLOURS, strict=True)
)


def draw_position(found: Sequence[Cell], constants: Constants | None, path: Path) -> None:
    """TTFT over the mismatch position: medians with their intervals, the model's curves, lengths named on the lines."""
    figure, axes = subplots()
    longest = max(cell.prompt_tokens for cell in found)
    for colour, (_, row) in zip(cycle(COLOURS), by_length(found), strict=False):
        at = np.array([cell.cached_tokens for cell in row])
        times = np.array([cell.ttft_ms for cell in row])
        spread = np.abs([[c.low_ms for c in row], [c.high_ms for c in row]] - times)
        prompt = row[0].prompt_tokens
        line = "none" if constants else "-"
        axes.errorbar(at, times, spread, fmt="o", markersize=4.5, linewidth=1, linestyle=line, color=colour)
        if constants:
            curve = np.linspace(0, max(at), 200)
            model_ms = [constants.ttft_s(prompt, position) * 1e3 for position in curve]
            axes.plot(curve, model_ms, color=colour, linewidth=1.6, alpha=0.8)
        axes.annotate(
            tokens_label(row[0].point.prompt_tokens),
            (at[0], max(times[0], constants.ttft_s(prompt, at[0]) * 1e3) if constants else times[0]),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=colour,
        )
    axes.set_yscale("log")
    axes.set_xlim(-0.07 * longest, longest * 1.02)
    axes.yaxis.set_major_formatter(time_label)
    step = 2 ** max(0, int(np.log2(longest / 5)))
    axes.set_xticks(range(0, longest + 1, step))
    axes.xaxis.set_major_formatter(tokens_label)
    axes.set_xlabel("mismatch position: tokens before the first that differs")
    axes.set_ylabel("time to first token (log scale)")
    fitted = ", with the fitted cost model" if constants else ""
    axes.set_title(f"TTFT over the mismatch position, by prompt length in tokens{fitted}", fontsize=10, loc="left")
    save(figure, path)


def draw_predicted(found: Sequence[Cell], fitted: dict[str, Any], path: Path) -> None:
    """Predicted over measured times, each point predicted by a fit that has not seen it."""
    figure, axes = subplots(5.0, 5.6)
    measured, predicted = measured_ms(found), held_out([cell.sample() for cell in found]) * 1e3
    ends = np.array([min(measured.min(), predicted.min()) / 1.5, max(measured.max(), predicted.max()) * 1.5])
    axes.fill_between(ends, ends * 0.95, ends * 1.05, color="0.85", linewidth=0)
    axes.plot(ends, ends, color="0.5", linewidth=1)
    for colour, (length, _) in zip(cycle(COLOURS), by_length(found), strict=False):
        chosen = np.array([cell.point.prompt_tokens == length for cell in found])
        axes.scatter(measured[chosen], predicted[chosen], s=22, color=colour, linewidths=0, label=tokens_label(length))
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.xaxis.set_major_formatter(time_label)
    axes.yaxis.set_major_formatter(time_label)
    axes.set_xlabel("measured time to first token (log scale)")
    axes.set_ylabel("predicted, by a fit of other points (log scale)")
    axes.annotate("grey: within 5%", (0.97, 0.04), xycoords="axes fraction", ha="right", color="0.35", fontsize=9)
    axes.legend(title="prompt tokens", frameon=False, loc="upper left", fontsize=9)
    axes.set_title(accuracy_line(fitted), fontsize=9, loc="left")
    save(figure, path)


def draw_arms(found: Sequence[Cell], path: Path) -> None:
    """Each arm's median and interval at the longest prompt; where an arm has positions, the earliest one."""
    longest = max(cell.point.prompt_tokens for cell in found)
    row = [cell for cell in found if cell.point.prompt_tokens == longest]
    by_arm = {arm: min((c for c in row if c.point.arm == arm), key=lambda c: c.cached_tokens) for arm in arms(row)}
    shown = sorted(by_arm.values(), key=lambda cell: cell.ttft_ms)
    figure, axes = subplots(0.9 + 0.5 * len(shown))
    for height, cell in enumerate(shown):
        colour = ARM_COLOURS.get(cell.point.arm, "0.35")
        axes.plot([cell.low_ms, cell.high_ms], [height, height], color=colour, linewidth=5, alpha=0.35)
        axes.plot(cell.ttft_ms, height, "o", color=colour, markersize=8)
        axes.annotate(
            f"{cell.ttft_ms:,.0f} ms, {cell.cached_tokens / cell.prompt_tokens:.1%} cached",
            (cell.high_ms, height),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    axes.set_yticks(range(len(shown)), [f"{c.point.arm} {c.point.place and f'at {c.point.place}'}" for c in shown])
    axes.set_xscale("log")
    axes.set_xlim(min(c.low_ms for c in shown) / 1.5, max(c.high_ms for c in shown) * 8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(time_label)
    axes.set_xlabel("time to first token (log scale): median and 95% interval")
    axes.set_title(f"The arms at {longest:,} prompt tokens", fontsize=10, loc="left")
    save(figure, path)


def arms(found: Sequence[Cell]) -> list[str]:
    """The arms of the cells, once each."""
    return list(dict.fromkeys(cell.point.arm for cell in found))


def draw(folder: Path, console: Console) -> list[Path]:
    """All figures that a run has the points for; the paths written. Raises RunError for a folder without a run."""
    written = []
    found = cells(load(folder))
    if len(arms(found)) > 1:
        written.append(folder / "arms.png")
        draw_arms(found, written[-1])
    varying = [cell for cell in found if cell.point.arm == "varying"]
    if len({cell.cached_tokens for cell in varying}) < 3:
        return written  # no curve, and nothing that a model could be fitted to
    try:
        fitted, _ = fit_run(folder)
    except ValueError as error:
        console.print(f"no cost model: {error}")
        fitted = None
    written.append(folder / "position.png")
    draw_position(varying, constants_of(fitted) if fitted else None, written[-1])
    if fitted:
        console.print(constants_table(fitted))
        written.append(folder / "predicted.png")
        draw_predicted(found, fitted, written[-1])
    return written


def main(argv: list[str] | None = None) -> int:
    """Draw, and say where."""
    cli = argparse.ArgumentParser(prog="python -m experiments.plot", description=__doc__)
    cli.add_argument("run", type=Path, help="a sweep's folder")
    args = cli.parse_args(argv)
    console = Console()
    try:
        written = draw(args.run, console)
    except (RunError, OSError) as error:
        print(f"plot: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for path in written:
        console.print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
