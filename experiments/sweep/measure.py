"""A sweep's measurements: each point in turn on its target, written as they come."""

from __future__ import annotations

import random
import secrets
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.harness.provenance import provenance
from experiments.sweep.config import Config, groups, schedule
from experiments.sweep.prompts import Point, PromptPart, expected_cached, layout, shared
from experiments.sweep.run_folder import Measurement, Run
from experiments.sweep.targets import (
    ATTEMPTS,
    STORED,
    Answer,
    Sizes,
    Target,
    TargetError,
    open_target,
    prepare,
)


def measure_point(target: Target, point: Point, tools_tokens: int, nonce: str) -> Answer:
    """Bring the cache to the state that the arm starts from, then ask and time.

    Raises TargetError after ATTEMPTS failures.
    """
    parts = layout(point, tools_tokens)
    for attempt in range(ATTEMPTS):
        fresh = f"{nonce} {attempt}"
        try:
            if prefix := shared(parts):
                prepare(target, [*prefix, PromptPart("question", 1, place="user")], f"{fresh} first")
            if point.arm == "restarted":
                target.restart()
            elif point.arm == "evicted":
                target.evict(fresh)
            return target.ask(parts, fresh)
        except TargetError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("ATTEMPTS is at least 1")


def sizes_of(group: Sequence[Point]) -> Sizes:
    """The room that a target needs."""
    stored = any(point.arm in STORED for point in group)
    return Sizes(group[0].page_size, max(point.prompt_tokens for point in group), stored)


def work(point: Point, tools_tokens: int) -> int:
    """The cost of a point, in tokens, to estimate the time left."""
    new = point.prompt_tokens - expected_cached(layout(point, tools_tokens))
    return 256 + new * (1 + point.prompt_tokens // 4096)


def run_sweep(config: Config, run: Run, console: Console) -> None:
    """Measure the points that the run lacks.

    Raises TargetError when a target stops answering; all that was measured is in the run.
    """
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    done = run.done
    due = [(group, [item for item in schedule(config, group) if item not in done]) for group in groups(config)]
    total = sum(work(point, config.tools_tokens) for _, items in due for point, _ in items)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        for group, items in due:
            if items:
                measure_group(config, run, group, items, progress, task)
        progress.update(task, description="measured")


def measure_group(
    config: Config,
    run: Run,
    group: Sequence[Point],
    items: Sequence[tuple[Point, int]],
    progress: Progress,
    task: TaskID,
) -> None:
    """Start the target of a model and page size, warm up, and measure the points and repeats of `items` in order."""
    model, tools = group[0].model, config.tools_tokens
    # Makes fresh text new to an endpoint that has seen the run before.
    nonce = secrets.token_hex(8)
    progress.update(task, description="starting")
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(open_target(model, config.target, sizes_of(group), Path(scratch), config.seed)) as target,
    ):
        about = {"model": model, "page_size": group[0].page_size, "target": config.target.kind, **target.about()}
        session = run.begin(started=now(), seed=config.seed, nonce=nonce, **about, **provenance())
        progress.update(task, description="warming up")
        for number, (point, _) in enumerate(random.Random(nonce).choices(items, k=config.warmups)):
            measure_point(target, point, tools, f"{nonce} warm {number}")
        for number, (point, repeat) in enumerate(items):
            progress.update(task, description=f"{point.arm} {point.place} of {point.prompt_tokens:,}")
            answer = measure_point(target, point, tools, f"{nonce} {number}")
            run.append(Measurement(point, repeat, answer, expected_cached(layout(point, tools)), session, now()))
            progress.advance(task, work(point, tools))


def now() -> str:
    """The time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
