"""What a client waits for its first token while others attack: `python -m experiments.bench.attacks --model DIR`.

Each attack runs in a process and with a key of its own, over and over, while another key's client asks short questions.
Its time to the first token is compared with that of the same client alone, just before. No attack may add more than
50 ms and one step: a step of an honest request would have taken as long. `crowd` is many connections at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.bench.loop_lag import MESSAGES, ask, cases, posted, wanting
from experiments.harness.client import NoText, measure
from experiments.harness.provenance import provenance
from experiments.harness.report import write_json
from experiments.harness.server import Server, running_server
from experiments.workloads.synthetic import Json
from serve.web.connections import allow_open_files

RESULTS = Path("experiments/results/bench/attacks.json")
ALLOWED_MS = 50.0
MIB = 2**20
FLAGS = ("--audit-share", "0")
HEAD = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
STREAMS, IDLE, DRIPPING = 300, 500, 200  # of the crowd
VICTIM, ATTACKER = ({"x-api-key": name} for name in ("the victim's key", "the attacker's key"))
KEY_LINE = b"x-api-key: %b\r\n" % ATTACKER["x-api-key"].encode()

Attack = Callable[[str], list[int]]  # once, at a URL; the statuses that it got


@dataclass(frozen=True)
class Delay:
    """The TTFT of a client beside an attack, in milliseconds."""

    attack: str
    statuses: list[int]  # that the attacker got, each once
    rounds: int  # of the attack
    alone: float  # median of the same client just before
    median: float
    p95: float
    most: float
    beyond: float  # what the attack added in the worst case, more than one step


@dataclass(frozen=True)
class Crowd:
    """What became of many connections at once."""

    whole: int  # streams that came to their end
    broken: int
    seconds: float
    files: tuple[int, int]  # open before, and after
    threads: tuple[int, int]


def address_of(url: str) -> tuple[str, int]:
    """Host and port of a URL."""
    parsed = httpx.URL(url)
    return parsed.host, parsed.port or 80


def by_http(send: Callable[[httpx.Client], list[httpx.Response]]) -> Attack:
    """The attack of one client that sends requests."""

    def attack(url: str) -> list[int]:
        with httpx.Client(base_url=url, headers=ATTACKER, timeout=120) as client:
            return [response.status_code for response in send(client)]

    return attack


def by_bytes(*pieces: bytes, connections: int = 1, seconds: float = 0.2) -> Attack:
    """The attack of connections that send bytes, one piece after another, and wait for so long before they go."""

    def attack(url: str) -> list[int]:
        with ExitStack() as opened:
            made = [opened.enter_context(socket.create_connection(address_of(url), 5)) for _ in range(connections)]
            for piece in pieces:
                for connection in made:
                    with suppress(OSError):
                        connection.sendall(piece)
            time.sleep(seconds)
            return [status for connection in made if (status := status_of(connection))]

    return attack


def status_of(connection: socket.socket) -> int | None:
    """The status of the answer on a connection; None if it is closed without one, or none has come."""
    with suppress(OSError):
        connection.setblocking(False)
        found = re.match(rb"HTTP/1.1 (\d+)", connection.recv(2**12))
        return int(found[1]) if found else None
    return None


def deaf(connections: int) -> Attack:
    """The attack of clients that ask for streams and read none."""
    body = json.dumps(ask("tell me a long story", 500, stream=True)).encode()
    request = HEAD + KEY_LINE + b"content-length: %d\r\n\r\n" % len(body) + body

    def attack(url: str) -> list[int]:
        with ExitStack() as opened:
            for _ in range(connections):
                connection = opened.enter_context(socket.create_connection(address_of(url), 5))
                connection.sendall(request)
            time.sleep(1)
        return []

    return attack


def at_once(count: int, body: Json) -> Attack:
    """The attack of many requests at the same time."""

    def attack(url: str) -> list[int]:
        limits = httpx.Limits(max_connections=None)
        with (
            httpx.Client(base_url=url, headers=ATTACKER, timeout=120, limits=limits) as client,
            ThreadPoolExecutor(count) as pool,
        ):
            return list(pool.map(lambda _: client.post(MESSAGES, json=body).status_code, range(count)))

    return attack


def attacks() -> Iterator[tuple[str, Attack]]:
    """The attacks: names, and what each does."""
    yield "none", by_bytes(seconds=0.2)
    for name, send in cases():
        if not name.startswith(("nothing", "models, health", "reports", "metrics")):
            yield name, by_http(send)
    deep = json.dumps(ask("h", metadata="HERE")).replace('"HERE"', "[" * 100_000 + "]" * 100_000)
    yield "100,000 brackets within each other", by_http(lambda client: [client.post(MESSAGES, content=deep)])
    digits = json.dumps(ask("h", metadata="HERE")).replace('"HERE"', "9" * 10_000_000)
    yield "a number of 10,000,000 digits", by_http(lambda client: [client.post(MESSAGES, content=digits)])
    named = [{"name": f"t{n}", "input_schema": {}} for n in range(65_000)]
    yield "65,000 tools", by_http(posted(ask("h", tools=named)))
    described = [{"name": f"t{n}", "description": "word " * 80, "input_schema": {}} for n in range(10_000)]
    yield "10,000 tools, described", by_http(posted(ask("h", tools=described)))
    for name, schema in schemas():
        yield f"schema: {name}", by_http(posted(ask("go", 12, **wanting(schema))))
    yield "a header of 64 MiB", by_bytes(HEAD + b"X-Big: ", *[b"a" * MIB] * 64)
    yield "13,000,000 headers", by_bytes(HEAD, *[b"a:b\r\n" * 200_000] * 65)
    yield "a path of 64 MiB", by_bytes(b"GET /", *[b"a" * MIB] * 64)
    yield "500 connections that send nothing", by_bytes(connections=500, seconds=1)
    yield "200 connections that drip headers", by_bytes(HEAD, *[b"a"] * 40, connections=200, seconds=1)
    part = HEAD + KEY_LINE + b"content-length: 1000000\r\n\r\n{"
    yield "200 connections that drip bodies", by_bytes(part, *[b"a"] * 40, connections=200, seconds=1)
    yield "100 clients that read nothing", deaf(100)
    yield "400 requests at once", at_once(400, ask("at once", 8))


def schemas() -> Iterator[tuple[str, Json]]:
    """Schemas that are expensive to compile."""
    yield "pattern a{1000000}", {"type": "string", "pattern": "^a{1000000}$"}
    yield "nested counts", {"type": "string", "pattern": "^(.{0,1000}x){0,1000}$"}
    yield "2^200 states", {"type": "string", "pattern": "^.*a.{200}$"}
    yield "500 unicode classes", {"type": "string", "pattern": "^(\\p{L}\\p{N}\\w[^\\x00-\\x7f]){500}$"}
    yield "minLength 10^9", {"type": "string", "minLength": 10**9}
    yield "minItems 10^7", {"type": "array", "items": {"type": "integer"}, "minItems": 10**7}
    yield "multipleOf 99991", {"type": "integer", "multipleOf": 99991}
    doubled: Json = {f"d{n}": {"anyOf": [pair(key, n) for key in "ab"]} for n in range(30)}
    yield "30 doublings", {"$ref": "#/$defs/d0", "$defs": doubled | {"d30": {"type": "string"}}}
    yield "itself", {"$ref": "#"}


def pair(key: str, number: int) -> Json:
    """An object whose one property is the next definition."""
    return {"type": "object", "properties": {key: {"$ref": f"#/$defs/d{number + 1}"}}}


def question(rng: random.Random) -> Json:
    """A short request that nobody has sent before."""
    return ask(f"{rng.randrange(10**9)}: hi", 1, stream=True, temperature=0)


def ttfts(url: str, rng: random.Random, seconds: float, enough: int) -> list[float]:
    """The TTFTs of questions, one after another, for so long and until there are enough, in milliseconds."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    with httpx.Client(timeout=300) as client:
        while time.perf_counter() < end or len(found) < enough:
            with suppress(NoText):
                found.append(measure(client, url, question(rng), VICTIM).ttft_ms)
            time.sleep(0.02)
    return found


@contextmanager
def attacked(url: str, name: str, told: list[dict[str, Any]]) -> Iterator[None]:
    """Have a process attack until the block ends; what it says of its attacks is added to `told`."""
    command = [sys.executable, "-m", "experiments.bench.attacks", "--attack", name, "--url", url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        process.stdout.readline()  # it begins
        yield
    finally:
        out, _ = process.communicate(timeout=300)
        told.append(json.loads(out.splitlines()[-1]))


def attack_until_told(url: str, name: str) -> None:
    """Attack over and over until the standard input is closed, and print what came of it."""
    attack = dict(attacks())[name]
    done, statuses, rounds = threading.Event(), Counter[int](), 0

    def wait() -> None:
        sys.stdin.read()
        done.set()

    threading.Thread(target=wait, daemon=True).start()
    print("begins", flush=True)
    while not done.is_set():
        with suppress(httpx.TransportError, OSError):
            statuses.update(attack(url))
        rounds += 1
    print(json.dumps({"statuses": sorted(statuses), "rounds": rounds}))


def delay(url: str, name: str, seconds: float, step_ms: float, rng: random.Random) -> Delay:
    """The TTFT of a client alone, and beside an attack."""
    alone = median(ttfts(url, rng, seconds / 3, 5))
    told: list[dict[str, Any]] = []
    with attacked(url, name, told):
        beside = ttfts(url, rng, seconds, 10)
    p95, most = float(np.percentile(beside, 95)), max(beside)
    return Delay(
        name, told[0]["statuses"], told[0]["rounds"], alone, median(beside), p95, most, max(0, most - alone - step_ms)
    )


def step_ms(url: str, rng: random.Random, tokens: int = 1024, times: int = 5) -> float:
    """The milliseconds of the longest step: what a prompt of that many new tokens takes more than a short one."""
    with httpx.Client(timeout=300) as client:
        texts = [" ".join(str(rng.randrange(10**9)) for _ in range(tokens // 10)) for _ in range(times)]
        long = [measure(client, url, ask(text, 1, stream=True, temperature=0), VICTIM).ttft_ms for text in texts]
    return max(0.0, median(long) - median(ttfts(url, rng, 0.5, times)))


def streamed(client: httpx.Client, number: int) -> bool:
    """Whether a stream comes to its end; a client that is told to try again does so."""
    with suppress(httpx.TransportError):
        while True:
            with client.stream("POST", MESSAGES, json=ask(f"stream {number}", 8, stream=True)) as response:
                text = response.read().decode()
            if response.status_code not in (429, 529):
                return response.status_code == 200 and "message_stop" in text
            time.sleep(float(response.headers.get("retry-after", "1")))
    return False


def crowd(server: Server, streams: int = STREAMS, idle: int = IDLE, dripping: int = DRIPPING) -> Crowd:
    """Many streams while many connections send nothing, and many drip."""
    allow_open_files(streams + idle + dripping)
    process = psutil.Process(server.process.pid)
    httpx.get(f"{server.url}/health")
    time.sleep(1)
    before, started = (process.num_fds(), process.num_threads()), time.perf_counter()
    address, stop = address_of(server.url), threading.Event()
    with ExitStack() as opened:
        for _ in range(idle):
            opened.enter_context(socket.create_connection(address, 10))
        drips = [opened.enter_context(socket.create_connection(address, 10)) for _ in range(dripping)]
        for n, connection in enumerate(drips):
            connection.sendall(HEAD + KEY_LINE + (b"X-A: " if n % 2 else b"content-length: 1000000\r\n\r\n{"))

        def drip() -> None:
            while not stop.wait(0.5):
                for connection in drips:
                    with suppress(OSError):
                        connection.send(b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        with (
            httpx.Client(base_url=server.url, headers=VICTIM, timeout=600, limits=limits) as client,
            ThreadPoolExecutor(streams) as pool,
        ):
            ended = list(pool.map(lambda number: streamed(client, number), range(streams)))
        stop.set()
        thread.join()
    taken = time.perf_counter() - started
    time.sleep(8)  # connections end, idle ones after 5 s
    files, threads = zip(before, (process.num_fds(), process.num_threads()), strict=True)
    return Crowd(sum(ended), len(ended) - sum(ended), round(taken, 1), files, threads)


def keys(folder: str | Path) -> tuple[str, str]:
    """The flag that names a file with the keys of victim and attacker, which is written."""
    file = Path(folder, "keys")
    hashes = [hashlib.sha256(headers["x-api-key"].encode()).hexdigest() for headers in (VICTIM, ATTACKER)]
    file.write_text(f"victim sha256:{hashes[0]} admin\nattacker sha256:{hashes[1]}\n")
    return "--api-key-file", str(file)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.attacks", description=__doc__)
    cli.add_argument("--model", help="a local checkpoint folder, such as the demo's")
    cli.add_argument("--only", default="", help="attacks with this in their names (default: all, and the crowd)")
    cli.add_argument("--seconds", type=float, default=3.0, help="of each attack (default: %(default)s)")
    cli.add_argument("--output", type=Path, default=RESULTS, help="where the figures go (default: %(default)s)")
    cli.add_argument("--attack", help=argparse.SUPPRESS)
    cli.add_argument("--url", help=argparse.SUPPRESS)
    args = cli.parse_args(argv)
    if args.attack:
        attack_until_told(args.url, args.attack)
        return
    if not args.model:
        cli.error("--model is required")
    console, rng, rows = Console(), random.Random(0), []
    table = Table("attack", "status", "alone, ms", "median", "p95", "most", "beyond a step", box=SIMPLE_HEAD)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(args.model, *FLAGS, *keys(folder), log=Path(folder, "log"), compiled=True) as server,
    ):
        step = step_ms(server.url, rng)
        for name, _ in attacks():
            if args.only in name:
                row = delay(server.url, name, args.seconds, step, rng)
                rows.append(row)
                figures = [f"{figure:.1f}" for figure in (row.alone, row.median, row.p95, row.most, row.beyond)]
                console.print(f"{name}: {row.statuses}, {' / '.join(figures)} ms, {row.rounds} rounds")
                table.add_row(name, " ".join(map(str, row.statuses)), *figures)
        gathered = None if args.only else crowd(server)
    console.print(table)
    console.print(f"a step: {step:.1f} ms; {STREAMS} streams, {IDLE} idle, {DRIPPING} dripping: {gathered}")
    late = [row.attack for row in rows if row.beyond > ALLOWED_MS]
    console.print(f"over {ALLOWED_MS:g} ms: {', '.join(late) or 'none'}")
    made = {"allowed_ms": ALLOWED_MS, "step_ms": step, "rows": [asdict(row) for row in rows]}
    write_json(args.output, made | {"crowd": asdict(gathered) if gathered else None} | provenance(), indent=1)


if __name__ == "__main__":
    main()
