"""Two engines behind the proxy, beside round robin: `python -m experiments.bench.upstreams`.

Agent sessions run at the same time, each turn after the answer to the one before; at the last turn, each sends a few
sub-agents at once, whose prompts begin as their session does. What the engines found cached, by their own usage, and
TTFT are compared. A first run of each arm warms the engines and is left out; then the arms take turns, each first in
every other round. With `--kill`, one engine is killed once half of the turns are answered, and what that costs is
counted. `--engines` names two of `ours` and `llama.cpp`, which needs the `foreign` extra.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from rich.console import Console

from experiments.harness import llama_server
from experiments.harness.client import NoText, Timing, measure
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.harness.server import Server, running_server
from experiments.workloads import sessions
from experiments.workloads.demo_model import write_demo_model
from experiments.workloads.gguf_file import write_gguf
from experiments.workloads.sessions import Session

RESULTS = Path("experiments/results/bench/upstreams.json")
MODEL = Path(".cache/demo-model")
SUBAGENTS = 3
OURS = ("--kv-pool-bytes", "256MiB", "--max-num-seqs", "4", "--max-model-len", "16384")
Choose = Callable[[], str]  # the URL for the next request


@dataclass
class Outcome:
    """What became of an arm's requests."""

    turns: list[Timing] = field(default_factory=list)
    subagents: list[Timing] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def engines(
    names: Sequence[str], model: Path, flags: Sequence[str] = OURS, compiled: bool = False
) -> Iterator[list[Server]]:
    """The engines, each a process on the same model, `compiled` where it can be.

    Raises ValueError for a name that is unknown.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if "llama.cpp" in names:
            write_gguf(model, folder / "model.gguf")
        started = []
        for name in names:
            if name == "ours":
                started.append(stack.enter_context(running_server(model, *flags, compiled=compiled)))
            elif name == "llama.cpp":
                started.append(stack.enter_context(running_server(folder / "model.gguf", program=llama_server.PROGRAM)))
            else:
                raise ValueError(f"unknown engine {name!r}: expected ours or llama.cpp")
        yield started


@contextmanager
def proxy_before(servers: Sequence[Server], model: Path, log: Path | None = None) -> Iterator[Server]:
    """The proxy, as a process, before these engines."""
    flags = [flag for server in servers for flag in ("--upstream", server.url)]
    with running_server(model, *flags, log=log, program=("-m", "serve", "proxy")) as proxy:
        yield proxy


def run(
    choose: Choose, seed: int, count: int, turns: int, scale: float, half: threading.Event | None = None
) -> Outcome:
    """`count` sessions of `turns` turns, all at once. `half` is set once half of the turns are answered."""
    outcome = Outcome()

    def ask(client: httpx.Client, body: dict[str, Any], headers: dict[str, str], into: list[Timing]) -> None:
        try:
            into.append(measure(client, choose(), body | {"max_tokens": 4, "temperature": 0}, headers))
        except NoText:  # there is nothing to time
            pass
        except (RuntimeError, httpx.HTTPError) as error:
            outcome.failures.append(str(error))
        if half and len(outcome.turns) >= count * turns // 2:
            half.set()

    def session(number: int) -> None:
        own = Session(seed=seed + number, folder=f"/home/dev/{seed + number}", group=f"g{seed}", scale=scale)
        headers = sessions.http_headers(own)
        with httpx.Client(timeout=600) as client:
            bodies = list(itertools.islice(sessions.requests(own), turns))
            for body in bodies:
                ask(client, body, headers, outcome.turns)
            with ThreadPoolExecutor(SUBAGENTS) as pool:
                for n in range(SUBAGENTS):
                    sub = sessions.with_question(bodies[-1], 100 * number + n, 40)
                    agent = {"x-claude-code-agent-id": f"{seed}-{number}-{n}"}
                    pool.submit(ask, client, sub, headers | agent, outcome.subagents)

    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(session, number) for number in range(count)]:
            done.result()
    return outcome


def figures(way: str, outcome: Outcome) -> dict[str, Any]:
    """An arm's figures as JSON values."""

    def share(timings: Sequence[Timing]) -> float:
        return round(sum(t.cached_tokens for t in timings) / max(1, sum(t.prompt_tokens for t in timings)), 4)

    ttft = [t.ttft_ms for t in (*outcome.turns, *outcome.subagents)]
    return {
        "way": way,
        "requests": len(ttft),
        "prompt_tokens": round(median(t.prompt_tokens for t in outcome.turns)),
        "cached_share": share(outcome.turns),
        "cached_share_subagents": share(outcome.subagents),
        "ttft_p50_ms": round(median(ttft), 1),
        "ttft_p90_ms": round(quantiles(ttft, n=10)[-1], 1),
        "failures": len(outcome.failures),
    }


def median_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure of an arm."""
    named = {"round": "median", "way": rows[0]["way"]}
    return named | {name: median(row[name] for row in rows) for name in rows[0] if name not in named}


def round_robin(servers: Sequence[Server]) -> Choose:
    """Each engine in turn."""
    turn = itertools.cycle(server.url for server in servers)
    lock = threading.Lock()

    def choose() -> str:
        with lock:
            return next(turn)

    return choose


def killed(servers: Sequence[Server], proxy: Server, args: argparse.Namespace, seed: int) -> Outcome:
    """The outcome of an arm in which the first engine is killed once half of the turns are answered."""
    half = threading.Event()

    def kill() -> None:
        half.wait()
        servers[0].process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run(lambda: proxy.url, seed, args.sessions, args.turns, args.scale, half)
    half.set()
    killer.join()
    return outcome


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.upstreams", description=__doc__)
    parser.add_argument("--engines", nargs=2, default=["ours", "ours"], choices=["ours", "llama.cpp"])
    parser.add_argument("--model", type=Path, default=MODEL, help="a checkpoint; the demo model is made if missing")
    parser.add_argument("--sessions", type=int, default=4, help="at once (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=4, help="of each session (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=0.05, help="of a client's own prompt (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=4, help="of both arms, after one that is left out (default: %(default)s)"
    )
    parser.add_argument("--kill", action="store_true", help="kill the first engine in a last arm")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go (default: %(default)s)")
    args = parser.parse_args()
    if "llama.cpp" in args.engines and (problem := llama_server.missing()):
        sys.exit(f"upstreams: {problem}")
    if not args.model.exists():
        write_demo_model(args.model)
    rows: list[dict[str, Any]] = []
    seeds = itertools.count(1000, 1000)
    with engines(args.engines, args.model, compiled=True) as servers, proxy_before(servers, args.model) as proxy:
        arms: list[tuple[str, Choose]] = [("round robin", round_robin(servers)), ("proxy", lambda: proxy.url)]
        for number in range(args.rounds + 1):
            for way, choose in arms if number % 2 else reversed(arms):
                outcome = run(choose, next(seeds), args.sessions, args.turns, args.scale)
                if number:
                    rows.append({"round": number} | figures(way, outcome))
        if args.kill:
            outcome = killed(servers, proxy, args, next(seeds))
            rows.append({"round": args.rounds + 1} | figures("proxy, one engine killed", outcome))
    medians = [median_of([row for row in rows if row["way"] == way]) for way, _ in arms]
    table = make_table(rows[0], words={"way"})
    for row in [*rows, *medians]:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    write_json(args.out, {"engines": args.engines, "rows": rows, "medians": medians} | provenance(), indent=1)


if __name__ == "__main__":
    main()
