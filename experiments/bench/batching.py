"""What company costs inside the engine: decode in a batch, beside a prefill, shared prefixes and cached ones.

And what guesses bring. `python -m experiments.bench.batching` runs real engines in this process, a 28M llama for decode
and the demo model for the rest, and server processes for what is asked over HTTP. What is compared takes turns; each
figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cache.pool import pages_for
from experiments.bench.timing import Asked, Passes
from experiments.gpu.model import random_params
from experiments.harness.client import Timing, count_tokens, measure, scrape
from experiments.harness.provenance import machine, provenance
from experiments.harness.server import running_server
from experiments.workloads.demo_model import write_demo_model
from experiments.workloads.sessions import Session, stable_request, with_question
from model import checkpoint
from model.config import ModelConfig, RopeConfig
from model.params import unstacked
from serve.engine.engine import Engine
from serve.engine.runtime import set_up_jax
from serve.engine.settings import EngineSettings

RESULTS = Path("experiments/results/bench/batching.json")
PARTS = ("decode", "interference", "shared", "warm", "guesses")
PAGE = 64
GOAL_CHUNK = 256  # tokens of prefill that the goal lets an inter-token gap hold
TAIL = 32  # tokens of its own behind a shared prefix
CALM_STEPS = 64  # undisturbed decode steps in front of each prefill
PASSES = 5  # timed passes of each kind in a round
# The sizes of prefill_decode's llama of that name, which torch makes and this one does not.
MEDIUM = ModelConfig(
    family="llama",
    vocab_size=8192,
    embed_size=512,
    ffn_size=1408,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position=131_072,
    norm_eps=1e-6,
    rope=RopeConfig(),
    tie_embeddings=True,
)
SMALL = replace(MEDIUM, vocab_size=256, embed_size=64, ffn_size=128, num_layers=2, num_heads=4, num_kv_heads=2)
LLAMAS = {"28M": MEDIUM, "tiny": replace(SMALL, head_dim=16)}

Json = dict[str, Any]
Draw = Callable[[int], np.ndarray]  # fresh random tokens, [count] int32


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of a part; `least` says whether the figure is to reach it or to stay below."""

    part: str
    figure: str
    bound: float
    text: str
    least: bool = False

    def judged(self, result: Json) -> Json | None:
        """The figure beside its bound; None where the part has no such figure."""
        found = result[self.part].get(self.figure)
        if found is None:
            return None
        reached = found >= self.bound if self.least else found <= self.bound
        bound = {"at_least" if self.least else "at_most": self.bound}
        return {"part": self.part, "what": self.text, "measured": found} | bound | {"reached": reached}


GOALS = (
    Goal("decode", "eight_over_one", 3.5, "tokens/s of 8 sessions over one's", least=True),
    Goal("interference", "p99_over_yardstick", 1.5, "p99 ITL over an undisturbed step and a chunk of 256"),
    Goal("interference", "prefill_speed_kept", 0.85, "prefill's speed in company over alone", least=True),
    Goal("shared", "many_over_one", 1.3, "last first token of all sharers over one's"),
    Goal("warm", "ttft_over_pass", 1.5, "warm TTFT in the engine over its tokens' pass"),
    Goal("warm", "http_over_pass", 1.5, "warm TTFT over HTTP over its tokens' pass"),
)


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


def window_rate(requests: list[Asked]) -> float:
    """Tokens a second of all together, from where the last has begun to where the first has ended."""
    begin, end = max(r.times[0] for r in requests), min(r.times[-1] for r in requests)
    if end <= begin:
        raise ValueError("the requests never decoded together: raise --output")
    return sum(begin < at <= end for r in requests for at in r.times) / (end - begin)


def decode(args: argparse.Namespace, console: Console) -> Json:
    """Aggregate tokens per second of n sessions that decode behind cached contexts, for each n in turn."""
    config = LLAMAS[args.llama]
    params = replace(unstacked(random_params(config, jnp.dtype("float32"))), lm_head=None)
    most, length = max(args.sessions), args.context + args.output
    pages = (most + 1) * (pages_for(length, PAGE) + 1)
    settings = EngineSettings(pages, length, PAGE, max_num_seqs=most, max_prefill_tokens=min(args.chunk, args.context))
    draw = drawing(0, config.vocab_size)
    contexts = [draw(args.context) for _ in range(most)]
    rates: dict[int, list[float]] = {n: [] for n in args.sessions}
    with started(Engine(params, config, settings)) as engine:
        for _ in track(range(args.repeats), description="decode", console=console):
            for context in contexts:
                Asked(engine, context, 1).wait()
            for n in args.sessions:
                requests = [Asked(engine, context, args.output) for context in contexts[:n]]
                for request in requests:
                    request.wait()
                rates[n].append(window_rate(requests))
    first, rows = rates[args.sessions[0]], {}
    for n, measured in rates.items():
        ratio = median(a / b for a, b in zip(measured, first, strict=True))
        rows[n] = {"tokens_per_s": rounded(measured), "median": round(median(measured), 1), "ratio": round(ratio, 3)}
    compared = args.sessions[0] == 1 and 8 in rows
    return {
        "llama": args.llama,
        "context": args.context,
        "sessions": rows,
        "eight_over_one": rows[8]["ratio"] if compared else None,
    }


def demo_engine(folder: Path, args: argparse.Namespace, guesses: int = 0) -> Engine:
    """The demo model's engine, not started, with room for a few of the long prompts."""
    config, params = checkpoint.load(folder, "float32")
    longest = max(args.tokens, args.shared + TAIL, args.context) + 4 * GOAL_CHUNK
    pages = 4 * pages_for(longest, PAGE) + args.company * pages_for(2 * args.context, PAGE)
    settings = EngineSettings(pages, longest, PAGE, max_prefill_tokens=args.chunk, speculative_tokens=guesses)
    return Engine(unstacked(params), config, settings)


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


def interference(engine: Engine, passes: Passes, draw: Draw, args: argparse.Namespace, console: Console) -> Json:
    """Inter-token latency of sessions that decode while a cold prompt prefills, and what the prefill loses by them.

    The yardstick is the median undisturbed gap of the same sessions, and the median pass, alone, of a chunk of 256
    tokens at `PASSES` places in the last tenth of the prompt, where chunks take longest and p99 lies. Percentiles are
    each round's own, and alone means the same engine with its usual chunks and no company.
    """
    chunk = min(GOAL_CHUNK, args.chunk)
    places = np.linspace(0.9 * args.tokens, args.tokens - chunk, PASSES).astype(int)
    contexts = [draw(args.context) for _ in range(args.company)]
    rounds: list[Json] = []
    for _ in track(range(args.repeats), description="interference", console=console):
        alone = Asked(engine, draw(args.tokens), 1)
        alone.wait()
        calm, busy, seconds = disturbed(engine, contexts, draw(args.tokens))
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
                "prefill_in_company_s": seconds,
                "prefill_speed_kept": alone.ttft / seconds,
            }
        )
    return {"tokens": args.tokens, "company": args.company, "context": args.context, "chunk": chunk} | medians(rounds)


def shared(engine: Engine, draw: Draw, args: argparse.Namespace, console: Console) -> Json:
    """Seconds until several requests at once on a cold prefix all have a first token, and until one alone has."""
    rounds: list[Json] = []
    for _ in track(range(args.repeats), description="shared", console=console):
        found: Json = {}
        for name, count in (("one", 1), ("many", args.sharers)):
            prefix, before = draw(args.shared), engine.counters.prefilled_tokens
            requests = [Asked(engine, np.concatenate([prefix, draw(TAIL)]), 1) for _ in range(count)]
            for request in requests:
                request.wait()
            found[f"{name}_s"] = max(r.times[0] for r in requests) - requests[0].submitted
            found[f"{name}_computed"] = engine.counters.prefilled_tokens - before
        rounds.append(found | {"many_over_one": found["many_s"] / found["one_s"]})
    return {"prefix": args.shared, "sharers": args.sharers} | medians(rounds)


@dataclass(frozen=True)
class Served:
    """A server that has an agent's prompt cached, and the client that asks it."""

    client: httpx.Client
    url: str
    prompt: Json
    new: int

    def ask(self, seed: int, output: int = 8) -> Timing:
        """Time the answer of up to `output` tokens to another question behind the prompt."""
        request = with_question(self.prompt, seed, self.new) | {"max_tokens": output, "temperature": 0}
        return measure(self.client, self.url, request)

    def counted(self) -> list[float]:
        """The server's counts of tokens that it generated, guessed, and guessed right."""
        samples = scrape(self.client, self.url)
        return [
            samples[f"tokenzero_{name}_total"]
            for name in ("generated_tokens", "spec_decode_draft_tokens", "spec_decode_accepted_tokens")
        ]


@contextmanager
def served(folder: Path, args: argparse.Namespace, guesses: int = 0) -> Iterator[Served]:
    """A server on the model, as the engine in this process is, with an agent's prompt of `args.tokens` cached."""
    flags = ("--max-prefill-tokens", str(args.chunk), "--speculative-tokens", str(guesses))
    with running_server(folder, *flags) as server, httpx.Client(timeout=600) as client:
        count = lambda request: count_tokens(client, server.url, request)  # noqa: E731
        prompt = stable_request(Session(num_tools=20), args.tokens, count, args.new)
        found = Served(client, server.url, prompt, args.new)
        found.ask(0)
        yield found


def warm(engine: Engine, passes: Passes, folder: Path, draw: Draw, args: argparse.Namespace, console: Console) -> Json:
    """TTFT of fresh tokens behind a cached prefix, in the engine and over HTTP, over the pass of these tokens alone.

    The pass computes, behind as long a prefix, as many tokens as the cache did not have.
    """
    prefix = draw(args.tokens - args.new)
    Asked(engine, prefix, 1).wait()
    rounds: list[Json] = []
    with ExitStack() as stack:
        server = stack.enter_context(served(folder, args)) if args.http else None
        for number in track(range(args.repeats), description="warm", console=console):
            asked = Asked(engine, np.concatenate([prefix, draw(args.new)]), 1)
            asked.wait()
            assert asked.started is not None
            reused = asked.started.reused_tokens
            alone = best_pass(passes, reused, args.tokens - reused)
            found = {"reused": reused, "ttft_ms": 1e3 * asked.ttft, "pass_ms": 1e3 * alone}
            found["ttft_over_pass"] = asked.ttft / alone
            if server:
                timing = server.ask(1 + number)
                # The prompt may be a few tokens longer than the one whose pass is timed: as many behind its end.
                computed = timing.prompt_tokens - timing.cached_tokens
                alone = best_pass(passes, args.tokens - computed, computed)
                found |= {"http_reused": timing.cached_tokens, "http_ttft_ms": timing.ttft_ms}
                found |= {"http_pass_ms": 1e3 * alone, "http_over_pass": timing.ttft_ms / (1e3 * alone)}
            rounds.append(found)
    return {"tokens": args.tokens, "new": args.new} | medians(rounds)


def guesses(folder: Path, args: argparse.Namespace, console: Console) -> Json:
    """Decode behind a long prompt with guesses and without: answers over HTTP, and what a step on trial takes.

    The weights are random, so how often a guess is right says nothing of a trained model. `break_even` does not depend
    on that: of the guesses of a step on trial, how many must be right on average for the step to be worth its time.
    """
    engine = demo_engine(folder, args, args.speculative_tokens)
    passes = Passes(engine, drawing(2, engine.config.vocab_size)(args.tokens))
    last = args.tokens - 1 - args.speculative_tokens
    steps = [
        median(passes.seconds(last, 1 + draft, draft) for _ in range(4 * PASSES))
        for draft in (0, args.speculative_tokens)
    ]
    del engine, passes
    rounds: list[Json] = []
    with served(folder, args) as plain, served(folder, args, args.speculative_tokens) as trying:
        for number in track(range(args.repeats), description="guesses", console=console):
            without = plain.ask(1 + number, args.output)
            before = trying.counted()
            tried = trying.ask(1 + number, args.output)
            generated, guessed, right = np.subtract(trying.counted(), before).tolist()
            token, tried_token = (
                (timing.total_ms - timing.ttft_ms) / max(1, timing.output_tokens - 1) for timing in (without, tried)
            )
            rounds.append(
                {
                    "token_ms": token,
                    "tried_token_ms": tried_token,
                    "speed": token / tried_token,
                    "guessed_per_token": guessed / generated,
                    "right_per_token": right / generated,
                    "same_text": float(without.text == tried.text),
                }
            )
    found = {"step_ms": 1e3 * steps[0], "trial_ms": 1e3 * steps[1], "break_even": steps[1] / steps[0] - 1}
    found = {name: round(value, 4) for name, value in found.items()}
    return {"tokens": args.tokens, "guesses": args.speculative_tokens} | found | medians(rounds)


def best_pass(passes: Passes, prefix: int, count: int) -> float:
    """The median of a few passes, in seconds."""
    return median(passes.seconds(prefix, count) for _ in range(PASSES))


def rounded(values: list[float]) -> list[float]:
    """Four significant digits and more: times and ratios for the JSON."""
    return [round(value, 4) for value in values]


def medians(rounds: list[Json]) -> Json:
    """Each figure's median over the rounds, and all rounds beside them."""
    figures = {key: round(median(r[key] for r in rounds), 4) for key in rounds[0]}
    return figures | {"rounds": {key: rounded([r[key] for r in rounds]) for key in rounds[0]}}


def figures(result: Json) -> Iterator[tuple[str, str]]:
    """What was measured, a line each."""
    if part := result.get("decode"):
        for n, row in part["sessions"].items():
            yield (
                f"decode, {n} sessions behind {part['context']:,}",
                f"{row['median']:,.1f} tokens/s, {row['ratio']:.2f}x",
            )
    if part := result.get("interference"):
        names = ("p50", "p95", "p99", "max")
        behind = f"ITL of {part['company']} during {part['tokens']:,} cold"
        yield f"{behind}: {', '.join(names)}", ", ".join(f"{part[f'itl_{name}_ms']:.1f}" for name in names) + " ms"
        yield f"undisturbed step + chunk of {part['chunk']}", f"{part['step_ms']:.1f} + {part['chunk_ms']:.1f} ms"
        yield "prefill alone, in company", f"{part['prefill_alone_s']:.2f}, {part['prefill_in_company_s']:.2f} s"
    if part := result.get("shared"):
        yield (
            f"{part['prefix']:,} cold, 1 and {part['sharers']} requests",
            f"{part['one_s']:.2f}, {part['many_s']:.2f} s",
        )
    if part := result.get("warm"):
        yield f"warm {part['tokens']:,}: TTFT, pass", f"{part['ttft_ms']:.1f}, {part['pass_ms']:.1f} ms"
        if "http_ttft_ms" in part:
            yield "over HTTP: TTFT, pass", f"{part['http_ttft_ms']:.1f}, {part['http_pass_ms']:.1f} ms"
    if part := result.get("guesses"):
        yield (
            f"a token behind {part['tokens']:,}, without and with {part['guesses']} guesses",
            f"{part['token_ms']:.1f}, {part['tried_token_ms']:.1f} ms",
        )
        yield "the step alone, without and with", f"{part['step_ms']:.1f}, {part['trial_ms']:.1f} ms"
        yield "right guesses a step to break even", f"{part['break_even']:.2f}"
        yield "guessed, right a token", f"{part['guessed_per_token']:.2f}, {part['right_per_token']:.2f}"


def table(result: Json) -> Table:
    """Every figure, then every goal and whether it is reached."""
    grid = Table("", "measured", "goal", "", title=f"company in the engine, {result['dtype']}", box=SIMPLE_HEAD)
    for what, measured in figures(result):
        grid.add_row(what, measured)
    grid.add_section()
    for goal in result["goals"]:
        bound = f">= {goal['at_least']}" if "at_least" in goal else f"<= {goal['at_most']}"
        grid.add_row(goal["what"], f"{goal['measured']:.2f}", bound, "reached" if goal["reached"] else "missed")
    return grid


def run(args: argparse.Namespace, console: Console) -> Json:
    """The chosen parts' figures, by part."""
    result: Json = {}
    if "decode" in args.only:
        result["decode"] = decode(args, console)
    if set(args.only) == {"decode"}:
        return result
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch) / "demo-model"
        if args.model is None:
            write_demo_model(folder, console=console)
        if {"interference", "shared", "warm"} & set(args.only):
            result |= in_process(folder, args, console)
        if "guesses" in args.only:
            result["guesses"] = guesses(folder, args, console)
    return result


def in_process(folder: Path, args: argparse.Namespace, console: Console) -> Json:
    """The figures of the parts that ask an engine with the demo model in this process."""
    result: Json = {}
    with started(demo_engine(folder, args)) as engine:
        draw = drawing(1, engine.config.vocab_size)
        if "shared" in args.only:
            result["shared"] = shared(engine, draw, args, console)
        if {"interference", "warm"} & set(args.only):
            passes = Passes(engine, draw(args.tokens))
        if "interference" in args.only:
            result["interference"] = interference(engine, passes, draw, args, console)
        if "warm" in args.only:
            result["warm"] = warm(engine, passes, folder, draw, args, console)
    return result


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.batching", description=__doc__.split("\n")[0])
    cli.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    cli.add_argument("--repeats", type=int, default=5, help="rounds of each part (default: 5)")
    cli.add_argument("--chunk", type=int, default=1024, help="the engine's longest chunk (default: 1024)")
    cli.add_argument("--llama", choices=list(LLAMAS), default="28M", help="decode: the model (default: 28M)")
    cli.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="decode: how many at once")
    cli.add_argument("--context", type=int, default=1024, help="tokens behind which sessions decode (default: 1024)")
    cli.add_argument("--output", type=int, default=128, help="decode: tokens of each session (default: 128)")
    cli.add_argument("--model", type=Path, help="checkpoint of the other parts (default: the demo model, made anew)")
    cli.add_argument("--tokens", type=int, default=52_000, help="interference, warm: the prompt (default: 52000)")
    cli.add_argument("--company", type=int, default=4, help="interference: sessions that decode (default: 4)")
    cli.add_argument("--shared", type=int, default=16_384, help="shared: tokens of the prefix (default: 16384)")
    cli.add_argument("--sharers", type=int, default=8, help="shared: requests at once (default: 8)")
    cli.add_argument("--new", type=int, default=300, help="warm: tokens behind the cached prefix (default: 300)")
    cli.add_argument(
        "--speculative-tokens", type=int, default=4, help="guesses: tokens on trial in each step (default: 4)"
    )
    cli.add_argument("--no-http", dest="http", action="store_false", help="warm: leave the server out")
    cli.add_argument("--out", type=Path, default=RESULTS)
    args = cli.parse_args(argv)
    set_up_jax()
    console = Console(width=110)
    result = run(args, console)
    judged = [found for goal in GOALS if goal.part in result and (found := goal.judged(result))]
    result |= {"goals": judged, "repeats": args.repeats, "dtype": "float32", "threads": machine()["cores"]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result | provenance(), indent=1) + "\n")
    console.print(table(result))


if __name__ == "__main__":
    main()
