"""`python -m tests.helpers.coverage_by_wing` prints what the last run covered, by wing, and fails below the floors."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from coverage import Coverage
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

# Percent of lines and branches; below what was measured, so that a busy machine does not fail.
FLOORS = {"model": 95, "cache": 96, "serve": 96, "experiments": 80}


def wing_of(path: str) -> str:
    """The wing of a file, named as a path: `serve/engine` of `serve/engine/steps.py`, `model` of all in `model`."""
    top, *rest = Path(path).parts
    return f"{top}/{rest[0]}" if top in ("serve", "experiments") and len(rest) > 1 else top


def covered() -> dict[str, tuple[int, int]]:
    """(covered, all) lines and branches by file, of the data that the last `pytest --cov` left."""
    coverage = Coverage()
    coverage.load()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        coverage.json_report(outfile=str(report))
        files = json.loads(report.read_text())["files"]
    counts = {}
    for path, found in files.items():
        s = found["summary"]
        counts[path] = (s["covered_lines"] + s["covered_branches"], s["num_statements"] + s["num_branches"])
    return counts


def below(files: dict[str, tuple[int, int]]) -> list[str]:
    """A sentence for each top-level package that is below its floor."""
    done, every = Counter[str](), Counter[str]()
    for path, (some, total) in files.items():
        top = Path(path).parts[0]
        done[top], every[top] = done[top] + some, every[top] + total
    shares = {top: 100 * done[top] / every[top] for top in every if every[top]}
    return [
        f"{top}: {share:.1f}% covered, expected at least {FLOORS[top]}%: add tests"
        for top, share in shares.items()
        if share < FLOORS[top]
    ]


def table(files: dict[str, tuple[int, int]]) -> Table:
    """One row a wing: its files, lines and branches, and the share of these that ran."""
    made = Table("wing", box=SIMPLE_HEAD)
    for name in ("files", "lines and branches", "covered"):
        made.add_column(name, justify="right")
    wings: dict[str, list[tuple[int, int]]] = {}
    for path, counts in files.items():
        wings.setdefault(wing_of(path), []).append(counts)
    for wing, counts in sorted(wings.items()):
        some, total = (sum(column) for column in zip(*counts, strict=True))
        made.add_row(wing, str(len(counts)), f"{total:,}", f"{100 * some / total:.0f}%" if total else "")
    return made


def main() -> int:
    """Print the table; 1 if a package is below its floor."""
    files = covered()
    Console().print(table(files))
    wrong = below(files)
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
