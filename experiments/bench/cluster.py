"""What a cluster costs and saves: TTFT beside one server's, and hit rates of agent sessions by how they are routed.

`python -m experiments.bench.cluster --model DIR`. The first part asks one server and a cluster of one replica, with as
many threads, for a warm prompt of 52,000 tokens, in turn. A request's path is its TTFT without the time in which the
engine has it (queue and prefill), so that it says what the cluster adds, whatever else the machine does. In the second
part eight agents hold their sessions at the same time: on one server, on four replicas that our router chooses among,
and on four in turn; with a prompt of their own and with shared tools, without a store and with one. The four have as
much memory for pages together as the one.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.console import Console

from experiments.harness.client import Timing, count_tokens, measure
from experiments.harness.other_load import start_watch, warning
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.harness.server import Server, running_server
from experiments.workloads.sessions import Session, http_headers, requests, stable_request, with_question
from experiments.workloads.synthetic import Json

RESULTS = Path("experiments/results/bench/cluster.json")
PACKAGES = ("tokenzero", "jax", "jaxlib", "numpy", "ray")
ONE: tuple[str, ...] = ("-m", "serve")
CLUSTER = ("-m", "serve", "cluster")
TOKENS, PAIRS, OUTPUT_TOKENS = 52_000, 15, 8
AGENTS, TURNS, SCALE = 8, 6, 0.1
REPLICAS, POOL_MIB = 4, 512
BEFORE_ENGINE = ("decode", "normalize", "recall", "render", "constrain")
IN_ENGINE = ("queue", "prefill")
SHARED = {"own prompts": "", "shared tools": "one client"}
ROUTED = {"one server": None, "our router": "ttft", "round robin": "round-robin"}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let servers of this process compute with one thread, as a replica with one core does."""
    before = os.environ.get("NPROC")
    os.environ["NPROC"] = "1"
    try:
        yield
    finally:
        os.environ.pop("NPROC")
        if before is not None:
            os.environ["NPROC"] = before


def ask(client: httpx.Client, server: Server, prompt: Json, seed: int) -> dict[str, float]:
    """Ask a new question after the prompt; TTFT and its parts in ms."""
    body = with_question(prompt, seed) | {"max_tokens": OUTPUT_TOKENS, "temperature": 0}
    timing = measure(client, server.url, body)
    (latest, *_) = client.get(f"{server.url}/v1/requests").json()["data"]
    phases = latest["phases_ms"]
    engine = sum(phases[phase] for phase in IN_ENGINE)
    text = sum(phases[phase] for phase in BEFORE_ENGINE)
    path = timing.ttft_ms - engine
    return {"ttft_ms": timing.ttft_ms, "engine_ms": engine, "path_ms": path, "transport_ms": path - text}


def overhead(model: str, pairs: int, tokens: int) -> dict[str, Any]:
    """Medians of both ways, and of the differences within pairs."""
    pool = ("--kv-pool-bytes", f"{POOL_MIB}MiB")
    with (
        one_thread(),
        running_server(model, *pool) as single,
        running_server(model, *pool, "--replicas", "1", "--cpus-per-replica", "1", program=CLUSTER) as cluster,
        httpx.Client(timeout=600) as client,
    ):
        prompt = stable_request(
            Session(seed=1, num_tools=20), tokens, lambda request: count_tokens(client, single.url, request)
        )
        servers, rng = {"one server": single, "cluster": cluster}, random.Random(0)
        for server in servers.values():
            for seed in range(2):
                ask(client, server, prompt, seed)
        asked: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
        for number in range(pairs):
            seed = rng.getrandbits(32)
            for name in rng.sample(list(servers), 2):
                asked[name].append(ask(client, servers[name], prompt, seed))
            Console().print(f"pair {number + 1} of {pairs}", end="\r")
    added = {
        name: round(median(b[name] - a[name] for a, b in zip(*asked.values(), strict=True)), 2)
        for name in asked["cluster"][0]
    }
    medians = {
        way: {name: round(median(each[name] for each in found), 2) for name in found[0]} for way, found in asked.items()
    }
    return {"prompt_tokens": tokens, "pairs": pairs, "medians": medians, "added": added}


def session(number: int, group: str = "") -> Session:
    """One agent's session, which shares nothing with the others', or tools and the prompt's beginning with a group."""
    return Session(seed=number, folder=f"/home/dev/project-{number}", scale=SCALE, group=group)


def converse(url: str, number: int, group: str = "") -> list[Timing]:
    """One agent's session, a request after the other."""
    one = session(number, group)
    with httpx.Client(timeout=600) as client:
        return [
            measure(client, url, body | {"max_tokens": OUTPUT_TOKENS, "temperature": 0}, http_headers(one))
            for body in islice(requests(one, header=False), TURNS)
        ]


@contextmanager
def routed(model: str, routing: str | None, store: bool = False) -> Iterator[Server]:
    """One server (None), or replicas with this routing."""
    pool, flags, program = POOL_MIB * REPLICAS, list[str](), ONE
    if routing:
        cores = max(0.1, min(1.0, (os.cpu_count() or 1) / REPLICAS))
        flags = ["--replicas", str(REPLICAS), "--cpus-per-replica", str(cores), "--routing", routing]
        pool, program = POOL_MIB, CLUSTER
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        if store:
            flags += ["--store", str(Path(folder, "store")), "--flush-seconds", "0.1"]
        with running_server(model, "--kv-pool-bytes", f"{pool}MiB", *flags, log=log, program=program) as server:
            yield server


def hit_rates(model: str, routing: str | None, store: bool) -> dict[str, dict[str, Any]]:
    """What all agents find, by what they share, see `routed`."""
    with routed(model, routing, store) as server, ThreadPoolExecutor(AGENTS) as pool:
        found = {}
        for shared, group in SHARED.items():
            talks = pool.map(lambda number, group=group: converse(server.url, number, group), range(AGENTS))
            found[shared] = summary([timing for talk in talks for timing in talk])
    return found


def summary(timings: Sequence[Timing]) -> dict[str, Any]:
    """The hit rate of some requests and the median of their TTFT."""
    prompt, cached = sum(t.prompt_tokens for t in timings), sum(t.cached_tokens for t in timings)
    return {
        "hit_rate": round(cached / prompt, 4),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "ttft_ms": round(median(t.ttft_ms for t in timings), 1),
    }


def show(result: dict[str, Any]) -> None:
    """Print both parts as tables."""
    parts = result["overhead"]
    table = make_table(("", "TTFT", "engine", "path", "transport"), words=("",), title="a warm request, median ms")
    for name, row in [*parts["medians"].items(), ("added", parts["added"])] if parts else []:
        table.add_row(name, *(f"{value:,.1f}" for value in row.values()))
    Console().print(table)
    columns = ("agents", "store", "routing", "hit rate", "median TTFT")
    table = make_table(columns, words=columns[:3], title=f"{AGENTS} agents")
    for (shared, store, name), row in rows(result["hit_rates"]):
        table.add_row(shared, store, name, f"{row['hit_rate']:.1%}", f"{row['ttft_ms']:,.0f} ms")
    Console().print(table)


def rows(found: dict[str, Any]) -> list[tuple[tuple[str, str, str], dict[str, Any]]]:
    """Hit rates by what agents share, the store and the routing."""
    return [
        ((shared, store, name), row)
        for store, by_name in found.items()
        for name, by_shared in by_name.items()
        for shared, row in by_shared.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both parts and write the result."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.cluster", description=__doc__.split("\n")[0])
    cli.add_argument("--model", required=True, metavar="DIR")
    cli.add_argument("--pairs", type=int, default=PAIRS, metavar="N", help="0 leaves it out (default: %(default)s)")
    cli.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="(default: %(default)s)")
    cli.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    args = cli.parse_args(argv)
    others = start_watch()
    parts = overhead(args.model, args.pairs, args.tokens) if args.pairs else {}
    result: dict[str, Any] = {"overhead": parts, "hit_rates": {}}
    for store in ("no store", "store"):
        rates = result["hit_rates"][store] = {}
        for name, routing in ROUTED.items():
            rates[name] = hit_rates(args.model, routing, store == "store")
            result["other_load"] = others()
            write_json(args.output, result | provenance(PACKAGES))  # what comes later may fail
    show(result)
    Console().print(warning(result["other_load"]))


if __name__ == "__main__":
    main()
