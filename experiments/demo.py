"""The project's story on your own hardware: one real server, one agent prompt, four arms, one table.

`make demo` runs `python -m experiments.demo --model DIR`. Every request is an agent's prompt with a fresh question at
its end. An arm is one condition; the arms differ in what the prompt starts with: nothing (stable), a fresh billing
header that is kept (varying), or a fresh one that the server strips (stripped). Then the server is restarted on the
same store a few times, and each time asked once without a header (restarted). The goal for that is the time of a warm
request and of reading the pages at 60% of the disk's sequential rate, which is measured on a file that is not in
memory.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.harness.client import Timing, count_tokens, measure, scrape
from experiments.harness.disk import sequential_rate
from experiments.harness.figures import COLOURS, save, subplots, time_label
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.harness.server import Server, running_server
from experiments.workloads.sessions import Session, billing_header, stable_request, with_header, with_question
from experiments.workloads.synthetic import Json

RESULTS = Path("experiments/results/demo")
# NVIDIA Dynamo's published means: a 52K-token prompt, Nemotron-3-Super-120B on one B200.
PUBLISHED_MS = {"stable": 168, "varying": 912, "stripped": 169}
OUTPUT_TOKENS = 8
# Of the disk's sequential rate: what reading pages back may take in the bound for a restarted server.
READING_SHARE = 0.6
PAGE_TOKENS = 64  # the server's default


@dataclass(frozen=True)
class Arm:
    """One condition: whether prompts have a header, which rules the server applies, and how often it is measured."""

    name: str
    header: bool
    rules: str
    repeats: int


ARMS = (
    Arm("stable", header=False, rules="strip-preamble", repeats=15),
    Arm("varying", header=True, rules="none", repeats=5),
    Arm("stripped", header=True, rules="strip-preamble", repeats=15),
)
RESTARTED = Arm("restarted", header=False, rules="strip-preamble", repeats=5)


@dataclass(frozen=True)
class Reading:
    """What a restarted server took from its store for one request, and the disk's sequential rate."""

    bytes: int
    bytes_per_s: float

    @property
    def bound_ms(self) -> float:
        """The time that reading may take."""
        return 1e3 * self.bytes / (READING_SHARE * self.bytes_per_s)


def schedule(arms: tuple[Arm, ...], rng: random.Random) -> Iterator[Arm]:
    """One cold request for each arm, then all repeats in rounds, each round in a new random order."""
    yield from arms
    for number in range(max(arm.repeats for arm in arms)):
        due = [arm for arm in arms if number < arm.repeats]
        yield from rng.sample(due, len(due))


def body(arm: Arm, prompt: Json, rng: random.Random) -> Json:
    """The arm's next request: the same prompt, a fresh question, and a fresh header where the arm has one."""
    asked = with_question(prompt, rng.getrandbits(32)) | {"max_tokens": OUTPUT_TOKENS, "temperature": 0}
    return with_header(asked, billing_header(rng)) if arm.header else asked


def prompts_of(arms: tuple[Arm, ...], tokens: int, seed: int, count: Callable[[Json], int]) -> dict[str, Json]:
    """The prompt of each arm, of a session of its own: no arm finds another's prefix in the cache.

    `count` counts a prompt's tokens. Raises SystemExit for a length that no prompt of an agent has.
    """
    sessions = [Session(seed=seed + i, folder=f"/home/dev/{arm.name}", num_tools=20) for i, arm in enumerate(arms)]
    try:
        return {arm.name: stable_request(session, tokens, count) for arm, session in zip(arms, sessions, strict=True)}
    except ValueError as error:
        sys.exit(
            f"demo: --tokens: expected a length that an agent's prompt can have, such as 8000, got {tokens}: {error}"
        )


def run(
    server: Server, tokens: int, arms: tuple[Arm, ...], seed: int, progress: Progress
) -> tuple[dict[str, list[Timing]], Json]:
    """Measure every arm against a running server; the first timing of each is its cold request.

    Returns the timings by arm, and the prompt of the first arm.
    """
    rng = random.Random(seed)
    timings: dict[str, list[Timing]] = {arm.name: [] for arm in arms}
    with httpx.Client(timeout=600) as client:
        prompts = prompts_of(arms, tokens, seed, lambda request: count_tokens(client, server.url, request))
        order = list(schedule(arms, rng))
        task = progress.add_task("measuring", total=len(order))
        for arm in order:
            cold = "cold" if not timings[arm.name] else "warm"
            progress.update(task, description=f"{arm.name} ({cold})")
            request = body(arm, prompts[arm.name], rng)
            timings[arm.name].append(measure(client, server.url, request, {"x-tokenzero-normalize": arm.rules}))
            progress.advance(task)
        progress.update(task, description="measured")
    return timings, prompts[arms[0].name]


def run_restarted(
    flags: list[str], log: Path, prompt: Json, seed: int, progress: Progress
) -> tuple[list[Timing], Reading]:
    """Restart the server for each repeat and ask once: the prompt's pages are on disk, the device is empty.

    Returns the timings, and the size of what each of them took from the store.
    """
    rng, timings, sizes, rates = random.Random(seed), [], [], []
    for _ in progress.track(range(RESTARTED.repeats), description="restarted"):
        with running_server(*flags, log=log, compiled=True) as server, httpx.Client(timeout=600) as client:
            timings.append(measure(client, server.url, body(RESTARTED, prompt, rng)))
            figures = scrape(client, server.url)
        names = ("tier_bytes_read", "tier_hits", "restored_tokens")
        read, pages, tokens = (figures[f'tokenzero_{name}_total{{tier="disk"}}'] for name in names)
        # The server also preloads what other arms have stored.
        sizes.append(round(read / pages * -(-tokens // PAGE_TOKENS)))
        rates.append(sequential_rate(log.parent, sizes[-1]))
    return timings, Reading(round(median(sizes)), median(rates))


def summarise(timings: dict[str, list[Timing]], reading: Reading, resident_bytes: int) -> dict[str, Any]:
    """The figures of a run as JSON values: cold requests separately, medians over the repeats."""
    arms: dict[str, dict[str, Any]] = {}
    for name, (cold, *repeats) in timings.items():
        times = [round(t.ttft_ms, 2) for t in repeats]
        arms[name] = {
            "cold_ms": round(cold.ttft_ms, 2),
            "ttft_ms": times,
            "median_ms": round(median(times), 2),
            "cached_tokens": [t.cached_tokens for t in repeats],
            "prompt_tokens": [t.prompt_tokens for t in repeats],
        }
    stable = arms["stable"]["median_ms"]
    return {
        "prompt_tokens": round(median(arms["stable"]["prompt_tokens"])),
        "arms": arms,
        "ratios": {
            "varying_over_stable": round(arms["varying"]["median_ms"] / stable, 3),
            "stripped_over_stable": round(arms["stripped"]["median_ms"] / stable, 3),
            "restarted_over_stable": round(arms["restarted"]["median_ms"] / stable, 3),
        },
        "restarted": {
            "bytes_read": reading.bytes,
            "disk_mb_per_s": round(reading.bytes_per_s / 1e6),
            "bound_ms": round(stable + reading.bound_ms, 2),
        },
        "published_ms": PUBLISHED_MS,
        "server_resident_mib": round(resident_bytes / 2**20),
    }


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    title = f"TTFT in ms, agent prompt of {summary['prompt_tokens']:,} tokens, {summary['dtype']}"
    columns = ("arm", "n", "median", "min", "max", "reused", "over stable", "NVIDIA's")
    grid = make_table(columns, words=("arm",), title=title)
    for name, arm in summary["arms"].items():
        times = arm["ttft_ms"]
        grid.add_row(
            name,
            str(len(times)),
            *(f"{ms:,.0f}" for ms in (arm["median_ms"], min(times), max(times))),
            f"{median(arm['cached_tokens']):,.0f}",
            f"{arm['median_ms'] / summary['arms']['stable']['median_ms']:.2f}",
            f"{PUBLISHED_MS[name] / PUBLISHED_MS['stable']:.2f}" if name in PUBLISHED_MS else "",
        )
    stable, varying, stripped = PUBLISHED_MS.values()
    grid.caption = f"NVIDIA Dynamo on one B200, 52K tokens: {varying}/{stable} ms and {stripped}/{stable} ms"
    return grid


def verdict(summary: dict[str, Any]) -> str:
    """The restarted arm and its bound, in a line."""
    restarted, arms = summary["restarted"], summary["arms"]
    found, bound = arms["restarted"]["median_ms"], restarted["bound_ms"]
    return (
        f"restarted: {found:,.0f} ms, bound {bound:,.0f} ms ({'kept' if found <= bound else 'missed'}): "
        f"{arms['stable']['median_ms']:,.0f} ms warm and {restarted['bytes_read'] / 1e6:,.0f} MB "
        f"at {READING_SHARE:.0%} of the disk's {restarted['disk_mb_per_s']:,} MB/s"
    )


def draw(summary: dict[str, Any], path: Path) -> None:
    """Every request of every arm on a logarithmic axis, medians named."""
    colours = dict(zip(("stable", "varying", "stripped", "restarted"), COLOURS, strict=False))
    notes = {
        "stable": "no header",
        "varying": "fresh header, kept",
        "stripped": "fresh header, stripped",
        "restarted": "no header, new process",
    }
    figure, axes = subplots(3.8)
    axes.grid(False, axis="y")
    jitter = random.Random(0)
    for row, (name, arm) in enumerate(summary["arms"].items()):
        heights = [row + jitter.uniform(-0.14, 0.14) for _ in arm["ttft_ms"]]
        axes.scatter(arm["ttft_ms"], heights, s=26, color=colours[name], alpha=0.55, linewidths=0)
        axes.plot([arm["median_ms"]] * 2, [row - 0.28, row + 0.28], color=colours[name], linewidth=2.5)
        axes.annotate(
            f"median {arm['median_ms']:,.0f} ms",
            (arm["median_ms"], row - 0.3),
            ha="center",
            va="bottom",
            color=colours[name],
        )
    axes.set_yticks(range(len(notes)), [f"{name}\n({note})" for name, note in notes.items()])
    axes.set_ylim(len(notes) - 0.5, -0.75)
    axes.set_xscale("log")
    low = min(min(arm["ttft_ms"]) for arm in summary["arms"].values())
    high = max(max(arm["ttft_ms"]) for arm in summary["arms"].values())
    axes.set_xlim(low / 2, high * 2)
    axes.xaxis.set_major_formatter(time_label)
    axes.set_xlabel("time to first token (log scale)")
    ratios = summary["ratios"]
    axes.set_title(
        f"One changing line before {summary['prompt_tokens']:,} tokens costs {ratios['varying_over_stable']:.0f} times "
        f"the TTFT; stripped, {ratios['stripped_over_stable']:.2f} times",
        fontsize=10,
        loc="left",
    )
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Start the server, measure, print the table, write picture and summary."""
    cli = argparse.ArgumentParser(prog="python -m experiments.demo", description=__doc__.split("\n")[0])
    cli.add_argument(
        "--model", required=True, help="checkpoint folder, such as `python -m experiments.demo_model DIR` writes"
    )
    cli.add_argument("--tokens", type=int, default=52_000, help="length of the prompt (default: 52000)")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--out", type=Path, default=RESULTS, help=f"folder for the results (default: {RESULTS})")
    args = cli.parse_args(argv)
    console = Console()
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn())
    with (
        tempfile.TemporaryDirectory() as scratch,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
    ):
        starting = progress.add_task("starting the server", total=1)
        log, flags = Path(scratch) / "server.log", [args.model, "--store", f"{scratch}/store"]
        with running_server(*flags, log=log, compiled=True) as server:
            progress.advance(starting)
            timings, prompt = run(server, args.tokens, ARMS, args.seed, progress)
            resident = server.resident_bytes()
            health = httpx.get(f"{server.url}/health").json()
        cold = timings["stable"][0]  # what a restart without a store costs
        restarted, reading = run_restarted(flags, log, prompt, args.seed + 100, progress)
        summary = summarise(timings | {"restarted": [cold, *restarted]}, reading, resident)
    summary = summary | {"dtype": health["dtype"], "device": health["device"], "seed": args.seed} | provenance()
    write_json(args.out / "summary.json", summary)
    draw(summary, args.out / "ttft.png")
    console.print(table(summary))
    console.print(verdict(summary))
    console.print(f"server's memory {summary['server_resident_mib']:,} MiB; results in {args.out}")


if __name__ == "__main__":
    main()
