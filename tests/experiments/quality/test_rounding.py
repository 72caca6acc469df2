"""What rounding costs, measured on a tiny model: every row is there, and more bits come nearer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from experiments.quality import rounding
from experiments.quality.agreement import ALL
from experiments.workloads.demo_model import TINY, write_demo_model
from model.quantized import by_input, dequantize
from tests.helpers.quantized import quantized_params
from tests.model.test_cpu_layers import PLAIN, random_params


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

    # A checkpoint in full precision has no steps within which its weights could be spread.
    rounding.main(["--model", str(tmp_path / "demo"), "--tokens", "400", "--kv-dtypes", "--spread", "--out", str(out)])
    spread = {row["rounded"]: row for row in json.loads(out.read_text())["rows"] if row["text"] == ALL}
    assert spread == {name: rows[name] for name in ("weights int8", "weights int4")}


def test_spread_weights_lie_anywhere_within_half_a_step() -> None:
    params = quantized_params(random_params(PLAIN), 4, group=32)
    whole, spread = params.layers[0].down, rounding.spread_weights(params).layers[0].down
    steps = np.asarray((spread - dequantize(whole)) / by_input(whole, whole.scales))
    assert np.abs(steps).max() < 0.501
    np.testing.assert_allclose(np.quantile(steps, [0.25, 0.5, 0.75]), [-0.25, 0, 0.25], atol=0.02)
