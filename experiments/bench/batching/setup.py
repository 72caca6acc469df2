"""What all parts share: their sizes, engines in this process, a server with a cached prompt, medians over rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np

from cache.pool import pages_for
from experiments.bench.timing import Passes
from experiments.harness.client import Timing, count_tokens, measure, scrape
from experiments.harness.server import running_server
from experiments.workloads.sessions import Session, stable_request, with_question
from model import checkpoint
from model.kernels.dispatch import arranged
from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings

PAGE = 64  # tokens
GOAL_CHUNK = 256  # tokens of prefill that the goal lets an inter-token gap hold
SUFFIX = 32  # tokens of its own after a shared prefix
PASSES = 5  # timed passes of each kind in a round

Json = dict[str, Any]
Draw = Callable[[int], np.ndarray]  # fresh random tokens, [count] int32


@dataclass(frozen=True)
class Config:
    """What is measured; lengths in tokens."""

    repeats: int = 5  # rounds of each part
    chunk: int = 1024  # the engine's longest prefill chunk
    llama: str = "28M"  # decode: the model
    sessions: tuple[int, ...] = (1, 2, 4, 8, 16)  # decode: how many at once
    context: int = 1024  # after which sessions decode
    output: int = 128  # decode: of each session
    tokens: int = 52_000  # interference, warm, speculation: the prompt
    concurrent: int = 4  # interference: sessions that decode
    shared: int = 16_384  # shared: the prefix
    requests: int = 8  # shared: at once
    new: int = 300  # warm: after the cached prefix
    speculative_tokens: int = 4  # speculation: draft tokens of each step
    http: bool = True  # warm: measure a server as well


@contextmanager
def started(engine: Engine) -> Iterator[Engine]:
    """The engine, running until left."""
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def drawing(seed: int, vocab: int) -> Draw:
    """Random prompts that share no prefix; ids of a demo model's special tokens, at the end, are left out."""
    rng = np.random.default_rng(seed)
    return lambda count: rng.integers(0, vocab - 16, count).astype(np.int32)


def demo_engine(folder: Path, config: Config, speculative_tokens: int = 0) -> Engine:
    """The demo model's engine, not started, with room for a few of the long prompts."""
    shape, params = checkpoint.load(folder, "float32")
    longest = max(config.tokens, config.shared + SUFFIX, config.context) + 4 * GOAL_CHUNK
    pages = 4 * pages_for(longest, PAGE) + config.concurrent * pages_for(2 * config.context, PAGE)
    settings = EngineSettings(
        pages, longest, PAGE, max_prefill_tokens=config.chunk, speculative_tokens=speculative_tokens
    )
    return Engine(arranged(params, PAGE), shape, settings)


@dataclass(frozen=True)
class Served:
    """A server that has an agent's prompt cached, and the client that asks it."""

    client: httpx.Client
    url: str
    prompt: Json
    new: int

    def ask(self, seed: int, output: int = 8) -> Timing:
        """Time the answer of up to `output` tokens to another question after the prompt."""
        request = with_question(self.prompt, seed, self.new) | {"max_tokens": output, "temperature": 0}
        return measure(self.client, self.url, request)

    def token_counts(self) -> list[float]:
        """The server's counts of generated, draft and accepted tokens."""
        samples = scrape(self.client, self.url)
        return [
            samples[f"tokenzero_{name}_total"]
            for name in ("generated_tokens", "spec_decode_draft_tokens", "spec_decode_accepted_tokens")
        ]


@contextmanager
def served(folder: Path, config: Config, speculative_tokens: int = 0) -> Iterator[Served]:
    """A server set up like `demo_engine`, with an agent's prompt of `config.tokens` cached."""
    flags = ("--max-prefill-tokens", str(config.chunk), "--speculative-tokens", str(speculative_tokens))
    with running_server(folder, *flags, compiled=True) as server, httpx.Client(timeout=600) as client:
        count = lambda request: count_tokens(client, server.url, request)  # noqa: E731
        prompt = stable_request(Session(num_tools=20), config.tokens, count, config.new)
        found = Served(client, server.url, prompt, config.new)
        found.ask(0)
        yield found


def median_pass(passes: Passes, prefix: int, count: int) -> float:
    """The median of a few passes, in seconds."""
    return median(passes.seconds(prefix, count) for _ in range(PASSES))


def rounded(values: list[float]) -> list[float]:
    """Times and ratios for the JSON, to four decimals."""
    return [round(value, 4) for value in values]


def medians(rounds: list[Json]) -> Json:
    """Each figure's median over the rounds, and below `rounds` all values."""
    figures = {key: round(median(r[key] for r in rounds), 4) for key in rounds[0]}
    return figures | {"rounds": {key: rounded([r[key] for r in rounds]) for key in rounds[0]}}
