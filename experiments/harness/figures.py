"""How figures look: colours, size, axes, labels, and how one is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The palette of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart; its yellow
# is left out, since it is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
WIDTH, HEIGHT, DPI = 8, 4.6, 160  # inches, and dots an inch


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes ([rows, columns] of Axes, or one Axes), drawn without a display.

    `options` are those of `matplotlib.pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def subplots(height: float = HEIGHT, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure of a README's width, and its plain axes."""
    figure, axes = panels(1, 1, width, height)
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """Draw axes with a faint grid and no box around them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def save(figure: Figure, path: Path) -> None:
    """Write a figure and forget it."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def time_label(ms: float, _: object = None) -> str:
    """A tick of a time axis: `12 ms` or `3.4 s`."""
    return f"{ms / 1e3:g} s" if ms >= 1000 else f"{ms:g} ms"


def tokens_label(tokens: float, _: object = None) -> str:
    """A tick of a token axis: `512` or `16K`."""
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"
