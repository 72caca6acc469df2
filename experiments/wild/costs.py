"""What a computed token costs: an 8B llama on an H200, and the demo model on two cores, both by measured constants."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import numpy as np

from serve.cost.file import CostFile
from serve.cost.model import Constants

H200 = Path("experiments/configs/routing.toml")  # says from which measurements its constants are
DEMO = Path("experiments/results/sweeps/position/cost_model.json")


def machines() -> dict[str, Constants]:
    """The cost models by name: h200 and demo."""
    engine = tomllib.loads(H200.read_text())["engine"]
    h200 = Constants(**{name: engine[name] for name in ("fixed", "linear", "attention", "match")})
    return {"h200": h200, "demo": msgspec.json.decode(DEMO.read_bytes(), type=CostFile).constants}


def prefill_ms(costs: Constants, rows: np.ndarray, block: int = 64) -> np.ndarray:
    """Milliseconds to compute the blocks of each prompt that are not reused, [requests] float64."""
    stop, start = rows["blocks"].astype(float) * block, rows["reused"].astype(float) * block
    return span_ms(costs, start, stop)


def span_ms(costs: Constants, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Milliseconds to compute tokens [start, stop) of prompts, [requests] float64 each."""
    ms: np.ndarray = 1000 * (costs.linear * (stop - start) + costs.attention * (stop**2 - start**2) / 2)
    return ms
