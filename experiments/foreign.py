"""What another engine finds in its cache of an agent's prompts, by its own figures, with and without the proxy.

`python -m experiments.foreign` starts llama.cpp's server on the demo model as a GGUF file, and the proxy before it.
Each way sends an agent's prompt twice in a row, with a fresh question and a fresh header each time; what the second
request finds is measured. The ways take turns. It needs the `foreign` extra.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.harness import llama_server
from experiments.harness.client import prompt_counts
from experiments.harness.figures import COLOURS, save, subplots
from experiments.harness.provenance import PACKAGES, provenance
from experiments.harness.report import make_table, write_json
from experiments.harness.server import running_server
from experiments.workloads import sessions
from experiments.workloads.demo_model import write_demo_model
from experiments.workloads.gguf_file import write_gguf
from experiments.workloads.sessions import Session
from experiments.workloads.synthetic import Json

RESULTS = Path("experiments/results/foreign")
MODEL = Path(".cache/demo-model")
SCALE = 0.2  # of a client's own prompt
MESSAGES, CHAT = "/v1/messages", "/v1/chat/completions"


@dataclass(frozen=True)
class Way:
    """One condition: the route, what of the header is fresh in each request, and whether the proxy is in between."""

    route: str
    fresh: Literal["", "cch", "cc_version"]  # empty: no header
    proxy: bool

    @property
    def name(self) -> str:
        """The way in words."""
        header = f"fresh {self.fresh}" if self.fresh else "no header"
        return f"{header}, through the proxy" if self.proxy else header


WAYS = (
    Way(MESSAGES, "", False),
    Way(MESSAGES, "cch", False),
    Way(MESSAGES, "cc_version", False),
    Way(MESSAGES, "cch", True),
    Way(MESSAGES, "cc_version", True),
    Way(CHAT, "", False),
    Way(CHAT, "cch", False),
    Way(CHAT, "cch", True),
)


def header(way: Way, rng: random.Random) -> str:
    """The header of the way's next request."""
    fresh = f"{rng.getrandbits(20):05x}"
    version, cch = ("471", fresh) if way.fresh == "cch" else (fresh[:3], "00000")
    return f"{sessions.HEADER} cc_version=2.1.179.{version}; cc_entrypoint=cli; cch={cch};" if way.fresh else ""


def body(way: Way, prompt: Json, rng: random.Random) -> Json:
    """The way's next request: the same prompt with a fresh header and a fresh question, for one token."""
    asked = sessions.with_question(prompt, rng.getrandbits(32), 40)
    asked = sessions.with_header(asked, header(way, rng))
    fields = {"model": "any", "max_tokens": 1, "temperature": 0}
    if way.route == MESSAGES:
        return {key: asked[key] for key in ("system", "tools", "messages")} | fields
    system = {"role": "system", "content": "\n".join(block["text"] for block in asked["system"])}
    turns = [{"role": turn["role"], "content": text_of(turn["content"])} for turn in asked["messages"]]
    tools = [{"type": "function", "function": {**tool, "parameters": tool["input_schema"]}} for tool in asked["tools"]]
    return {"messages": [system, *turns], "tools": tools} | fields


def text_of(content: str | list[Json]) -> str:
    """The text of a message."""
    return content if isinstance(content, str) else "\n".join(block["text"] for block in content)


def ask(client: httpx.Client, url: str, way: Way, request: Json) -> tuple[int, int, float]:
    """Prompt tokens, cached tokens and milliseconds of a request. Raises RuntimeError for a refusal."""
    begin = time.perf_counter()
    answer = client.post(f"{url}{way.route}", json=request)
    took = (time.perf_counter() - begin) * 1e3
    if answer.status_code != 200:
        raise RuntimeError(f"{way.name}: {answer.status_code}: {answer.text[:300]}")
    usage = answer.json()["usage"]
    if way.route == MESSAGES:
        return *prompt_counts(usage), took
    return usage["prompt_tokens"], (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0, took


def run(engine: str, proxy: str, rounds: int, seed: int) -> list[dict[str, Any]]:
    """All ways in turns, each round in its own random order; medians over the rounds, and all that was measured."""
    rng = random.Random(seed)
    found: dict[Way, list[tuple[int, int, float]]] = {way: [] for way in WAYS}
    # A session for each way, so that no way finds the prompt of another one.
    prompts = {way: sessions.request(session_of(number), header=False) for number, way in enumerate(WAYS)}
    with httpx.Client(timeout=600) as client:
        for _ in track(range(rounds), "rounds", console=Console(stderr=True)):
            for way in rng.sample(WAYS, len(WAYS)):
                url = proxy if way.proxy else engine
                ask(client, url, way, body(way, prompts[way], rng))
                found[way].append(ask(client, url, way, body(way, prompts[way], rng)))
    return [summary(way, taken) for way, taken in found.items()]


def session_of(number: int) -> Session:
    """The session of a way: all of about the same size."""
    return Session(seed=number, folder=f"/home/dev/way-{number}", thinking=False, scale=SCALE)


def summary(way: Way, taken: list[tuple[int, int, float]]) -> dict[str, Any]:
    """A way's figures as JSON values."""
    prompt, cached, times = (list(column) for column in zip(*taken, strict=True))
    return {
        "way": way.name,
        "route": way.route,
        "fresh": way.fresh,
        "proxy": way.proxy,
        "prompt_tokens": round(median(prompt)),
        "cached_tokens": round(median(cached)),
        "ms": round(median(times), 1),
        "cached_each": cached,
        "ms_each": [round(ms, 1) for ms in times],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures for a terminal and a notebook."""
    grid = make_table(("route", "way", "prompt", "cached", "computed", "ms"), words=("route", "way"))
    for row in rows:
        computed = row["prompt_tokens"] - row["cached_tokens"]
        counts = (f"{n:,}" for n in (row["prompt_tokens"], row["cached_tokens"], computed))
        grid.add_row(row["route"], row["way"], *counts, f"{row['ms']:,.0f}")
    return grid


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar a way: its prompt's tokens, those from the cache filled."""
    figure, axes = subplots(1.2 + 0.42 * len(rows))
    axes.grid(False, axis="y")
    for height, row in enumerate(rows):
        colour = COLOURS[2] if row["proxy"] else COLOURS[0]
        axes.barh(height, row["prompt_tokens"], color=colour, alpha=0.18, height=0.62)
        axes.barh(height, row["cached_tokens"], color=colour, height=0.62)
        label = f"{row['cached_tokens']:,} of {row['prompt_tokens']:,} cached"
        axes.annotate(label, (row["prompt_tokens"], height), xytext=(6, 0), textcoords="offset points", va="center")
    names = [f"{row['route'].removeprefix('/v1/')}: {row['way']}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    longest = max(row["prompt_tokens"] for row in rows)
    axes.set_xlim(0, longest * 1.65)
    axes.set_xticks(range(0, longest, 1000))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("prompt tokens; filled: cached, by llama.cpp's own usage")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Start engine and proxy, measure, print the table, write JSON and picture."""
    cli = argparse.ArgumentParser(prog="python -m experiments.foreign", description=__doc__.split("\n")[0])
    cli.add_argument("--model", type=Path, default=MODEL, help="the demo model's folder (default: %(default)s)")
    cli.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    args = cli.parse_args(argv)
    if problem := llama_server.missing():
        sys.exit(f"foreign: {problem}")
    write_demo_model(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        write_gguf(args.model, file := Path(scratch) / "model.gguf")
        with (
            running_server(file, program=llama_server.PROGRAM) as engine,
            running_server(args.model, "--upstream", engine.url, program=("-m", "serve", "proxy")) as proxy,
        ):
            rows = run(engine.url, proxy.url, args.rounds, args.seed)
    about = {"engine": "llama.cpp", "rounds": args.rounds, "seed": args.seed}
    write_json(args.out / "summary.json", about | {"rows": rows} | provenance((*PACKAGES, *llama_server.PACKAGES)))
    draw(rows, args.out / "cached.png")
    Console().print(table(rows))


if __name__ == "__main__":
    main()
