"""The time that the proxy adds to a request: `python -m experiments.bench.proxy`.

An agent's prompt of 52K tokens, with a fresh header and a fresh question in each request, goes to an engine that reads
it, waits as for a cached prefill and streams an answer, a word every few milliseconds. The ways, directly, through a
proxy that counts characters and through one that counts tokens, take turns. Engine, proxies and client are separate
processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from experiments.harness.client import Timing, measure
from experiments.harness.provenance import provenance
from experiments.harness.report import write_json
from experiments.harness.server import Server, free_port, wait_until_ready
from experiments.workloads import sessions
from experiments.workloads.demo_model import TINY, write_demo_model
from experiments.workloads.sessions import Session
from experiments.workloads.synthetic import Json
from serve.api.answers import (
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    Event,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    Stop,
    TextDelta,
    Usage,
    encode_event,
)
from serve.api.messages import TextBlock, decode_count_tokens
from serve.prompt.render import prompt
from serve.prompt.tokenizer import load_tokenizer

RESULTS = Path("experiments/results/bench/proxy.json")
WORDS = 20  # events of an answer
WORD_SECONDS = 0.005
MEASURED = ("ttft_ms", "total_ms")
WAIT = "x-wait-ms"  # header with the time that the engine waits


async def answer(request: Request) -> StreamingResponse:
    """Read the body, wait, and stream a few words."""
    await request.body()
    await asyncio.sleep(float(request.headers.get(WAIT, "0")) / 1e3)
    events: list[Event] = [
        MessageStart(Message(id="msg_0", model="m", usage=Usage(0))),
        ContentBlockStart(0, TextBlock("")),
        *(ContentBlockDelta(0, TextDelta("word ")) for _ in range(WORDS)),
        ContentBlockStop(0),
        MessageDelta(Stop("end_turn"), Usage(0, output_tokens=WORDS)),
        MessageStop(),
    ]

    async def stream() -> AsyncIterator[bytes]:
        for event in events:
            yield encode_event(event)
            if isinstance(event, ContentBlockDelta):
                await asyncio.sleep(WORD_SECONDS)

    return StreamingResponse(stream(), media_type="text/event-stream")


engine = Starlette(
    routes=[
        Route("/v1/messages", answer, methods=["POST"]),
        Route("/health", lambda request: PlainTextResponse("ok")),
    ]
)


@contextmanager
def process(*command: str) -> Iterator[str]:
    """A program that takes `--port`; its URL, once `/health` answers."""
    port = free_port()
    started = subprocess.Popen([sys.executable, "-m", *command, "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(Server(f"http://127.0.0.1:{port}", started), None)
        yield f"http://127.0.0.1:{port}"
    finally:
        started.terminate()
        started.wait(20)


def take_turns(urls: dict[str, str], stable: Json, wait_ms: float, repeats: int) -> dict[str, list[Timing]]:
    """The timings of each way; requests take turns, each with its own header and question."""
    times: dict[str, list[Timing]] = {name: [] for name in urls}
    with httpx.Client(timeout=60) as client:
        for number in track(range(-3, repeats), f"an engine that waits {wait_ms:.0f} ms"):
            for name, url in urls.items():
                body = sessions.with_question(stable, number)
                body = sessions.with_header(body, f"{sessions.HEADER} cc_version=2; cch={number & 0xFFFFF:05x};")
                taken = measure(client, url, body, {WAIT: str(wait_ms)})
                if number >= 0:  # the first ones open connections
                    times[name].append(taken)
    return times


def row(name: str, wait_ms: float, times: dict[str, list[Timing]]) -> dict[str, Any]:
    """Medians in milliseconds, and their differences to those of the direct way."""
    ttft, whole = ({way: median(getattr(t, field) for t in times[way]) for way in times} for field in MEASURED)
    return {
        "way": name,
        "wait_ms": wait_ms,
        "ttft_ms": round(ttft[name], 2),
        "total_ms": round(whole[name], 2),
        "added_ttft_ms": round(ttft[name] - ttft["direct"], 2),
        "added_total_ms": round(whole[name] - whole["direct"], 2),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.proxy", description=__doc__)
    parser.add_argument("--tokens", type=int, default=52_000, help="length of the prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=60, help="requests of each way (default: %(default)s)")
    parser.add_argument(
        "--wait-ms",
        type=float,
        nargs="+",
        default=[20, 100],
        help="milliseconds that the engine waits (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder, "model"))
        write_demo_model(Path(model), config=TINY)
        tokenizer = load_tokenizer(model)

        def count(body: Json) -> int:
            return len(prompt(decode_count_tokens(json.dumps(body).encode()), tokenizer).tokens)

        stable = sessions.stable_request(Session(group="bench"), args.tokens, count)
        with (
            process("uvicorn", "experiments.bench.proxy:engine", "--log-level", "error") as direct,
            process("serve", "proxy", "--upstream", direct) as characters,
            process("serve", "proxy", "--upstream", direct, "--model", model) as tokens,
        ):
            urls = {"direct": direct, "proxy, characters": characters, "proxy, tokens": tokens}
            rows = [
                row(name, wait_ms, times)
                for wait_ms in args.wait_ms
                for times in (take_turns(urls, stable, wait_ms, args.repeats),)
                for name in urls
            ]
            with httpx.Client() as client:
                reports = client.get(f"{tokens}/v1/requests").json()["data"]
    size = {"tokens": reports[0]["prompt_tokens"], "bytes": len(json.dumps(stable)), "repeats": args.repeats}
    table = Table("engine waits", "way", "TTFT, ms", "whole, ms", "added to TTFT", "added to whole")
    for r in rows:
        numbers = (f"{r[key]:.2f}" for key in list(r)[2:])
        table.add_row(f"{r['wait_ms']:.0f} ms", r["way"], *numbers)
    console = Console()
    console.print(table)
    console.print(
        f"{size['tokens']:,} tokens, {size['bytes']:,} bytes, medians over {args.repeats} requests of each way"
    )
    write_json(args.out, size | {"rows": rows} | provenance(), indent=1)


if __name__ == "__main__":
    main()
