"""How long a real server's event loop blocks: `python -m experiments.bench.loop_lag --model DIR`.

Each case sends expensive requests (huge bodies, stop sequences, schemas, reports, a scrape of a busy store) while
another client reads a stream. A task on the server's loop is due every 10 ms; the server counts how late it was
(`tokenzero_loop_lag_seconds`). The figure of a case is the upper bound of the highest bucket that it filled.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.harness.provenance import provenance
from experiments.harness.report import write_json
from experiments.harness.server import running_server
from experiments.workloads.synthetic import Json

RESULTS = Path("experiments/results/bench/loop_lag.json")
ALLOWED_MS = 50.0
MIB = 2**20
SETTLE_SECONDS = 0.3  # before and after a case, for ticks that are under way
METRIC = "tokenzero_loop_lag_seconds"
MESSAGES, CHAT, RESPONSES = "/v1/messages", "/v1/chat/completions", "/v1/responses"

Send = Callable[[httpx.Client], list[httpx.Response]]


@dataclass(frozen=True)
class Lag:
    """The loop's lag in one case."""

    case: str
    statuses: list[int]  # of the answers, each once
    seconds: float
    beats: int
    lag_ms: float  # no beat was later than this


def ask(text: str, max_tokens: int = 1, **more: object) -> Json:
    """A request of one user message."""
    return {"model": "m", "max_tokens": max_tokens, "messages": [{"role": "user", "content": text}]} | more


def posted(body: Json, path: str = MESSAGES, times: int = 1) -> Send:
    """Send a body so many times."""
    payload = json.dumps(body, ensure_ascii=False).encode()
    return lambda client: [client.post(path, content=payload) for _ in range(times)]


def got(path: str, times: int = 20) -> Send:
    """Ask for a page so many times."""
    return lambda client: [client.get(path) for _ in range(times)]


def wanting(schema: Json) -> Json:
    """The fields that make an answer obey a schema."""
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


def nested(depth: int) -> Json:
    """A schema of objects within objects."""
    schema: Json = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


def reported(client: httpx.Client) -> list[httpx.Response]:
    """Ask for the latest reports, and for each of them, a dozen times."""
    listed = client.get("/v1/requests")
    ids = [report["id"] for report in listed.json()["data"][:12]]
    return [listed, *(client.get(f"/v1/requests/{id}") for id in ids), *(client.get("/v1/requests") for _ in ids)]


def scraped_while_stored(client: httpx.Client) -> list[httpx.Response]:
    """Ask for the metrics over and over while fresh prompts are computed and written to the store."""
    answers: list[httpx.Response] = []
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set():
            answers.append(client.get("/metrics"))

    thread = threading.Thread(target=scrape)
    thread.start()
    fresh = (ask(f"{number} " + "a page of a prompt " * 800) for number in range(6))
    asked = [client.post(MESSAGES, json=body) for body in fresh]
    done.set()
    thread.join()
    return [*answers, *asked]


def cases() -> Iterator[tuple[str, Send]]:
    """The cases: names, and what each sends."""
    forced = {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    call: Json = {"name": "t", "input_schema": {"type": "object", "properties": {"a": {"const": "word " * 600}}}}
    required = call | {"input_schema": call["input_schema"] | {"required": ["a"], "additionalProperties": False}}
    letters = wanting({"const": "a" * 300})
    yield "nothing", lambda client: []
    yield "a short answer", posted(ask("tell me", 30))
    yield (
        "64 stop sequences of 256 characters",
        posted(ask("tell", 60, stop_sequences=["a" * (256 - len(str(n))) + str(n) for n in range(64)])),
    )
    yield (
        "held text, 64 stop sequences",
        posted(ask("tell", 400, stop_sequences=["a" * 255 + chr(0x4E00 + n) for n in range(64)], **letters)),
    )
    yield "8,190 stop sequences", posted(ask("tell", 30, stop_sequences=["b" * 1000 + str(n) for n in range(8190)]))
    yield "metadata, 31 MiB of []", posted(ask("h", metadata={"a": [[]] * (31 * MIB // 4)}))
    yield "metadata, 30 MiB of text", posted(ask("h", metadata={"a": "word " * (6 * MIB)}))
    yield "650,000 tools", posted(ask("h", tools=[{"name": "t", "input_schema": {}}] * 650_000))
    yield "20,000 tools", posted(ask("h", tools=[{"name": f"t{n}", "input_schema": {}} for n in range(20_000)]))
    blocks = [{"type": "text", "text": ""}] * 900_000
    yield (
        "900,000 blocks",
        posted(ask("h", messages=[{"role": "user", "content": blocks}])),
    )
    turns = [{"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(60_001)]
    yield "60,001 messages", posted(ask("h", messages=turns))
    yield "30 MiB of prose", posted(ask("the quick brown fox " * (30 * MIB // 20)))
    yield "4 MiB of prose", posted(ask("the quick brown fox " * (4 * MIB // 20)))
    yield "a word of 30 MiB", posted(ask("a" * (30 * MIB)))
    yield "30 MiB of control tokens", posted(ask("<|im_start|>" * (30 * MIB // 12)))
    yield "2 MiB of control tokens", posted(ask("<|im_start|>" * (2 * MIB // 12)))
    yield "14 MiB of line breaks in system", posted(ask("h", system="\n" * (14 * MIB)))
    yield "count 4 MiB of prose", posted(ask("the slow brown fox " * (4 * MIB // 20)), f"{MESSAGES}/count_tokens")
    yield (
        "responses, 30 MiB of instructions",
        posted({"model": "m", "input": "h", "instructions": "word " * (6 * MIB), "max_output_tokens": 1}, RESPONSES),
    )
    functions = [{"type": "function", "name": f"f{n}", "parameters": {}} for n in range(300)]
    streamed = {"model": "m", "input": "h", "max_output_tokens": 8, "tools": functions, "stream": True}
    yield "responses, 300 tools, streamed", posted(streamed, RESPONSES)
    yield "a schema 200 deep", posted(ask("go", 12, **wanting(nested(200))))
    yield "an enum of 20,000", posted(ask("go", 12, **wanting({"enum": [f"v{n}xyz" for n in range(20_000)]})))
    wide = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}}
    yield "2,000 properties", posted(ask("go", 12, **wanting(wide)))
    kinds = [{"type": "object", "properties": {"t": {"const": f"t{n}"}}, "required": ["t"]} for n in range(300)]
    yield "oneOf of 300 objects", posted(ask("go", 12, **wanting({"oneOf": kinds})))
    yield "a call of 3 kB", posted(ask("call", 10_000, tools=[required], **forced))
    yield (
        "a call of 3 kB, streamed, chat",
        posted(
            {
                "model": "m",
                "messages": [{"role": "user", "content": "call"}],
                "stream": True,
                "tools": [{"type": "function", "function": {"name": "t", "parameters": required["input_schema"]}}],
                "tool_choice": "required",
                "parallel_tool_calls": False,
            },
            CHAT,
        ),
    )
    yield "64 short requests", posted(ask("short", 2), times=64)
    yield "reports", reported
    yield "metrics while a store is written", scraped_while_stored
    yield (
        "models, health, dashboard",
        lambda client: [
            client.get(path) for path in ("/v1/models", "/v1/models/any", "/health", "/dashboard/index.html") * 10
        ],
    )


def buckets(client: httpx.Client) -> dict[float, float]:
    """The counts of ticks that were at most so many seconds late, by that bound."""
    for family in text_string_to_metric_families(client.get("/metrics").text):
        if family.name == METRIC:
            return {float(s.labels["le"]): s.value for s in family.samples if s.name == f"{METRIC}_bucket"}
    raise RuntimeError(f"{METRIC} is not among the server's metrics")


def highest(before: Mapping[float, float], after: Mapping[float, float]) -> tuple[int, float]:
    """The ticks between two readings, and the bound in seconds that none of them exceeded."""
    new = {bound: after[bound] - before[bound] for bound in sorted(after)}
    total = new[inf]
    return int(total), next((bound for bound, count in new.items() if count == total), inf)


@contextmanager
def bystander(url: str) -> Iterator[None]:
    """Another client, which reads one stream after another until the block ends."""
    done = threading.Event()

    def read() -> None:
        with httpx.Client(base_url=url, timeout=600) as client:
            while not done.is_set():
                with client.stream("POST", MESSAGES, json=ask("tell me a story", 40, stream=True)) as response:
                    response.read()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def measured(url: str, case: str, send: Send) -> Lag:
    """Send a case and read the loop's lag."""
    with httpx.Client(base_url=url, timeout=600) as client, bystander(url):
        time.sleep(SETTLE_SECONDS)
        before, start = buckets(client), time.perf_counter()
        answers = send(client)
        taken = time.perf_counter() - start
        time.sleep(SETTLE_SECONDS)
        beats, lag = highest(before, buckets(client))
    return Lag(case, sorted({answer.status_code for answer in answers}), round(taken, 2), beats, 1e3 * lag)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.loop_lag", description=__doc__)
    parser.add_argument("--model", required=True, help="a local checkpoint folder, such as the demo's")
    parser.add_argument("--only", default="", help="cases with this in their names (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go (default: %(default)s)")
    args = parser.parse_args()
    console, rows = Console(), []
    table = Table("case", "status", "seconds", "beats", "lag at most, ms", box=SIMPLE_HEAD)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        flags = ("--store", f"{folder}/store", "--store-bytes", "200MB", "--flush-seconds", "0.2")
        with running_server(args.model, *flags, log=log, compiled=True) as server:
            with httpx.Client(base_url=server.url, timeout=600) as client:
                posted(ask("warm", 2), times=3)(client)
            for case, send in cases():
                if args.only in case:
                    row = measured(server.url, case, send)
                    rows.append(row)
                    statuses = " ".join(map(str, row.statuses))
                    console.print(f"{case}: {statuses}, {row.seconds} s, at most {row.lag_ms:g} ms")
                    table.add_row(case, statuses, f"{row.seconds:.2f}", str(row.beats), f"{row.lag_ms:g}")
    console.print(table)
    late = [row.case for row in rows if row.lag_ms > ALLOWED_MS]
    console.print(f"over {ALLOWED_MS:g} ms: {', '.join(late) or 'none'}")
    made = {"allowed_ms": ALLOWED_MS, "rows": [asdict(row) for row in rows]} | provenance()
    write_json(args.out, made, indent=1)


if __name__ == "__main__":
    main()
