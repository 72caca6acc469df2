"""The share of a compiled program's time that it spends in its custom calls, from JAX's profiler."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

Interval = tuple[float, float]  # begin and end, in one unit

# What XLA's CPU runtime calls the run of a program, and of a loop's body in it; a small program has the second name.
PROGRAMS = ("ThunkExecutor::Execute", "CommonPjRtLoadedExecutable::ExecuteHelperOnSingleDevice")
KERNELS = ("ffi_call", "custom-call")  # how the names of its custom calls begin


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as disjoint intervals, in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def share(programs: Iterable[Interval], kernels: Iterable[Interval]) -> float | None:
    """The kernels' share of the programs that run any; None if none does. Threads that overlap count once."""
    inside = merged(kernels)
    with_kernels = [(begin, end) for begin, end in merged(programs) if any(a < end and b > begin for a, b in inside)]
    if not with_kernels:
        return None
    return min(1.0, sum(b - a for a, b in inside) / sum(b - a for a, b in with_kernels))


def kernel_share(run: Callable[[], object]) -> float | None:
    """The share of custom calls in the programs that `run` executes on a CPU; None if the profile shows none."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        programs, kernels = list[Interval](), list[Interval]()
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for event in (event for line in plane.lines for event in line.events):
                    interval = (event.start_ns, event.start_ns + event.duration_ns)
                    if event.name in PROGRAMS:
                        programs.append(interval)
                    elif event.name.startswith(KERNELS):
                        kernels.append(interval)
    return share(programs, kernels)
