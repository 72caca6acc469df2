"""How long a server takes to start: until its port answers, until it is ready, and until the first token.

`python -m experiments.bench.start` starts `python -m serve` again and again, the models and ways to start in turns:
first, with an empty cache of its own; later, with what the first start left there; and later with other limits. The CPU
kernels are built before, and timed by themselves. Seconds are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.harness.server import free_port
from experiments.workloads.demo_model import write_demo_model
from experiments.workloads.random_checkpoint import LLAMA_135M, write_random_checkpoint

RESULTS = Path("experiments/results/bench/start.json")
START_SECONDS = 900
LATER_REQUESTS = 5
FIRST, LATER = "first", "later"
# Later starts with other limits: as fast, if nothing compiled depends on them.
CHANGED = (("--max-num-seqs", "6"), ("--kv-pool-bytes", "700MiB"))
WORDS = "What can be said about the weather, in a few words? " * 8
PHASE = re.compile(r"(\w+) ([\d.]+)[,)]")


@dataclass(frozen=True)
class Start:
    """One start of a server; seconds since its process was made."""

    model: str
    way: str
    health_s: float  # until `/health` answers
    ready_s: float  # until `/ready` does with 200
    cpu_s: float  # of the process and its children, until then
    first_ttft_s: float  # of the first request, which asks for one token
    later_ttft_s: float  # of those after it, each with a prompt of its own: median
    phases: dict[str, float] = field(default_factory=dict)  # seconds, from the server's log; they overlap


@contextmanager
def process(model: Path, cache: Path, log: Path, flags: Sequence[str]) -> Iterator[tuple[str, psutil.Popen]]:
    """A server that starts, with a user's cache of its own; and its URL."""
    port = free_port()
    command = [sys.executable, "-m", "serve", "--model", str(model), "--port", str(port), *flags]
    with log.open("w") as output:
        running = psutil.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"XDG_CACHE_HOME": str(cache)}
        )
    try:
        yield f"http://127.0.0.1:{port}", running
    finally:
        with suppress(psutil.NoSuchProcess):
            running.terminate()
        running.wait(30)


def wait_for(client: httpx.Client, url: str, running: psutil.Popen, log: Path) -> None:
    """Return when a URL answers with 200. Raises RuntimeError if the server ends before, or takes far too long."""
    deadline = time.perf_counter() + START_SECONDS
    while time.perf_counter() < deadline and running.poll() is None:
        try:
            if client.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise RuntimeError(f"{url} did not answer:\n{log.read_text()[-2000:]}")


def cpu_seconds(running: psutil.Popen) -> float:
    """Seconds of all cores that a process has used, and its children that have ended."""
    times = running.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def start(model: Path, way: str, cache: Path, log: Path, flags: Sequence[str]) -> Start:
    """Start a server, send it requests, and stop it."""
    begin = time.perf_counter()
    with process(model, cache, log, flags) as (url, running), httpx.Client(timeout=120, trust_env=False) as client:
        wait_for(client, f"{url}/health", running, log)
        health_s = time.perf_counter() - begin
        wait_for(client, f"{url}/ready", running, log)
        ready_s, cpu_s = time.perf_counter() - begin, cpu_seconds(running)

        first, *later = [ttft_s(client, url, number) for number in range(1 + LATER_REQUESTS)]
    ready = next((line for line in log.read_text().splitlines() if " ready after " in line), "")
    phases = {name: float(seconds) for name, seconds in PHASE.findall(ready)}
    return Start(model.name, way, health_s, ready_s, cpu_s, first, median(later), phases)


def ttft_s(client: httpx.Client, url: str, number: int) -> float:
    """Seconds of a request for one token, with a prompt that no other number has."""
    messages = [{"role": "user", "content": f"Question {number}. {WORDS}"}]
    begin = time.perf_counter()
    response = client.post(f"{url}/v1/messages", json={"model": "any", "max_tokens": 1, "messages": messages})
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text[:500]}")
    return time.perf_counter() - begin


def build_kernels(cache: Path) -> float:
    """Build the CPU kernels into an empty cache: seconds; they are kept apart from what is compiled for a model."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", "from model.kernels.cpu import build; build.available()"]
    subprocess.run(command, check=True, env=os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"})
    return time.perf_counter() - begin


def run_all(models: Sequence[Path], rounds: int, first_rounds: int, scratch: Path) -> tuple[list[Start], float]:
    """All starts, the models and ways in turns; and the seconds to build the kernels."""
    kernels = scratch / "kernels-only"
    built_s = build_kernels(kernels)
    starts = []

    def measured(model: Path, way: str, cache: Path, flags: Sequence[str] = ()) -> None:
        starts.append(start(model, way, cache, scratch / "server.log", flags))

    caches = {model: scratch / f"cache-{model.name}" for model in models}
    for _ in track(range(first_rounds), "first starts"):
        for model, cache in caches.items():
            shutil.rmtree(cache, ignore_errors=True)
            shutil.copytree(kernels, cache)
            measured(model, FIRST, cache)
    for _ in track(range(rounds), "later starts"):
        for model, cache in caches.items():
            measured(model, LATER, cache)
    for flags in CHANGED:
        for model, cache in caches.items():
            measured(model, f"{LATER}, {' '.join(flags)}", cache, flags)
    return starts, built_s


def summarise(starts: Sequence[Start]) -> list[dict[str, Any]]:
    """A row of medians for each model and way."""
    groups: dict[tuple[str, str], list[Start]] = {}
    for each in starts:
        groups.setdefault((each.model, each.way), []).append(each)
    return [row(model, way, group) for (model, way), group in groups.items()]


def row(model: str, way: str, group: Sequence[Start]) -> dict[str, Any]:
    """Medians of some starts."""
    names = ("health_s", "ready_s", "cpu_s", "first_ttft_s", "later_ttft_s")
    medians = {name: round(median(getattr(each, name) for each in group), 3) for name in names}
    phases = {name: median(each.phases.get(name, 0.0) for each in group) for name in group[0].phases}
    ratio = median(each.first_ttft_s / each.later_ttft_s for each in group)
    return {
        "model": model,
        "way": way,
        "starts": len(group),
        **medians,
        "ttft_ratio": round(ratio, 2),
        "phases": phases,
    }


def tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """The medians in seconds as tables: what a user waits for, and the server's phases."""
    times = {
        "/health": "health_s",
        "/ready": "ready_s",
        "CPU": "cpu_s",
        "first TTFT": "first_ttft_s",
        "later TTFT": "later_ttft_s",
    }
    names = list(dict.fromkeys(name for each in rows for name in each["phases"]))
    waits = make_table(("model", "start", *times, "first / later"), words=("model", "start"), title="seconds")
    phases = make_table(("model", "start", *names), words=("model", "start"), title="seconds of each phase")
    for each in rows:
        named = each["model"], each["way"]
        waits.add_row(*named, *(f"{each[name]:.2f}" for name in times.values()), f"{each['ttft_ratio']:.1f}")
        phases.add_row(*named, *(f"{each['phases'].get(name, 0.0):.2f}" for name in names))
    yield from (waits, phases)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.start", description=__doc__.split("\n")[0])
    cli.add_argument("--model", type=Path, action="append", help="a checkpoint; may be repeated (default: makes two)")
    cli.add_argument("--rounds", type=int, default=5, help="later starts of each model (default: %(default)s)")
    cli.add_argument("--first-rounds", type=int, default=3, help="first starts of each model (default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS, help="JSON to write (default: %(default)s)")
    args = cli.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        models = args.model or default_models(scratch)
        starts, built_s = run_all(models, args.rounds, args.first_rounds, scratch)
    rows = summarise(starts)
    Console().print(*tables(rows))
    result = {"kernels_built_s": round(built_s, 2), "medians": rows, "starts": [asdict(each) for each in starts]}
    write_json(args.out, result | provenance())


def default_models(folder: Path) -> list[Path]:
    """The demo model, and a llama of 135M weights with its tokenizer."""
    demo, llama = folder / "demo-5.8M", folder / "llama-135M"
    write_demo_model(demo)
    write_random_checkpoint(llama, LLAMA_135M, demo)
    return [demo, llama]


if __name__ == "__main__":
    main()
