"""Sweeps: TTFT over prompt length, header position and all else that a config names, each point measured in turn.

`python -m experiments.sweep CONFIG.toml` measures into a folder; the same command goes on where it was stopped. Points
come in a random order, each right after a request that leaves their shared prefix in the cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.layout import PLACED, Arm, Piece, Point, expected_cached, layout, shared
from experiments.provenance import provenance
from experiments.runs import Cell, Measurement, Run, RunError, cells, summary
from experiments.targets import (
    ARMS,
    ATTEMPTS,
    STORED,
    Answer,
    Sizes,
    Target,
    TargetConfig,
    TargetError,
    open_target,
    prepare,
)

RESULTS = Path("experiments/results/sweeps")

Count = Annotated[int, Meta(ge=1)]


class Axes(Struct, frozen=True, forbid_unknown_fields=True):
    """The config's `[axes]`: every combination is a point."""

    model: Annotated[tuple[str, ...], Meta(min_length=1)]  # a checkpoint folder, or an endpoint's name for it
    prompt_tokens: Annotated[tuple[Count, ...], Meta(min_length=1)]
    arm: Annotated[tuple[Arm, ...], Meta(min_length=1)] = ("varying",)
    position: Annotated[tuple[str | int, ...], Meta(min_length=1)] = ("0%",)
    header_tokens: Annotated[tuple[Count, ...], Meta(min_length=1)] = (32,)
    suffix_tokens: Annotated[tuple[Count, ...], Meta(min_length=1)] = (64,)
    page_size: Annotated[tuple[Count, ...], Meta(min_length=1)] = (64,)


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """A sweep's config file."""

    axes: Axes
    target: TargetConfig = TargetConfig()
    seed: int = 0
    warmups: Annotated[int, Meta(ge=0)] = 3  # measurements that are thrown away, for each model and page size
    repeats: Count = 5
    tools_tokens: Annotated[int, Meta(ge=0)] = 0  # of the stable text: where the arm tools-first puts its header


class ConfigError(Exception):
    """A config asks for what cannot be measured."""


def read_config(text: bytes) -> Config:
    """A config from TOML. Raises ConfigError, naming the field, for whatever cannot be measured."""
    try:
        config = msgspec.toml.decode(text, type=Config)
    except msgspec.MsgspecError as error:
        raise ConfigError(str(error)) from None
    check(config)
    return config


def check(config: Config) -> None:
    """Raise ConfigError for arms, positions and targets that do not go together."""
    axes, target = config.axes, config.target
    if missing := [arm for arm in axes.arm if arm not in ARMS[target.kind]]:
        able = ", ".join(sorted(ARMS[target.kind]))
        raise ConfigError(f"axes.arm: target {target.kind} has no {', '.join(missing)}; it has {able}")
    if not target.own and not target.url:
        raise ConfigError(f"target.url: expected the endpoint's URL for target {target.kind}")
    if not target.own and len(axes.page_size) > 1:
        raise ConfigError(f"axes.page_size: target {target.kind} has its own; leave the axis out")
    for place in axes.position:
        if isinstance(place, str) and not re.fullmatch(r"\d+(\.\d+)?%", place):
            raise ConfigError(f"axes.position: expected a percentage such as '25%' or a count of tokens, got {place!r}")
    for point in points(config):
        size = f"a prompt of {point.prompt_tokens} with {point.header_tokens} of header and {point.suffix_tokens}"
        if point.stable_tokens < 1:
            raise ConfigError(f"axes.prompt_tokens: {size} of suffix has no token left that could be cached")
        if point.arm in PLACED and not 0 <= point.position <= point.stable_tokens:
            raise ConfigError(f"axes.position: {point.place} is outside the {point.stable_tokens} tokens of {size}")
        if point.arm == "tools-first" and not 1 <= config.tools_tokens <= point.stable_tokens:
            raise ConfigError(
                f"tools_tokens: arm tools-first wants 1 to {point.stable_tokens} for {size}, got {config.tools_tokens}"
            )
    if target.own:
        for model in axes.model:
            check_model(model, max(axes.prompt_tokens))


def check_model(model: str, longest: int) -> None:
    """Raise ConfigError if a model is no checkpoint folder, or takes no prompt of this length."""
    try:
        shape = json.loads((Path(model) / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"axes.model: {model} is no checkpoint folder: {error}") from None
    limit = shape.get("max_position_embeddings", 0)
    if limit and longest >= limit:
        raise ConfigError(f"axes.prompt_tokens: {model} takes {limit} tokens, got {longest}")


def points(config: Config) -> list[Point]:
    """Every combination of the axes, once: an arm that says itself where its header stands has no position."""
    axes = config.axes
    product = itertools.product(
        axes.model,
        axes.page_size,
        axes.prompt_tokens,
        axes.header_tokens,
        axes.suffix_tokens,
        axes.arm,
        axes.position,
    )
    made = (
        Point(arm, model, page, length, header, suffix, str(place) if arm in PLACED else "")
        for model, page, length, header, suffix, arm, place in product
    )
    return list(dict.fromkeys(made))


def schedule(config: Config, group: Sequence[Point]) -> list[tuple[Point, int]]:
    """The group's points with the number of the repeat, in rounds, each round in an order of its own."""
    rng = random.Random(repr((config.seed, group[0])))
    return [(point, repeat) for repeat in range(config.repeats) for point in rng.sample(list(group), len(group))]


def groups(config: Config) -> Iterator[list[Point]]:
    """The points of each model and page size: what one target serves without a new start."""
    for _, group in itertools.groupby(points(config), key=lambda point: (point.model, point.page_size)):
        yield list(group)


def measure_point(target: Target, point: Point, tools_tokens: int, nonce: str) -> Answer:
    """Bring the cache to the state that the arm starts from, then ask and time.

    Raises TargetError after ATTEMPTS failures.
    """
    pieces = layout(point, tools_tokens)
    for attempt in range(ATTEMPTS):
        fresh = f"{nonce} {attempt}"
        try:
            if prefix := shared(pieces):
                prepare(target, [*prefix, Piece("question", 1, place="user")], f"{fresh} first")
            if point.arm == "restarted":
                target.restart()
            elif point.arm == "evicted":
                target.evict(fresh)
            return target.ask(pieces, fresh)
        except TargetError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("ATTEMPTS is at least 1")


def sizes_of(group: Sequence[Point]) -> Sizes:
    """What a target needs room for."""
    stored = any(point.arm in STORED for point in group)
    return Sizes(group[0].page_size, max(point.prompt_tokens for point in group), stored)


def work(point: Point, tools_tokens: int) -> int:
    """About how long a point takes, in tokens, for the time that is left."""
    new = point.prompt_tokens - expected_cached(layout(point, tools_tokens))
    return 256 + new * (1 + point.prompt_tokens // 4096)


def run_sweep(config: Config, run: Run, console: Console) -> None:
    """Measure what the run still lacks.

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
    # It makes the fresh text of this session new to an endpoint that has seen the run before.
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
    """The time, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def table(found: Sequence[Cell]) -> Table:
    """The medians, as printed."""
    grid = Table(box=SIMPLE_HEAD)
    grid.add_column("arm", no_wrap=True)
    for column in ("position", "prompt", "cached", "TTFT, ms", "95% interval", "n"):
        grid.add_column(column, justify="right", no_wrap=True)
    for cell in found:
        interval = f"{cell.low_ms:,.1f} - {cell.high_ms:,.1f}"
        counts = (f"{cell.prompt_tokens:,}", f"{cell.cached_tokens:,}", f"{cell.ttft_ms:,.1f}")
        grid.add_row(cell.point.arm, cell.point.place, *counts, interval, str(cell.repeats))
    return grid


def main(argv: list[str] | None = None) -> int:
    """Check, measure, print the medians. Exit status 2 if nothing could be run, 1 if a target died half-way."""
    cli = argparse.ArgumentParser(prog="python -m experiments.sweep", description=__doc__)
    cli.add_argument("config", type=Path, help="a TOML file: see experiments/README.md")
    cli.add_argument("--out", type=Path, help=f"the run's folder (default: {RESULTS}/ and the config's name)")
    args = cli.parse_args(argv)
    folder, console = args.out or RESULTS / args.config.stem, Console()
    try:
        text = args.config.read_bytes()
        config = read_config(text)
        run = Run(folder, text)
    except (ConfigError, RunError, OSError) as error:
        return refuse(f"{args.config}: {error}", 2)
    wanted = len(points(config)) * config.repeats
    try:
        run_sweep(config, run, console)
    except (TargetError, OSError, ValueError) as error:
        if not run.measured:
            return refuse(f"{args.config}: the target does not answer: {error}", 2)
        kept = f"{len(run.measured)} of {wanted} measurements are kept in {folder}"
        return refuse(f"{args.config}: the target stopped answering: {error}; {kept}: the same command goes on", 1)
    except KeyboardInterrupt:
        return refuse(
            f"{len(run.measured)} of {wanted} measurements are kept in {folder}: the same command goes on", 130
        )
    found = cells(run.measured, config.seed)
    (folder / "summary.json").write_text(json.dumps(summary(found), indent=1) + "\n")
    console.print(table(found))
    console.print(f"{len(run.measured)} measurements in {folder}; `python -m experiments.plot {folder}` draws them")
    return 0


def refuse(message: str, status: int) -> int:
    """Print one line and return the exit status."""
    print(f"sweep: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
