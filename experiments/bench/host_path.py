"""The host path of an agent's request: from its body's bytes to the tokens and pages that the engine admits, by phase.

`python -m experiments.bench.host_path` needs no GPU and runs no model. A request of each length is measured once cold,
and then with new questions of 300 tokens at its end, which are tokenised for the first time after a cached prefix.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cache.prefix_cache import PrefixCache
from experiments.harness.provenance import provenance
from experiments.workloads.demo_model import write_demo_model
from experiments.workloads.sessions import Session, requests, with_question
from experiments.workloads.synthetic import Json
from serve.api.messages import decode_request
from serve.prompt.render import prompt
from serve.prompt.replay import ReplayLog
from serve.prompt.tokenizer import Tokenizer, load_tokenizer
from serve.rules.normalize import normalize
from serve.web.timing import Phases

RESULTS = Path("experiments/results/bench/host_path.json")
PHASES = ("decode", "normalize", "recall", "render", "match")
CHARS_PER_TOKEN = 3.5  # in a session's JSON with the demo's tokenizer, about
PAGE = 64


@dataclass(frozen=True)
class Timed:
    """One request: milliseconds by phase, tokens of its prompt, and those of them that were cached."""

    phases: dict[str, float]
    tokens: int
    cached: int

    @property
    def total(self) -> float:
        """Milliseconds in all."""
        return sum(self.phases.values())


@dataclass(frozen=True)
class Host:
    """The state of a server between requests, without the engine."""

    tokenizer: Tokenizer
    replay: ReplayLog
    cache: PrefixCache


def session_of(tokens: int) -> Json:
    """The last request of a session of about this many tokens."""
    short = takewhile(lambda body: len(json.dumps(body)) < tokens * CHARS_PER_TOKEN, requests(Session()))
    return list(short)[-1]


def measure_request(host: Host, body: Json) -> Timed:
    """Take one request to the point where the engine would admit it, and leave its prompt in the cache."""
    raw, phases = json.dumps(body).encode(), Phases()
    with phases.timed("decode"):
        message = decode_request(raw)
    with phases.timed("normalize"):
        normalized = normalize(message, frozenset(["strip-preamble"])).request
    with phases.timed("recall"):
        recalled = host.replay.recall(b"", normalized.messages)
    with phases.timed("render"):
        made = prompt(normalized, host.tokenizer, recalled)
    with phases.timed("match"):
        lease = host.cache.match(made.tokens[:-1])
    cached = lease.reused
    lease, _ = host.cache.extend(lease, len(made.tokens))
    host.cache.insert(lease, made.tokens)
    host.cache.release(lease)
    return Timed(phases.ms(), len(made.tokens), cached)


def measure(tokenizer_of: Callable[[], Tokenizer], tokens: int, repeats: int) -> tuple[Timed, list[Timed]]:
    """A cold request to a new host, and the warm ones after it."""
    host = Host(tokenizer_of(), ReplayLog(), PrefixCache(2 * tokens // PAGE + 100 * repeats, PAGE, b""))
    body = session_of(tokens) | {"max_tokens": 8}
    cold = measure_request(host, with_question(body, 0))
    return cold, [measure_request(host, with_question(body, 1 + number)) for number in range(repeats)]


def row(cold: Timed, warm: list[Timed]) -> dict[str, Any]:
    """Medians, in milliseconds."""
    return {
        "tokens": cold.tokens,
        "cached": round(median(t.cached for t in warm)),
        "cold_ms": round(cold.total, 1),
        "warm_ms": round(median(t.total for t in warm), 2),
        "warm_max_ms": round(max(t.total for t in warm), 2),
        "phases_ms": {phase: round(median(t.phases[phase] for t in warm), 3) for phase in PHASES},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.host_path", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[52_000, 200_000], help="lengths, about")
    parser.add_argument("--repeats", type=int, default=30, help="warm requests of each length (default: 30)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go (default: %(default)s)")
    args = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as folder:
        write_demo_model(Path(folder), console=console)
        rows = [
            row(*measure(lambda: load_tokenizer(folder), tokens, args.repeats))
            for tokens in track(args.tokens, "measuring", console=console)
        ]
    table = Table("tokens", "cached", "cold", "warm", "max", *PHASES, box=SIMPLE_HEAD, title="host path, ms")
    for r in rows:
        phases = (f"{r['phases_ms'][phase]:.2f}" for phase in PHASES)
        times = (f"{r['cold_ms']:.0f}", f"{r['warm_ms']:.1f}", f"{r['warm_max_ms']:.1f}")
        table.add_row(f"{r['tokens']:,}", f"{r['cached']:,}", *times, *phases)
    console.print(table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"rows": rows, "repeats": args.repeats} | provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main()
