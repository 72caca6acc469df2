"""Recorded sessions sent to a server: `python -m experiments.wild.live TRACES --live URL --shrink 10`.

Lengths are divided by --shrink, and text is made from ids: equal blocks become equal text, unequal ones differ from
their first words on. Sessions, and models within one, share nothing. What the endpoint reports as cached stands beside
what the trace could reuse, request by request. The rest of a prompt, under one block, is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.harness.client import prompt_counts
from experiments.harness.figures import COLOURS, save, subplots
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.wild.classify import NAMES, Cause, by_time, rows
from experiments.workloads import fitted
from experiments.workloads.agentx import SOURCE, Trace, TraceRequest, read_traces
from experiments.workloads.fitted import load_fit
from experiments.workloads.synthetic import NOUNS, REASONS, VERBS

RESULTS = Path("experiments/results/wild")
WORDS = sorted({word for text in (*VERBS, *NOUNS, *REASONS) for word in text.split()})
Api = Literal["messages", "chat"]
Json = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Call:
    """One request to send, and what its trace says of it."""

    session: str  # its id, with the seed
    asked: TraceRequest
    block: int  # tokens
    reused: int  # blocks that the trace's cache has
    cause: Cause


@dataclass(frozen=True)
class Answer:
    """What an endpoint did with a request, and what the trace says; tokens of the trace are divided."""

    session: str
    cause: str
    tokens: int
    cached: int
    trace_tokens: int
    trace_reused: int
    ms: float
    status: int = 200  # another one: the endpoint refused it


def calls_of(
    traces: Iterable[Trace], sessions: int, requests: int | None, longest: int | None, seed: int = 0
) -> list[Call]:
    """The calls of the first sessions without a prompt of over `longest` tokens, in the order of their times.

    Calls of other seeds have other text.
    """
    fitting = (t for t in traces if longest is None or all(r.input_tokens <= longest for r in t.requests))
    calls = [
        Call(f"{trace.id} {seed}", asked, trace.block_size, int(row["reused"]), Cause(row["cause"]))
        for number, trace in enumerate(islice(fitting, sessions))
        for asked, row in islice(zip(by_time(trace), rows(trace, number), strict=True), requests)
    ]
    return sorted(calls, key=lambda call: call.asked.t_s)


@lru_cache(2**17)
def block_text(session: str, model: str, number: int, words: int) -> str:
    """The text of a block: so many words, drawn by its id."""
    return " ".join(random.Random(f"{session} {model} {number}").choices(WORDS, k=words))


def prompt_texts(call: Call, words_a_block: float) -> tuple[str, str]:
    """A prompt as system text, of the blocks of tools and system text, and a user message of the others."""
    ids = call.asked.hash_ids.tolist()
    # A block's place follows from its id, and so does where its words begin and end.
    ends = [round(words_a_block * (place + 1)) for place in range(len(ids))]
    counts = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    texts = [block_text(call.session, call.asked.model, *each) for each in zip(ids, counts, strict=True)]
    head = min(call.asked.agent.head_tokens // call.block, len(ids) - 1)
    return " ".join(texts[:head]), " ".join(texts[head:])


def body(model: str, system: str, user: str, api: Api, max_tokens: int) -> Json:
    """The request for an endpoint."""
    said = [{"role": "user", "content": user}]
    if api == "chat":
        begin = [{"role": "system", "content": system}] if system else []
        return {"model": model, "max_tokens": max_tokens, "messages": begin + said}
    return {"model": model, "max_tokens": max_tokens, "messages": said} | ({"system": system} if system else {})


def usage_counts(usage: Json, api: Api) -> tuple[int, int]:
    """Tokens and cached tokens of a prompt by an endpoint's usage."""
    if api == "messages":
        return prompt_counts(usage)
    return usage["prompt_tokens"], (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def headers(call: Call) -> dict[str, str]:
    """The headers by which clients name their session and agent."""
    agent = call.asked.agent
    named = {"anthropic-version": "2023-06-01", "x-claude-code-session-id": call.session}
    if agent.parent is not None:
        named |= {"x-claude-code-agent-id": agent.id, "x-claude-code-parent-agent-id": agent.parent or "main"}
    return named


class Endpoint:
    """An endpoint of one of the two APIs, and its model."""

    def __init__(self, url: str, api: Api) -> None:
        # A connection for each request: a server may close one that was idle for seconds.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client, self.api = httpx.Client(base_url=url, timeout=600, limits=limits), api
        self.model = self.client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        self.path = "/v1/messages" if api == "messages" else "/v1/chat/completions"

    def send(self, system: str, user: str, max_tokens: int, headers: dict[str, str]) -> tuple[int, int, int, float]:
        """Status, tokens, cached tokens and milliseconds of a request. Raises httpx.HTTPError without an answer."""
        content, begin = body(self.model, system, user, self.api, max_tokens), time.perf_counter()
        answer = self.client.post(self.path, json=content, headers=headers)
        ms = 1000 * (time.perf_counter() - begin)
        counts = usage_counts(answer.json()["usage"], self.api) if answer.status_code == 200 else (0, 0)
        return answer.status_code, *counts, ms

    def tokens_a_word(self) -> float:
        """Tokens of a word of our texts, by the usage of two prompts."""
        texts = [" ".join(random.Random(f"probe {count}").choices(WORDS, k=count)) for count in (200, 1000)]
        few, many = (self.send("", text, 1, {"anthropic-version": "2023-06-01"})[1] for text in texts)
        if many <= few:
            raise ValueError(f"prompts of 200 and 1,000 words have {few} and {many} tokens by its usage")
        return (many - few) / 800


def replay(calls: Sequence[Call], endpoint: Endpoint, shrink: float, speed: float, answers: bool) -> Iterator[Answer]:
    """Send the calls, each after the answer to the one before and not before its time, `speed` times as fast."""
    words = 1 / endpoint.tokens_a_word()  # a token
    start = time.monotonic()
    for call in calls:
        time.sleep(max(0.0, call.asked.t_s / speed - (time.monotonic() - start)))
        length = max(1, round(call.asked.output_tokens / shrink)) if answers else 1
        texts = prompt_texts(call, call.block / shrink * words)
        status, tokens, cached, ms = endpoint.send(*texts, length, headers(call))
        blocks = (len(call.asked.hash_ids), call.reused)
        whole, reused = (round(each * call.block / shrink) for each in blocks)
        yield Answer(call.session, NAMES[call.cause], tokens, cached, whole, reused, round(ms, 1), status)


def compare(answers: Sequence[Answer]) -> Json:
    """Reuse by the endpoint beside the trace's own, all together and by cause, as JSON values."""
    good = [answer for answer in answers if answer.status == 200]
    made: Json = {"requests": len(answers), "refused": len(answers) - len(good)}
    if not good:
        return made
    apart = np.array([a.cached / a.tokens - a.trace_reused / a.trace_tokens for a in good])
    made["difference_by_request_q5_50_95"] = np.percentile(apart, [5, 50, 95]).round(4).tolist()
    groups = {"all": good} | {n: found for n in NAMES.values() if (found := [a for a in good if a.cause == n])}
    made["groups"] = [
        {
            "requests": name,
            "count": len(group),
            "tokens": sum(a.tokens for a in group),
            "trace_tokens": sum(a.trace_tokens for a in group),
            "reused": round(sum(a.cached for a in group) / sum(a.tokens for a in group), 4),
            "trace_reused": round(sum(a.trace_reused for a in group) / sum(a.trace_tokens for a in group), 4),
            "median_ms": round(float(np.median([a.ms for a in group])), 1),
        }
        for name, group in groups.items()
    ]
    return made


def draw(answers: Sequence[Answer], path: Path) -> None:
    """Each request's reuse by the endpoint over the trace's own."""
    figure, axes = subplots(4.4, 6)
    axes.plot([0, 100], [0, 100], color="#666666", linewidth=0.8, linestyle=":")
    for name, colour in zip(NAMES.values(), (*COLOURS, "#9a9a9a"), strict=True):
        chosen = [a for a in answers if a.cause == name and a.status == 200]
        if chosen:
            own, live = zip(*((a.trace_reused / a.trace_tokens, a.cached / a.tokens) for a in chosen), strict=True)
            at = ([100 * each for each in own], [100 * each for each in live])
            axes.scatter(*at, s=14, color=colour, alpha=0.7, label=f"{name} ({len(chosen)})")
    axes.set(xlabel="reused by the trace's own ids, % of the prompt", ylabel="cached by the endpoint's usage, %")
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def print_table(found: Json, console: Console) -> None:
    """Reuse beside the trace's own for a terminal."""
    grid = make_table(("requests", "count", "tokens", "reused", "by the trace", "median ms"), ("requests",))
    for each in found.get("groups", ()):
        shares = (f"{each['reused']:.1%}", f"{each['trace_reused']:.1%}", f"{each['median_ms']:,.0f}")
        grid.add_row(each["requests"], f"{each['count']:,}", f"{each['tokens']:,}", *shares)
    console.print(grid)
    console.print(f"{found['refused']} of {found['requests']} requests refused")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m experiments.wild.live", description=__doc__.split("\n")[0])
    about = f"a folder or archive of traces, such as {SOURCE} has (default: synthetic sessions that are fitted to them)"
    cli.add_argument("traces", type=Path, nargs="?", help=about)
    cli.add_argument("--live", metavar="URL", required=True, help="a server, such as http://127.0.0.1:8000")
    cli.add_argument("--api", choices=("messages", "chat"), default="messages", help="(default: %(default)s)")
    cli.add_argument("--shrink", type=float, default=10, help="what lengths are divided by (default: %(default)s)")
    cli.add_argument("--sessions", type=int, default=4, help="the first so many, side by side (default: %(default)s)")
    cli.add_argument("--requests", type=int, help="at most, of each session")
    cli.add_argument("--longest", type=int, metavar="TOKENS", help="leave out sessions with longer prompts")
    cli.add_argument("--seed", type=int, default=0, help="another one for each run on a server that is warm")
    cli.add_argument("--speed", type=float, default=float("inf"), help="times the trace's (default: no pauses)")
    cli.add_argument("--answers", action="store_true", help="ask for answers of the trace's lengths, divided, not of 1")
    cli.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    return cli


def main(argv: list[str] | None = None) -> None:
    """Send the sessions, print a table, write what each request found."""
    cli = parser()
    args, console, skipped = cli.parse_args(argv), Console(), list[str]()
    for name in ("shrink", "sessions", "speed", "requests"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            cli.error(f"--{name} {getattr(args, name)}: expected more than 0")
    try:
        traces = read_traces(args.traces, skipped.append) if args.traces else fitted.sessions(load_fit(), 10_000)
        calls = calls_of(traces, args.sessions, args.requests, args.longest, args.seed)
    except (OSError, ValueError) as error:
        cli.error(str(error))
    if not calls:
        cli.error(f"--longest {args.longest}: expected a length that a session keeps within")
    try:
        sent = replay(calls, Endpoint(args.live, args.api), args.shrink, args.speed, args.answers)
        answers = list(track(sent, "sending", total=len(calls), console=console, transient=True))
    except (httpx.HTTPError, LookupError, ValueError) as error:
        cli.error(f"--live {args.live}: expected an endpoint with usage, found {type(error).__name__}: {error}")
    for line in skipped:
        console.print(f"left out: {line}", style="yellow", highlight=False, soft_wrap=True)
    found = compare(answers)
    told = ("api", "shrink", "sessions", "requests", "longest", "answers", "seed")
    options = {"source": SOURCE if args.traces else "fitted"} | {name: getattr(args, name) for name in told}
    write_json(args.out / "live.json", {**options, **found, **provenance()}, indent=1)
    lines = (json.dumps(asdict(answer)) + "\n" for answer in answers)
    (args.out / "live.jsonl").write_text("".join(lines), encoding="utf-8")
    draw(answers, args.out / "live.png")
    print_table(found, console)
    console.print(f"results in {args.out}")


if __name__ == "__main__":
    main()
