"""A soak as a picture: its server's resources and work over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.harness.figures import COLOURS, HEIGHT, WIDTH, panels, plain, save
from experiments.soak.stage import Life, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 60  # points of a rate


def draw(samples: Sequence[Sample], lives: Sequence[Life], path: Path) -> None:
    """Memory, descriptors and threads, answers a second, hits and evictions by tier; a line where a server ended."""
    figure, axes = panels(3, 2, WIDTH * 1.3, 1.7 * HEIGHT, sharex=True)
    memory, open_files, answers, in_use, hits, evicted = axes.flat
    held(
        memory,
        samples,
        [("its own", lambda s: (s.rss - s.mapped) / 2**20), ("with mapped files", lambda s: s.rss / 2**20)],
    )
    held(open_files, samples, [("descriptors", lambda s: s.descriptors), ("threads", lambda s: s.threads)])
    done(answers, samples, ["answers"])
    held(
        in_use,
        samples,
        [("pages in use", lambda s: s.figures["pages_in_use"]), ("running", lambda s: s.figures["running"])],
    )
    tiers = [name.removeprefix("evicted_") for name in samples[-1].figures if name.startswith("evicted_")]
    done(hits, samples, [f"hits_{tier}" for tier in tiers])
    done(evicted, samples, [f"evicted_{tier}" for tier in tiers])
    titles = (
        "Resident memory, MiB",
        "File descriptors and threads",
        "Answers of all routes a second",
        "Pages in use and sequences running",
        "Prompt tokens reused a second, by tier",
        "Pages evicted a second, by tier",
    )
    for place, title in zip(axes.flat, titles, strict=True):
        place.set_title(title, fontsize=10, loc="left")
        if place is not memory:  # whose growth would not be seen from zero
            place.set_ylim(0)
        plain(place)
        for life in lives[:-1]:
            killed = life.end == "kill -9"
            place.axvline(life.ended_s / 60, color="0.5", linewidth=0.8, linestyle=":" if killed else "--")
        if len(place.get_legend_handles_labels()[0]) > 1:
            place.set_ylim(0, 1.3 * place.get_ylim()[1])
            place.legend(frameon=False, fontsize=9, loc="upper left", ncols=3)
    for place in axes[-1]:
        place.set_xlabel("minutes; the server was killed (dotted) or terminated (dashed)")
    save(figure, path)


def held(axes: Axes, samples: Sequence[Sample], lines: Sequence[tuple[str, Callable[[Sample], float]]]) -> None:
    """Draw values, with a gap between two lives."""
    for (name, value), colour in zip(lines, COLOURS, strict=False):
        for n, life in enumerate(by_life(samples)):
            times = [s.at_s / 60 for s in life]
            axes.plot(times, [*map(value, life)], color=colour, linewidth=1.4, label=name if not n else None)


def done(axes: Axes, samples: Sequence[Sample], names: Sequence[str]) -> None:
    """Draw counters as rates, in bins."""
    width = samples[-1].at_s / BINS
    for name, colour in zip(names, COLOURS, strict=False):
        label = name.partition("_")[2] or name
        for n, life in enumerate(by_life(samples)):
            bins: dict[int, list[float]] = {}
            for at, rate in rates(life, name):
                bins.setdefault(int(at / width), []).append(rate)
            times = [(place + 0.5) * width / 60 for place in bins]
            values = [*map(np.mean, bins.values())]
            axes.plot(times, values, color=colour, linewidth=1.4, label=label if not n else None)


def by_life(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each life."""
    return [list(group) for _, group in groupby(samples, lambda s: s.life)]


def rates(life: Sequence[Sample], name: str) -> Iterator[tuple[float, float]]:
    """(seconds, figure a second) between each two samples of one life; a counter starts at 0 in each."""
    for one, other in pairwise(life):
        yield (one.at_s + other.at_s) / 2, (other.figures[name] - one.figures[name]) / (other.at_s - one.at_s)
