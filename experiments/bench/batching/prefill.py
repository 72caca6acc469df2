"""A prefill's effect on sessions that decode, a cold prefix that several requests share, and a warm prompt's TTFT."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.bench.batching.setup import (
    GOAL_CHUNK,
    PASSES,
    SUFFIX,
    Config,
    Draw,
    Json,
    median_pass,
    medians,
    served,
)
from experiments.bench.timing import Asked, Passes
from serve.engine.engine import Engine

CALM_STEPS = 64  # undisturbed decode steps before each prefill


def gaps(request: Asked, begin: float, end: float) -> list[float]:
    """Seconds between one token and the next, of those that came in (begin, end]."""
    pairs = zip(request.times, request.times[1:], strict=False)
    return [after - before for before, after in pairs if begin < after <= end]


def disturbed(engine: Engine, contexts: list[np.ndarray], prompt: np.ndarray) -> tuple[list[float], list[float], float]:
    """Sessions decode, first undisturbed and then while `prompt` prefills.

    Returns their inter-token gaps before and during the prefill, and its seconds. Raises RuntimeError if one ends
    before the prefill does.
    """
    for context in contexts:
        Asked(engine, context, 1).wait()
    others = [Asked(engine, context, engine.settings.max_model_len) for context in contexts]
    for other in others:
        other.wait(1)
    calm_from = max(other.times[0] for other in others)
    for other in others:
        other.wait(len(other.times) + CALM_STEPS)
    long = Asked(engine, prompt, 1)
    long.wait()
    for other in others:
        engine.cancel(other.number)
    if any(other.ended for other in others):
        raise RuntimeError("a session ended before the prefill: lower --context or raise --tokens")
    calm = [gap for other in others for gap in gaps(other, calm_from, long.submitted)]
    busy = [gap for other in others for gap in gaps(other, long.submitted, long.times[0])]
    return calm, busy, long.ttft


def interference(engine: Engine, passes: Passes, draw: Draw, config: Config, console: Console) -> Json:
    """Inter-token latency of sessions that decode while a cold prompt prefills, and what the prefill loses by them.

    The yardstick is the median undisturbed gap of the same sessions, and the median pass, alone, of a chunk of 256
    tokens at `PASSES` places in the last tenth of the prompt, where chunks take longest and p99 lies. Percentiles are
    each round's own; alone means the same engine with its usual chunks and no other session.
    """
    chunk = min(GOAL_CHUNK, config.chunk)
    places = np.linspace(0.9 * config.tokens, config.tokens - chunk, PASSES).astype(int)
    contexts = [draw(config.context) for _ in range(config.concurrent)]
    rounds: list[Json] = []
    for _ in track(range(config.repeats), description="interference", console=console):
        alone = Asked(engine, draw(config.tokens), 1)
        alone.wait()
        calm, busy, seconds = disturbed(engine, contexts, draw(config.tokens))
        step, pure = median(calm), median(passes.seconds(int(place), chunk) for place in places)
        p50, p95, p99 = np.percentile(busy, (50, 95, 99)).tolist()
        rounds.append(
            {
                "itl_p50_ms": 1e3 * p50,
                "itl_p95_ms": 1e3 * p95,
                "itl_p99_ms": 1e3 * p99,
                "itl_max_ms": 1e3 * max(busy),
                "step_ms": 1e3 * step,
                "chunk_ms": 1e3 * pure,
                "yardstick_ms": 1e3 * (step + pure),
                "p99_over_yardstick": p99 / (step + pure),
                "prefill_alone_s": alone.ttft,
                "prefill_concurrent_s": seconds,
                "prefill_speed_kept": alone.ttft / seconds,
            }
        )
    about = {"tokens": config.tokens, "concurrent": config.concurrent, "context": config.context, "chunk": chunk}
    return about | medians(rounds)


def shared(engine: Engine, draw: Draw, config: Config, console: Console) -> Json:
    """Seconds until several requests at once on a cold prefix all have a first token, and until one alone has."""
    rounds: list[Json] = []
    for _ in track(range(config.repeats), description="shared", console=console):
        found: Json = {}
        for name, count in (("one", 1), ("many", config.requests)):
            prefix, before = draw(config.shared), engine.counters.prefilled_tokens
            requests = [Asked(engine, np.concatenate([prefix, draw(SUFFIX)]), 1) for _ in range(count)]
            for request in requests:
                request.wait()
            found[f"{name}_s"] = max(r.times[0] for r in requests) - requests[0].submitted
            found[f"{name}_computed"] = engine.counters.prefilled_tokens - before
        rounds.append(found | {"many_over_one": found["many_s"] / found["one_s"]})
    return {"prefix": config.shared, "requests": config.requests} | medians(rounds)


def warm(engine: Engine, passes: Passes, folder: Path, draw: Draw, config: Config, console: Console) -> Json:
    """TTFT of fresh tokens after a cached prefix, in the engine and over HTTP, over the pass of these tokens alone.

    The pass computes, after as long a prefix, as many tokens as the cache did not have.
    """
    prefix = draw(config.tokens - config.new)
    Asked(engine, prefix, 1).wait()
    rounds: list[Json] = []
    with ExitStack() as stack:
        server = stack.enter_context(served(folder, config)) if config.http else None
        for number in track(range(config.repeats), description="warm", console=console):
            asked = Asked(engine, np.concatenate([prefix, draw(config.new)]), 1)
            asked.wait()
            assert asked.started is not None
            reused = asked.started.reused_tokens
            alone = median_pass(passes, reused, config.tokens - reused)
            found = {"reused": reused, "ttft_ms": 1e3 * asked.ttft, "pass_ms": 1e3 * alone}
            found["ttft_over_pass"] = asked.ttft / alone
            if server:
                timing = server.ask(1 + number)
                # The prompt may be a few tokens longer than the one whose pass is timed: as many before its end.
                computed = timing.prompt_tokens - timing.cached_tokens
                alone = median_pass(passes, config.tokens - computed, computed)
                found |= {"http_reused": timing.cached_tokens, "http_ttft_ms": timing.ttft_ms}
                found |= {"http_pass_ms": 1e3 * alone, "http_over_pass": timing.ttft_ms / (1e3 * alone)}
            rounds.append(found)
    return {"tokens": config.tokens, "new": config.new} | medians(rounds)
