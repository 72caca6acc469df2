"""How far a start is: its phases, what each has done and the seconds it took, for `/ready`, terminal and log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

OnProgress = Callable[[int, int], None]  # is called with what is done and the total


def progress_bars() -> Progress | None:
    """A bar for each phase on the terminal; None where standard error is not one."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=console)
    bars.start()
    return bars


@dataclass
class Phase:
    """One phase of a start; only the thread that runs it writes."""

    name: str
    begun: float  # seconds, `time.perf_counter`
    done: int = 0
    total: int = 0  # 0: unknown
    seconds: float | None = None  # that it took, once it has ended


class StartProgress:
    """The phases of a start in the order in which they began; several may run at the same time."""

    def __init__(self, bars: Progress | None = None) -> None:
        self.bars, self.phases = bars, list[Phase]()

    @contextmanager
    def phase(self, name: str) -> Iterator[OnProgress]:
        """Run a phase; what it yields takes its progress. A phase that raises does not end."""
        phase = Phase(name, time.perf_counter())
        self.phases.append(phase)
        bar = self.bars.add_task(name, total=None) if self.bars else None

        def on_progress(done: int, total: int) -> None:
            phase.done, phase.total = done, total
            if self.bars and bar is not None:
                self.bars.update(bar, completed=done, total=total)

        yield on_progress
        phase.seconds = time.perf_counter() - phase.begun
        on_progress(phase.total or 1, phase.total or 1)

    def report(self) -> dict[str, Any]:
        """What `/ready` says before the end: the phases under way, with what is done of the total where it is known."""
        now = time.perf_counter()
        running = [
            {"phase": phase.name, "seconds": round(now - phase.begun, 3)}
            | ({"done": phase.done, "total": phase.total} if phase.total else {})
            for phase in list(self.phases)
            if phase.seconds is None
        ]
        return {"status": "starting", "phases": running}

    def close(self) -> None:
        """Take the bars off the terminal's live region."""
        if self.bars:
            self.bars.stop()

    def summary(self) -> str:
        """The seconds since the process began, and of each phase; those of different threads overlap."""
        ended = [f"{phase.name} {phase.seconds:.2f}" for phase in self.phases if phase.seconds is not None]
        return f"{time.time() - psutil.Process().create_time():.2f} s ({', '.join(ended)})"
