"""Every notebook runs, and what is committed of its output belongs to its code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    environment = os.environ | {"TOKENZERO_SMOKE": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_notebook_is_of_this_code_and_has_outputs(path: Path) -> None:
    cells = json.loads(path.with_suffix(".ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    parts = re.split(r"^# %%(.*)$", path.read_text(), flags=re.MULTILINE)[1:]
    written = [text.strip() for kind, text in zip(parts[::2], parts[1::2], strict=True) if "[markdown]" not in kind]
    assert [text.strip() for text in code] == written
    assert any(cell.get("outputs") for cell in cells)
    for cell in cells:
        assert not any(output["output_type"] == "error" for output in cell.get("outputs", ()))
