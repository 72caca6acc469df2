"""What rounding costs, measured on a tiny model: every row is there, and more bits come nearer."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.quality import rounding
from experiments.quality.agreement import ALL
from experiments.workloads.demo_model import TINY, write_demo_model


def test_weights_and_pages_are_compared_and_more_bits_come_nearer(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "demo", config=TINY)
    out = tmp_path / "rounding.json"
    rounding.main(["--model", str(tmp_path / "demo"), "--tokens", "400", "--out", str(out)])
    written = json.loads(out.read_text())
    rows = {row["rounded"]: row for row in written["rows"] if row["text"] == ALL}
    assert list(rows) == ["weights int8", "weights int4", "KV pages int8", "KV pages fp8"]
    assert 0 < rows["weights int8"]["kl"] < rows["weights int4"]["kl"]
    assert 0 < rows["KV pages int8"]["kl"] < rows["KV pages fp8"]["kl"]
    assert rows["KV pages int8"]["tokens_over_float32"] > rows["weights int8"]["tokens_over_float32"] == 1
    for name, goals in rounding.GOALS.items():
        row = rows[name]
        reached = all(row[key] < goal if key == "kl" else row[key] >= goal for key, goal in goals.items())
        assert written["reached"][name] == reached
