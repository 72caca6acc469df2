"""Speculative decoding: prompts of each task, and what is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from experiments.quality.speculation import COPY, EDIT, FREE, measure, table
from experiments.workloads.demo_model import TINY, write_demo_model


@pytest.mark.slow
def test_every_task_is_answered_the_same_with_and_without_drafts(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "demo", config=TINY)
    rows = measure(tmp_path / "demo", (0, 4), 1, 24, Console(quiet=True))
    assert [(row["task"], row["draft_tokens"]) for row in rows] == [
        (task, draft) for task in (COPY, EDIT, FREE) for draft in (0, 4)
    ]
    assert all(row["same"] == row["answers"] == 1 for row in rows)
    assert all(row["accepted_per_step"] == 0 for row in rows if row["draft_tokens"] == 0)
    assert table(rows).row_count == 6
