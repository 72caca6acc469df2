"""What requests cost each other inside the engine: decode in a batch, latency during a prefill, shared prefixes.

And what speculative decoding brings. `python -m experiments.bench.batching` runs real engines in this process, a 28M
llama for decode and the demo model for the rest, and server processes for what is asked over HTTP. What is compared
takes turns; each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.bench.batching.decode import LLAMAS, decode
from experiments.bench.batching.prefill import interference, shared, warm
from experiments.bench.batching.setup import Config, Json, demo_engine, drawing, started
from experiments.bench.batching.speculation import speculation
from experiments.bench.timing import Passes
from experiments.harness.provenance import machine, provenance
from experiments.harness.report import write_json
from experiments.workloads.demo_model import write_demo_model
from serve.engine.runtime import set_up_jax

RESULTS = Path("experiments/results/bench/batching.json")
PARTS = ("decode", "interference", "shared", "warm", "speculation")


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of a part; `least` says whether the figure is to reach it or to stay below."""

    part: str
    figure: str
    bound: float
    text: str
    least: bool = False

    def judged(self, result: Json) -> Json | None:
        """The figure and its bound; None where the part has no such figure."""
        found = result[self.part].get(self.figure)
        if found is None:
            return None
        reached = found >= self.bound if self.least else found <= self.bound
        bound = {"at_least" if self.least else "at_most": self.bound}
        return {"part": self.part, "what": self.text, "measured": found} | bound | {"reached": reached}


GOALS = (
    Goal("decode", "eight_over_one", 3.5, "tokens/s of 8 sessions over one's", least=True),
    Goal("interference", "p99_over_yardstick", 1.5, "p99 ITL over an undisturbed step and a chunk of 256"),
    Goal("interference", "prefill_speed_kept", 0.85, "prefill's speed while sessions decode over alone", least=True),
    Goal("shared", "many_over_one", 1.3, "last first token of requests with a common prefix over one's"),
    Goal("warm", "ttft_over_pass", 1.5, "warm TTFT in the engine over its tokens' pass"),
    Goal("warm", "http_over_pass", 1.5, "warm TTFT over HTTP over its tokens' pass"),
)


def figures(result: Json) -> Iterator[tuple[str, str]]:
    """What was measured, a line each."""
    if part := result.get("decode"):
        for n, row in part["sessions"].items():
            what = f"decode, {n} sessions after {part['context']:,}"
            yield what, f"{row['median']:,.1f} tokens/s, {row['ratio']:.2f}x"
    if part := result.get("interference"):
        names = ("p50", "p95", "p99", "max")
        what = f"ITL of {part['concurrent']} during {part['tokens']:,} cold: {', '.join(names)}"
        yield what, ", ".join(f"{part[f'itl_{name}_ms']:.1f}" for name in names) + " ms"
        yield f"undisturbed step + chunk of {part['chunk']}", f"{part['step_ms']:.1f} + {part['chunk_ms']:.1f} ms"
        seconds = f"{part['prefill_alone_s']:.2f}, {part['prefill_concurrent_s']:.2f} s"
        yield "prefill alone, while sessions decode", seconds
    if part := result.get("shared"):
        what = f"{part['prefix']:,} cold, 1 and {part['requests']} requests"
        yield what, f"{part['one_s']:.2f}, {part['many_s']:.2f} s"
    if part := result.get("warm"):
        yield f"warm {part['tokens']:,}: TTFT, pass", f"{part['ttft_ms']:.1f}, {part['pass_ms']:.1f} ms"
        if "http_ttft_ms" in part:
            yield "over HTTP: TTFT, pass", f"{part['http_ttft_ms']:.1f}, {part['http_pass_ms']:.1f} ms"
    if part := result.get("speculation"):
        what = f"a token after {part['tokens']:,}, without and with {part['draft_tokens']} draft tokens"
        yield what, f"{part['token_ms']:.1f}, {part['speculative_token_ms']:.1f} ms"
        yield "the step alone, without and with", f"{part['step_ms']:.1f}, {part['verification_ms']:.1f} ms"
        yield "accepted tokens a step to break even", f"{part['break_even']:.2f}"
        yield "drafted, accepted a token", f"{part['drafted_per_token']:.2f}, {part['accepted_per_token']:.2f}"


def table(result: Json) -> Table:
    """Every figure, then every goal and whether it is reached."""
    grid = Table("", "measured", "goal", "", title=f"requests at once, {result['dtype']}", box=SIMPLE_HEAD)
    for what, measured in figures(result):
        grid.add_row(what, measured)
    grid.add_section()
    for goal in result["goals"]:
        bound = f">= {goal['at_least']}" if "at_least" in goal else f"<= {goal['at_most']}"
        grid.add_row(goal["what"], f"{goal['measured']:.2f}", bound, "reached" if goal["reached"] else "missed")
    return grid


def run(config: Config, parts: set[str], model: Path | None, console: Console) -> Json:
    """The chosen parts' figures, by part; `model` is a checkpoint folder (default: the demo model, written now)."""
    result: Json = {}
    if "decode" in parts:
        result["decode"] = decode(config, console)
    if parts == {"decode"}:
        return result
    with tempfile.TemporaryDirectory() as scratch:
        folder = model or Path(scratch) / "demo-model"
        if model is None:
            write_demo_model(folder, console=console)
        if {"interference", "shared", "warm"} & parts:
            result |= in_process(folder, config, parts, console)
        if "speculation" in parts:
            result["speculation"] = speculation(folder, config, console)
    return result


def in_process(folder: Path, config: Config, parts: set[str], console: Console) -> Json:
    """The figures of the parts that ask an engine with the demo model in this process."""
    result: Json = {}
    with started(demo_engine(folder, config)) as engine:
        draw = drawing(1, engine.config.vocab_size)
        if "shared" in parts:
            result["shared"] = shared(engine, draw, config, console)
        if {"interference", "warm"} & parts:
            passes = Passes(engine, draw(config.tokens))
        if "interference" in parts:
            result["interference"] = interference(engine, passes, draw, config, console)
        if "warm" in parts:
            result["warm"] = warm(engine, passes, folder, draw, config, console)
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default, said = Config(), "(default: %(default)s)"
    cli = argparse.ArgumentParser(prog="python -m experiments.bench.batching", description=__doc__.split("\n")[0])
    cli.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="run these parts (default: all)")
    cli.add_argument("--repeats", type=int, default=default.repeats, help=f"rounds of each part {said}")
    cli.add_argument("--chunk", type=int, default=default.chunk, help=f"the engine's longest prefill chunk {said}")
    cli.add_argument("--llama", choices=list(LLAMAS), default=default.llama, help=f"decode: the model {said}")
    cli.add_argument("--sessions", type=int, nargs="+", default=default.sessions, help="decode: how many at once")
    cli.add_argument("--context", type=int, default=default.context, help=f"tokens before those that decode {said}")
    cli.add_argument("--output", type=int, default=default.output, help=f"decode: tokens of each session {said}")
    cli.add_argument("--model", type=Path, help="checkpoint of the other parts (default: the demo model, written now)")
    cli.add_argument("--tokens", type=int, default=default.tokens, help=f"interference, warm: the prompt {said}")
    cli.add_argument("--concurrent", type=int, default=default.concurrent, help=f"interference: sessions {said}")
    cli.add_argument("--shared", type=int, default=default.shared, help=f"shared: tokens of the prefix {said}")
    cli.add_argument("--requests", type=int, default=default.requests, help=f"shared: requests at once {said}")
    cli.add_argument("--new", type=int, default=default.new, help=f"warm: tokens after the cached prefix {said}")
    drafts = f"speculation: draft tokens of each step {said}"
    cli.add_argument("--speculative-tokens", type=int, default=default.speculative_tokens, help=drafts)
    cli.add_argument("--no-http", dest="http", action="store_false", help="warm: leave the server out")
    cli.add_argument("--out", type=Path, default=RESULTS, help=f"where the numbers go {said}")
    return cli


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    args = parser().parse_args(argv)
    chosen = {field.name: getattr(args, field.name) for field in fields(Config)}
    config = Config(**chosen | {"sessions": tuple(args.sessions)})
    set_up_jax()
    console = Console(width=110)
    result = run(config, set(args.only), args.model, console)
    judged = [found for goal in GOALS if goal.part in result and (found := goal.judged(result))]
    result |= {"goals": judged, "repeats": args.repeats, "dtype": "float32", "threads": machine()["cores"]}
    write_json(args.out, result | provenance(), indent=1)
    console.print(table(result))


if __name__ == "__main__":
    main()
