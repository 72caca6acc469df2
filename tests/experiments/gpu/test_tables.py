"""The tables of a GPU's results."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.gpu.tables import attention_table, heading, model_table

ROOT = Path(__file__).parents[3]


def test_every_committed_figure_has_a_row() -> None:
    result = json.loads((ROOT / "experiments/results/gpu/gpu_bench.json").read_text())
    assert heading(result).startswith("NVIDIA H200, bfloat16, JAX ")
    assert attention_table(result).row_count == len(result["prefill"]) + len(result["decode"])
    assert model_table(result).row_count == len(result["forward"]) + len(result["arms"])


def test_a_section_that_failed_has_no_rows() -> None:
    assert attention_table({"prefill": [{"failed": "no figure"}]}).row_count == 0
    assert model_table({}).row_count == 0
