"""The time that a report on a prompt takes: `python -m experiments.bench.divergence`.

The prompt has 52K tokens. As many others as the server remembers share all of it except their header, their folder, a
tool or the last question. Measured are `Divergences.started`, with sections and texts, and `Volatility.observe`.
Nothing is cached between two reports.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.workloads import sessions
from experiments.workloads.demo_model import TINY, write_demo_model
from experiments.workloads.sessions import Session
from experiments.workloads.synthetic import Json, text_block
from serve.api.messages import decode_count_tokens
from serve.diagnosis.divergence import REMEMBERED, Divergences, EncodedRequest, RememberedRequest, nearest
from serve.diagnosis.sections import vocabulary_of
from serve.diagnosis.volatility import Volatility
from serve.formats.format import write_turn
from serve.prompt.conversation import answers
from serve.prompt.render import prompt
from serve.prompt.replay import RecordedAnswer
from serve.prompt.tokenizer import Tokenizer, load_tokenizer

PAGE = 64


def cases(tokens: int, tokenizer: Tokenizer) -> dict[str, list[Json]]:
    """For each cause, one more body than is remembered, each of `tokens` tokens."""

    def count(body: Json) -> int:
        return len(prompt(decode_count_tokens(json.dumps(body).encode()), tokenizer).tokens)

    numbers = range(REMEMBERED + 1)
    stable = sessions.stable_request(Session(group="bench"), tokens, count)
    asked = sessions.with_question(stable, 0)
    blocks, tools = asked["system"], asked["tools"]
    return {
        "preamble": [sessions.with_header(asked, f"{sessions.HEADER} cch={n:05x};") for n in numbers],
        "system_changed": [asked | {"system": [*blocks, text_block(f"Folder {n:04}")]} for n in numbers],
        "tools_changed": [asked | {"tools": [*tools, tools[0] | {"name": f"Tool{n:02}"}]} for n in numbers],
        "tools_reordered": [asked | {"tools": reordered(tools, n)} for n in numbers],
        "new_content": [sessions.with_question(stable, n) for n in numbers],
    }


def reordered(tools: list[Json], number: int) -> list[Json]:
    """The tools in a random order seeded by `number`. The first stays, except with the last number."""
    first, *rest = tools
    return [*rest, first] if number == REMEMBERED else [first, *random.Random(number).sample(rest, len(rest))]


def remembered_request(id: str, body: Json, tokenizer: Tokenizer) -> RememberedRequest:
    """A body as the server remembers it, with its answers as sampled. It shares no memory with others."""
    request = decode_count_tokens(json.dumps(body).encode())
    form = tokenizer.template.format
    recalled = [RecordedAnswer("", tokenizer.encode(write_turn(form, answer))) for answer in answers(request.messages)]
    made = prompt(request, tokenizer, recalled)
    return RememberedRequest(id, request, made, made.tokens, "model")


def measure(bodies: list[Json], tokenizer: Tokenizer, repeats: int) -> tuple[str, int, list[float], list[float]]:
    """The cause, the prompt's tokens, and the milliseconds of each report and of each check for volatile segments."""
    vocabulary = vocabulary_of(tokenizer.hf)
    others = [remembered_request(str(number), body, tokenizer) for number, body in enumerate(bodies)]
    last = others.pop()
    kept = [EncodedRequest.encode(other) for other in others]
    reused = {"device": nearest(last.tokens, kept)[1]}
    reports, looks = [], []
    for _ in range(repeats):
        divergences, volatility = Divergences(vocabulary, PAGE), Volatility()
        for other in kept:
            divergences.remembered.put(other.id, other)
        volatility.observe("", others[-1].request)
        new = replace(last)
        start = time.perf_counter()
        report = divergences.started(new, reused)
        middle = time.perf_counter()
        volatility.observe("", new.request)
        looks.append(1000 * (time.perf_counter() - middle))
        reports.append(1000 * (middle - start))
    return str(report.cause), report.prompt_tokens, reports, looks


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.divergence", description=__doc__)
    parser.add_argument("--tokens", type=int, default=52_000)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    table = Table("difference", "cause", "tokens", "report, ms: median", "max", "volatility, ms: median", "max")
    with tempfile.TemporaryDirectory() as folder:
        write_demo_model(Path(folder, "model"), config=TINY)
        tokenizer = load_tokenizer(str(Path(folder, "model")))
    for name, bodies in track(cases(args.tokens, tokenizer).items(), description="reporting"):
        cause, tokens, reports, looks = measure(bodies, tokenizer, args.repeats)
        times = [f"{f(values):.3f}" for values in (reports, looks) for f in (statistics.median, max)]
        table.add_row(name, cause, f"{tokens:,}", *times)
    Console().print(table)


if __name__ == "__main__":
    main()
