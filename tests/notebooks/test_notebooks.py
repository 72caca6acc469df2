"""Every notebook runs, and what is committed of its output belongs to its code and to the results folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
RESULTS = 'tags=["results"]'  # of cells whose text follows from experiments/results alone


@cache
def run(path: Path) -> subprocess.CompletedProcess[str]:
    """A notebook's code, run as a script with as little measured as possible."""
    environment = os.environ | {"TOKENZERO_SMOKE": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True)


def cells(path: Path) -> list[tuple[str, str]]:
    """The head and the text of each cell of the text half."""
    parts = re.split(r"^# %%(.*)$", path.read_text(), flags=re.MULTILINE)[1:]
    return [(head, text.strip()) for head, text in zip(parts[::2], parts[1::2], strict=True)]


def committed(path: Path) -> list[dict[str, Any]]:
    """The cells of the half with outputs."""
    return json.loads(path.with_suffix(".ipynb").read_text())["cells"]


def printed(cell: dict[str, Any]) -> str:
    """What a cell printed."""
    streams = (output["text"] for output in cell.get("outputs", ()) if output["output_type"] == "stream")
    return "".join("".join(text) for text in streams)


def unsupported(said: str, now: str) -> list[str]:
    """The lines of a committed output that a run does not print now."""
    lines = {line.rstrip() for line in now.splitlines()}
    return [line for line in said.splitlines() if line.strip() and line.rstrip() not in lines]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    ended = run(path)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_notebook_is_of_this_code_and_has_outputs(path: Path) -> None:
    code = ["".join(cell["source"]) for cell in committed(path) if cell["cell_type"] == "code"]
    written = [text for head, text in cells(path) if "[markdown]" not in head]
    assert [text.strip() for text in code] == written
    assert any(cell.get("outputs") for cell in committed(path))
    for cell in committed(path):
        assert not any(output["output_type"] == "error" for output in cell.get("outputs", ()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_text_is_that_of_the_text_half(path: Path) -> None:
    texts = ["".join(cell["source"]) for cell in committed(path) if cell["cell_type"] == "markdown"]
    marked = [text for head, text in cells(path) if "[markdown]" in head]
    assert texts == [re.sub(r"^# ?", "", text, flags=re.MULTILINE) for text in marked]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_committed_output_contradicts_the_results_folder(path: Path) -> None:
    said = [printed(cell) for cell, (head, _) in zip(committed(path), cells(path), strict=True) if RESULTS in head]
    assert any(said), "no cell is tagged as printing results"
    assert not unsupported("\n".join(said), run(path).stdout)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_cell_that_prints_results_is_tagged(path: Path) -> None:
    for head, text in cells(path):
        reads = re.search(r"sweep\(|experiments/results/.*read_text", text) and "console.print" in text
        assert RESULTS in head or not reads, text


def test_an_output_of_other_results_is_found() -> None:
    assert unsupported("stable  207 ms\n\nvarying  912 ms", "stable  207 ms \nvarying  913 ms") == ["varying  912 ms"]
