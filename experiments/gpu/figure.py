"""The figure of `experiments.gpu_bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.gpu.provenance import Json
from experiments.harness.figures import panels, save


def draw(result: Json, path: Path) -> None:
    """Draw what was measured: prefill and decode with the baselines and ceilings of the same run, and the arms."""
    figure, axes = panels(1, 3, 15, 4.5, width_ratios=(4, 2, 1))
    limits: Json = next(iter(result.get("ceilings", [])), {})
    shown: tuple[tuple[str, str, str, float, str, Callable[[Json], str]], ...] = (
        ("prefill", "by share cached", "flops", 1e12, "TFLOP/s", share_cached),
        ("decode", "by sequences", "bytes_per_s", 1e9, "GB/s", lambda row: f"batch {row['batch']}"),
    )
    for ax, (name, order, key, unit, label, tick) in zip(axes[:2], shown, strict=True):
        rows = [row for row in result.get(name, []) if key in row]
        at = np.arange(len(rows))
        series = {"tokenzero, paged": [row[key] / unit for row in rows]}
        for other in ("torch", "jax"):
            values = [row.get(other, {}).get(key, np.nan) / unit for row in rows]
            series |= {} if np.isnan(values).all() else {f"{other}, contiguous": values}
        for i, (who, values) in enumerate(series.items()):
            ax.bar(at + (i - (len(series) - 1) / 2) * 0.28, values, 0.26, label=who)
        if key in limits:
            ax.axhline(limits[key] / unit, color="black", linestyle="--", linewidth=1, label="measured ceiling")
        ax.set_xticks(at, [tick(row) for row in rows], fontsize=7)
        ax.set_ylabel(label)
        ax.set_title(f"attention, {name} {order}")
        ax.set_ylim(top=1.25 * ax.get_ylim()[1])
        ax.legend(fontsize=7, loc="upper left", ncols=2)
    rows = [row for row in result.get("arms", []) if "arm" in row]
    bars = axes[2].bar([row["arm"] for row in rows], [row["seconds"] * 1e3 for row in rows])
    axes[2].bar_label(bars, fmt="{:,.0f}")
    axes[2].set_ylabel("ms to the first token")
    axes[2].set_title(f"{rows[0]['prompt']:,}-token prompt" if rows else "arms: not measured")
    where = result["provenance"]
    figure.suptitle(f"{where['device']}, {where['dtype']}, jax {where['versions']['jax']}, {where['when'][:10]}")
    save(figure, path)


def share_cached(row: Json) -> str:
    """A prompt's length and cached share, in two short lines."""
    return f"{row['length'] // 1024}K\n" + (f"{row['prefix'] / row['length']:.0%}" if row["prefix"] else "cold")
