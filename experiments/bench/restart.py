"""The first request after a restart beside a warm one, stage by stage: what reading the prefix back costs.

`python -m experiments.bench.restart --model DIR` fills a store, then restarts the server on it a few times in each arm:

    preloaded    the first request comes once the server is idle: pages are preloaded, programs ready
    at once      the first request comes as soon as the server is ready
    read         nothing is preloaded: the first request waits for what is read

Each time one request is asked after the restart, and a few warm ones after that. The table has medians in milliseconds:
of TTFT, of the CPU time of all threads, and of the time in each stage (`experiments.bench.traced`), counted once where
calls overlap.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.bench.traced import STAGES, Span, read_spans
from experiments.harness.client import Timing, count_tokens, measure, scrape
from experiments.harness.disk import drop_from_memory, sequential_rate
from experiments.harness.provenance import provenance
from experiments.harness.report import write_json
from experiments.harness.server import Server, running_server
from experiments.workloads.sessions import Session, stable_request, with_question
from experiments.workloads.synthetic import Json

RESULTS = Path("experiments/results/bench/restart.json")
WARM = 5  # requests after each restart
OUTPUT_TOKENS = 8
SETTLED_SECONDS = 1.0  # without another preloaded page or program
READY_PROGRAMS = 'tokenzero_programs{state="ready"}'
# The flags of each arm.
ARMS: dict[str, tuple[str, ...]] = {"preloaded": (), "at once": (), "read": ("--preload-bytes", "0")}


@dataclass(frozen=True)
class Asked:
    """One request: its timing, and when it was sent and answered with its first token, `time.perf_counter`."""

    timing: Timing
    sent: float
    first: float
    cpu_ms: float  # of all the server's threads, until the end of the answer

    def stages(self, spans: Sequence[Span]) -> dict[str, float]:
        """Milliseconds in each stage until the first token."""
        return {
            stage: round(1e3 * covered([s for s in spans if s.stage == stage], self.sent, self.first), 2)
            for stage in STAGES
        }


def covered(spans: Sequence[Span], start: float, stop: float) -> float:
    """The seconds of [start, stop) in which any of the spans was under way."""
    total, at = 0.0, start
    for span in sorted(spans, key=lambda s: s.start):
        begin, end = max(span.start, at), min(span.stop, stop)
        if end > begin:
            total, at = total + end - begin, end
    return total


def ask(client: httpx.Client, server: Server, prompt: Json, rng: random.Random) -> Asked:
    """Ask a new question after the prompt."""
    asked = with_question(prompt, rng.getrandbits(32)) | {"max_tokens": OUTPUT_TOKENS, "temperature": 0}
    before, sent = cpu_ms(server), time.perf_counter()
    timing = measure(client, server.url, asked)
    used = cpu_ms(server) - before
    # The answer's first event carries the time since the request's last byte.
    first = time.perf_counter() - (timing.total_ms - timing.ttft_ms) / 1e3
    return Asked(timing, max(sent, first - timing.ttft_ms / 1e3), first, used)


def cpu_ms(server: Server) -> float:
    """CPU time that the server's threads have used, milliseconds: steadier than wall time on a busy machine."""
    threads = Path(f"/proc/{server.process.pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e6


def wait_until_idle(client: httpx.Client, url: str) -> None:
    """Return once the server has preloaded no page and readied no program for a while."""
    before, since = (-1.0, -1.0), time.perf_counter()
    while time.perf_counter() - since < SETTLED_SECONDS:
        figures = scrape(client, url)
        if (done := (figures["tokenzero_preloaded_pages"], figures[READY_PROGRAMS])) != before:
            before, since = done, time.perf_counter()
        time.sleep(0.05)


def restart(arm: str, flags: Sequence[str], folder: Path, prompt: Json, rng: random.Random) -> dict[str, Any]:
    """One life of a server on the store: its first request and the warm ones after it."""
    spans_file, log = folder / "spans", folder / "server.log"
    program = ("-m", "experiments.bench.traced", str(spans_file))
    with (
        running_server(flags[0], *flags[1:], *ARMS[arm], log=log, program=program) as server,
        httpx.Client(timeout=600) as client,
    ):
        if arm != "at once":
            count_tokens(client, server.url, {"model": "m", "messages": [{"role": "user", "content": "Hello"}]})
            wait_until_idle(client, server.url)
        first = ask(client, server, prompt, rng)
        figures = scrape(client, server.url)
        warm = [ask(client, server, prompt, rng) for _ in range(WARM)]
    spans = read_spans(spans_file)
    return {
        "restarted": row(first, spans),
        "stable": [row(each, spans) for each in warm],
        "bytes": figures['tokenzero_tier_bytes_read_total{tier="disk"}'],
        "taken": figures['tokenzero_preload_pages_total{event="taken"}'],
        "timeline": timeline(first, spans),
    }


def row(asked: Asked, spans: Sequence[Span]) -> dict[str, Any]:
    """One request as JSON values."""
    counts = {"prompt": asked.timing.prompt_tokens, "cached": asked.timing.cached_tokens}
    return (
        {"ttft": round(asked.timing.ttft_ms, 2), "cpu": round(asked.cpu_ms, 2)}
        | counts
        | {"stages": asked.stages(spans)}
    )


def timeline(asked: Asked, spans: Sequence[Span]) -> list[tuple[str, float, float]]:
    """Stage, start and length in milliseconds since the request was sent, of all spans until its first token."""
    inside = [s for s in spans if s.stop > asked.sent and s.start < asked.first]
    ordered = sorted(inside, key=lambda s: s.start)
    return [(s.stage, round(1e3 * (s.start - asked.sent), 2), round(1e3 * (s.stop - s.start), 2)) for s in ordered]


def summarise(lives: Sequence[dict[str, Any]], tokens: int, disk_rate: float) -> dict[str, Any]:
    """Medians over all lives."""
    first, warm = [life["restarted"] for life in lives], [each for life in lives for each in life["stable"]]

    def middle(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        stages = {stage: round(median(r["stages"][stage] for r in rows), 2) for stage in STAGES}
        return {name: round(median(r[name] for r in rows), 2) for name in ("ttft", "cpu", "prompt", "cached")} | stages

    restarted, stable, size = middle(first), middle(warm), median(life["bytes"] for life in lives)
    return {
        "tokens": tokens,
        "restarted": restarted,
        "stable": stable,
        "ratio": round(
            median(f["ttft"] / median(w["ttft"] for w in life["stable"]) for f, life in zip(first, lives, strict=True)),
            3,
        ),
        "ttft": {
            "restarted": [life["restarted"]["ttft"] for life in lives],
            "stable": [[each["ttft"] for each in life["stable"]] for life in lives],
        },
        "bytes": size,
        "preloaded_pages_taken": median(life["taken"] for life in lives),
        "read_gb_per_s": round(size / 1e6 / max(restarted["read"], 0.01), 2),
        "copy_in_gb_per_s": round(size / 1e6 / max(restarted["copy in"], 0.01), 2),
        "bound_by_memory_ms": round(1e3 * size / copy_rate(int(size)), 2),
        "bound_by_disk_ms": round(1e3 * size / disk_rate, 2),
        "timeline": sorted(lives, key=lambda life: life["restarted"]["ttft"])[len(lives) // 2]["timeline"],
    }


def copy_rate(size: int) -> float:
    """Bytes a second of copying that many bytes in memory that was used before, on one thread."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return size / median(times)


def measure_length(args: argparse.Namespace, tokens: int, progress: Progress) -> list[dict[str, Any]]:
    """Fill a store with a prompt of so many tokens, then restart on it, the arms in turns; a row for each arm."""
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        folder = Path(name)
        flags = [args.model, "--store", f"{folder}/store"]
        task = progress.add_task(f"{tokens:,} tokens", total=args.restarts * len(args.arms) + 1)
        with running_server(*flags, log=folder / "server.log") as server, httpx.Client(timeout=600) as client:
            session = Session(seed=args.seed, folder="/home/dev/stable", num_tools=20)
            prompt = stable_request(session, tokens, lambda request: count_tokens(client, server.url, request))
            for _ in range(3):
                ask(client, server, prompt, rng)
        progress.advance(task)
        lives: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
        for arm in args.arms * args.restarts:
            if args.cold:
                for path in (folder / "store").rglob("data.mdb"):
                    drop_from_memory(path)
            lives[arm].append(restart(arm, flags, folder, prompt, rng))
            progress.advance(task)
        rate = sequential_rate(folder, round(median(life["bytes"] for arm in args.arms for life in lives[arm])))
    return [{"arm": arm} | summarise(found, tokens, rate) | {"cold": args.cold} for arm, found in lives.items()]


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table for each length and arm."""
    for found in rows:
        how = "cold page cache" if found["cold"] else "warm page cache"
        title = f"{found['tokens']:,} tokens, {found['arm']}, {how}: {found['ratio']:.2f}"
        table = Table("ms", "restarted", "stable", title=title)
        for name, value in found["restarted"].items():
            table.add_row(name, f"{value:,.1f}", f"{found['stable'][name]:,.1f}")
        console.print(table)
        console.print(
            f"{found['bytes'] / 1e6:,.0f} MB: read at {found['read_gb_per_s']} GB/s, copied in at "
            f"{found['copy_in_gb_per_s']} GB/s; bound by a copy in memory {found['bound_by_memory_ms']} ms, "
            f"by the disk {found['bound_by_disk_ms']} ms"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.restart", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[52_000, 16_000])
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS])
    parser.add_argument("--cold", action="store_true", help="have the pages come from the disk, not from memory")
    parser.add_argument("--directory", type=Path, default=None, help="for the store (default: the temp folder)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go (default: %(default)s)")
    args = parser.parse_args()
    console = Console(width=110)
    with Progress(console=console) as progress:
        rows = [row for tokens in args.tokens for row in measure_length(args, tokens, progress)]
    show(rows, console)
    command = " ".join(["python -m experiments.bench.restart", *sys.argv[1:]])
    write_json(args.out, {"rows": rows, "command": command} | provenance())


if __name__ == "__main__":
    main()
