"""How well a server predicts its own time to the first token, over the shapes of real agents' requests.

`python -m experiments.bench.predict --model DIR`. Agents grow their prompts as recorded sessions of Claude Code do (710
public ones of callanjfox/kv-cache-tester, https://github.com/callanjfox/kv-cache-tester), all lengths divided by
`--shrink`: 71 requests a session, 2.2% of requests break at the first user message, behind tools and system text, and
all others append. First they take turns, one request at a time, then they run at once. The pool has room for a part of
them, and a store for all, so that some prompts come back from the disk. Each prompt is asked about just before it is
sent; the answer's header predicts once more.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console

from experiments.harness.figures import COLOURS, save, subplots, time_label
from experiments.harness.other_load import start_watch
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.harness.server import running_server
from experiments.workloads.synthetic import prose
from serve.web.headers import FORECAST_HEADER

RESULTS = Path("experiments/results/bench/predict.json")
CHARS_PER_TOKEN = 4.5
# Tokens of a recorded session: its tools and system text, its first question, and what a request appends.
HEAD, QUESTION, APPENDED, SPREAD = 21_000, 2_000, 1_650, 1.2
BREAKS = 0.022  # of requests
TURNS = 71  # of a session
GAP_S = 0.3  # between two requests of one agent, where all run at once


@dataclass(frozen=True)
class Prediction:
    """One request: what was expected and what was measured, in milliseconds since its last byte."""

    arm: str  # `turns` or `at once`
    tokens: int
    read: int  # from the cache
    restored: int  # of these, from a tier
    asked_ms: float | None  # predicted by the count
    header_ms: float  # predicted as it came
    measured_ms: float

    @property
    def error(self) -> float:
        """Of the header, as a share of what was measured."""
        return abs(self.header_ms / self.measured_ms - 1)

    @property
    def asked_error(self) -> float | None:
        """Of the count, as a share of what was measured."""
        return None if self.asked_ms is None else abs(self.asked_ms / self.measured_ms - 1)


def agent(seed: int, shrink: float, start: int) -> Iterator[dict[str, Any]]:
    """The bodies of one agent's session, from turn `start` on: they append, and break now and then."""
    rng = random.Random(f"agent {seed}")

    def words(tokens: float) -> str:
        return prose(rng, max(8, round(tokens / shrink * CHARS_PER_TOKEN)))

    def appended() -> list[dict[str, Any]]:
        mean = APPENDED * rng.lognormvariate(0, SPREAD) / float(np.exp(SPREAD**2 / 2))
        return [
            {"role": "assistant", "content": words(0.25 * mean)},
            {"role": "user", "content": words(0.75 * mean)},
        ]

    system, messages = words(HEAD), [{"role": "user", "content": words(QUESTION)}]
    for turn in range(TURNS):
        if turn and rng.random() < BREAKS:
            messages[0] = {"role": "user", "content": words(QUESTION)}
        if turn >= start:
            yield {"model": "m", "max_tokens": 4, "temperature": 0, "system": system, "messages": messages}
        messages += appended()


def sent(client: httpx.Client, body: dict[str, Any], arm: str) -> Prediction | None:
    """Ask about a request, and send it; None if its answer has no text to time."""
    counted = client.post("/v1/messages/count_tokens", json=body).raise_for_status().json()
    payload, at, first, usage = json.dumps(body | {"stream": True}).encode(), 0.0, 0.0, {}

    def content() -> Iterator[bytes]:
        nonlocal at
        yield payload
        at = time.perf_counter()

    headers = {"content-length": str(len(payload)), "content-type": "application/json"}
    with client.stream("POST", "/v1/messages", content=content(), headers=headers) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            if event["type"] == "content_block_delta":
                first = first or time.perf_counter()
            elif event["type"] == "message_start":
                usage = event["message"]["usage"]
    if not first or FORECAST_HEADER not in response.headers:
        return None
    expected = dict(part.split("=") for part in response.headers[FORECAST_HEADER].split(", "))
    by_tier = usage["cache_read_by_tier"]
    return Prediction(
        arm,
        counted["input_tokens"],
        usage["cache_read_input_tokens"],
        sum(tokens for tier, tokens in by_tier.items() if tier != "device"),
        counted.get("cache", {}).get("predicted_ttft_ms"),
        float(expected["ttft-ms"]),
        (first - at) * 1e3,
    )


def in_turns(url: str, agents: Sequence[Iterator[dict[str, Any]]], seconds: float, seed: int) -> list[Prediction]:
    """Requests of agents that take turns at random, for so many seconds."""
    rng, end, found = random.Random(seed), time.monotonic() + seconds, []
    with httpx.Client(base_url=url, timeout=300) as client:
        while time.monotonic() < end:
            body = next(rng.choice(agents), None)
            if body and (done := sent(client, body, "turns")):
                found.append(done)
    return found


def at_once(url: str, agents: Sequence[Iterator[dict[str, Any]]], seconds: float) -> list[Prediction]:
    """Requests of agents that run at once, for so many seconds."""
    end, found = time.monotonic() + seconds, list[Prediction]()

    def run(number: int, bodies: Iterator[dict[str, Any]]) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=url, timeout=300) as client:
            for body in bodies:
                if time.monotonic() >= end:
                    return
                if done := sent(client, body, "at once"):
                    found.append(done)
                time.sleep(rng.expovariate(1 / GAP_S))

    threads = [threading.Thread(target=run, args=each) for each in enumerate(agents)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def summary(found: Sequence[Prediction]) -> dict[str, float]:
    """Median and 90th percentile of the errors, of the header and of the count."""
    errors = [each.error for each in found]
    asked = [each.asked_error for each in found if each.asked_error is not None]
    return {
        "requests": len(found),
        "median_error": statistics.median(errors),
        "p90_error": float(np.quantile(errors, 0.9)),
        "count_median_error": statistics.median(asked),
        "count_p90_error": float(np.quantile(asked, 0.9)),
    }


def draw(found: Sequence[Prediction], path: Path) -> None:
    """Predicted over measured, both logarithmic, with the band of 25% around what is right."""
    figure, axes = subplots()
    ends = [min(each.measured_ms for each in found) / 1.3, max(each.measured_ms for each in found) * 1.3]
    axes.fill_between(ends, [0.75 * x for x in ends], [1.25 * x for x in ends], color="#8884", linewidth=0)
    axes.plot(ends, ends, color="#888", linewidth=1)
    for colour, arm in zip(COLOURS, ("turns", "at once"), strict=False):
        points = [each for each in found if each.arm == arm]
        label = "one request at a time" if arm == "turns" else "several at once"
        x, y = [each.measured_ms for each in points], [each.header_ms for each in points]
        axes.scatter(x, y, s=9, color=colour, alpha=0.6, linewidth=0, label=label)
    for axis, name in ((axes.xaxis, "measured"), (axes.yaxis, "predicted")):
        axis.axes.set(xscale="log", yscale="log")
        axis.set_major_formatter(time_label)
        axis.set_label_text(f"{name} time to the first token")
    axes.legend(frameon=False)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run both arms against one server, print and write what was found."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.predict", description=__doc__)
    cli.add_argument("--model", type=Path, required=True)
    cli.add_argument("--shrink", type=float, default=8.0, help="all recorded lengths are divided by it")
    cli.add_argument("--agents", type=int, default=6)
    cli.add_argument("--at-once", type=int, default=3, help="agents that run at once")
    cli.add_argument("--seconds", type=float, default=100.0, help="of the first arm; the second one has half of it")
    cli.add_argument("--warm-up", type=float, default=15.0, help="seconds before, whose requests do not count")
    cli.add_argument("--pool", default="96MiB")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--output", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    starts = [TURNS * number // args.agents for number in range(args.agents)]
    agents = [agent(args.seed + number, args.shrink, start) for number, start in enumerate(starts)]
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--store", folder, "--kv-pool-bytes", args.pool, "--max-model-len", "45000", "--flush-seconds", "0.1")
        with running_server(args.model, *flags, compiled=True) as server:
            in_turns(server.url, agents, args.warm_up, args.seed)
            watch = start_watch()
            found = in_turns(server.url, agents, args.seconds, args.seed + 1)
            more = [agent(args.seed + 100 + number, args.shrink, 30) for number in range(args.at_once)]
            found += at_once(server.url, more, args.seconds / 2)
            other = watch()
    arms = {arm: [each for each in found if each.arm == arm] for arm in ("turns", "at once")}
    arms["restored"] = [each for each in found if each.restored]
    table = make_table(["arm", "requests", "median", "p90", "count: median", "count: p90"], words=["arm"])
    summaries = {arm: summary(each) for arm, each in ({"all": found} | arms).items() if each}
    for arm, each in summaries.items():
        count, *shares = each.values()
        table.add_row(arm, str(int(count)), *(f"{share:.1%}" for share in shares))
    Console().print(table)
    requests = [asdict(each) for each in found]
    options = {"shrink": args.shrink, "agents": args.agents, "at_once": args.at_once, "other_load": other}
    write_json(args.output, options | {"errors": summaries, "requests": requests} | provenance(), indent=0)
    draw(found, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
