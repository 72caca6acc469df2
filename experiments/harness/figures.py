"""How figures look: colours, size, labels, and how one is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Okabe and Ito's palette, told apart by the colour-blind, but for its yellow, which white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
WIDTH, HEIGHT, DPI = 8, 4.6, 160


def subplots(height: float = HEIGHT, width: float = WIDTH) -> tuple[Any, Axes]:
    """A figure of a README's width, and its axes without a box around them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def time_label(ms: float, _: object = None) -> str:
    """12 ms or 3.4 s, as an axis says it."""
    return f"{ms / 1e3:g} s" if ms >= 1000 else f"{ms:g} ms"


def tokens_label(tokens: float, _: object = None) -> str:
    """512 or 16K, as an axis says it."""
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"
