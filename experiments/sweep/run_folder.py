"""The folder of a run: its config, where it was measured, one JSON line for each measurement, and their medians.

`config.toml` is a copy, `run.json` holds the provenance of every session that measured, `measurements.jsonl` grows by a
line at a time and survives a kill.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from rich.table import Table

from experiments.harness.report import make_table
from experiments.sweep.prompts import Point
from experiments.sweep.targets import Answer
from serve.cost.fit import Sample


class RunError(Exception):
    """A run's folder cannot be used."""


@dataclass(frozen=True)
class Measurement:
    """One line of a run: a point, measured for the `repeat`-th time."""

    point: Point
    repeat: int
    answer: Answer
    expected_cached: int
    session: int  # index into run.json's sessions
    time: str  # UTC


@dataclass(frozen=True)
class Cell:
    """A point and all that was measured of it: medians, and a 95% bootstrap interval of the median TTFT."""

    point: Point
    ttft_ms: float
    low_ms: float
    high_ms: float
    prompt_tokens: int
    cached_tokens: int  # as the target reported, or as the layout has it
    restored_tokens: int
    repeats: int

    def sample(self) -> Sample:
        """The cell as the cost model takes it, in seconds."""
        return Sample(self.prompt_tokens, self.cached_tokens, self.restored_tokens, self.ttft_ms / 1e3)


class Run:
    """A run's folder, opened to go on with it."""

    def __init__(self, folder: Path, config: bytes) -> None:
        """Make the folder, or open what an earlier session left; a half-written last line is dropped.

        Raises RunError if the folder holds another config's run, or something else.
        """
        self.folder, self.path = folder, folder / "measurements.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / "config.toml"
        if not copy.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} holds other files but not a run: name another folder with --out")
        self.path.touch()
        with self.path.open("r+b") as file:
            whole = file.read()
            file.truncate(whole.rfind(b"\n") + 1)
        self.measured = load(folder)
        if self.measured and copy.read_bytes() != config:
            raise RunError(f"{folder} holds a run of another config: name another folder with --out")
        copy.write_bytes(config)
        about = folder / "run.json"
        self.sessions: list[dict[str, Any]] = json.loads(about.read_text())["sessions"] if about.exists() else []

    @property
    def done(self) -> set[tuple[Point, int]]:
        """The points and repeats that are measured."""
        return {(m.point, m.repeat) for m in self.measured}

    def begin(self, **about: Any) -> int:
        """Record the provenance of a session that measures from here on; returns the session's number."""
        self.sessions.append(about)
        scratch = self.folder / "run.json.new"
        scratch.write_text(json.dumps({"sessions": self.sessions}, indent=2) + "\n")
        scratch.replace(self.folder / "run.json")
        return len(self.sessions) - 1

    def append(self, measurement: Measurement) -> None:
        """Add a line, and have it on disk before returning."""
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(measurement) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.measured.append(measurement)


def load(folder: Path) -> list[Measurement]:
    """The measurements of a run's folder. Raises RunError for a folder without a run, or for a line that is not one."""
    path, found = folder / "measurements.jsonl", []
    if not path.is_file():
        raise RunError(f"{folder} holds no run: it has no {path.name}; `python -m experiments.sweep CONFIG` makes one")
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):  # the last one may be half written
            try:
                found.append(msgspec.json.decode(line, type=Measurement))
            except msgspec.MsgspecError as error:
                raise RunError(f"{path}, line {number}: {error}") from None
    return found


def cells(measurements: Sequence[Measurement], seed: int = 0) -> list[Cell]:
    """The medians of each point, sorted by the point."""
    by_point: dict[Point, list[Measurement]] = {}
    for measurement in measurements:
        by_point.setdefault(measurement.point, []).append(measurement)
    made = []
    for point, repeats in sorted(by_point.items(), key=lambda item: order(item[0])):
        times = [m.answer.ttft_ms for m in repeats]
        cached = [m.expected_cached if m.answer.cached_tokens is None else m.answer.cached_tokens for m in repeats]
        low, high = median_interval(times, seed)
        made.append(
            Cell(
                point,
                median(times),
                low,
                high,
                round(median(m.answer.prompt_tokens for m in repeats)),
                round(median(cached)),
                round(median(m.answer.restored_tokens for m in repeats)),
                len(repeats),
            )
        )
    return made


def order(point: Point) -> tuple[str | int, ...]:
    """Sort key: points of one arm together, by length and position."""
    place = point.position if point.place else 0
    return (
        point.model,
        point.page_size,
        point.arm,
        point.prompt_tokens,
        place,
        point.header_tokens,
        point.suffix_tokens,
    )


def median_interval(values: Sequence[float], seed: int = 0, rounds: int = 2000) -> tuple[float, float]:
    """A 95% interval of the median, by the percentile bootstrap."""
    drawn = np.random.default_rng(seed).choice(np.asarray(values), (rounds, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def summary(found: Sequence[Cell]) -> list[dict[str, Any]]:
    """The cells as JSON values."""
    return [asdict(cell) for cell in found]


def by_length(found: Sequence[Cell]) -> Iterator[tuple[int, list[Cell]]]:
    """The cells of each prompt length, the shortest first, sorted by cached tokens."""
    for length in sorted({cell.point.prompt_tokens for cell in found}):
        yield length, sorted((c for c in found if c.point.prompt_tokens == length), key=lambda c: c.cached_tokens)


def table(found: Sequence[Cell]) -> Table:
    """The medians, as printed."""
    columns = ("arm", "position", "prompt", "cached", "TTFT, ms", "95% interval", "n")
    grid = make_table(columns, words=("arm",), no_wrap=True)
    for cell in found:
        interval = f"{cell.low_ms:,.1f} - {cell.high_ms:,.1f}"
        counts = (f"{cell.prompt_tokens:,}", f"{cell.cached_tokens:,}", f"{cell.ttft_ms:,.1f}")
        grid.add_row(cell.point.arm, cell.point.place, *counts, interval, str(cell.repeats))
    return grid
