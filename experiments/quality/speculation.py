"""Speculative decoding by prompt lookup with a trained model: what is accepted, and what it gains, by kind of task.

`python -m experiments.quality.speculation`: greedy answers with and without draft tokens, in turns, on prompts that ask
for a copy, for an edit of a file, and for free text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.bench.timing import timed_tokens
from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.quality.scoring import PAGE
from experiments.quality.texts import SOURCES, documents
from experiments.workloads.trained_model import fetch
from model import checkpoint
from model.kernels.dispatch import arranged
from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings
from serve.prompt.tokenizer import Tokenizer, load_tokenizer

RESULTS = Path("experiments/results/quality/speculation.json")
COPY, EDIT, FREE = "copying", "editing", "free text"
TASKS = 3
DRAFTS = (0, 4, 8)
SOURCE_TOKENS = 256
TOPICS = ("the sea", "a library", "winter", "bread", "a train", "the moon", "a garden", "music")


def prompts(tokenizer: Tokenizer, each: int) -> Iterator[tuple[str, np.ndarray]]:
    """Prompts of each kind of task, [tokens] int32."""
    sources = [tokenizer.hf.decode(text) for text in documents(SOURCES, tokenizer.encode, SOURCE_TOKENS, each)]
    for number, source in enumerate(sources):
        fenced = f"```python\n{source}\n```"
        yield COPY, chat(tokenizer, f"Repeat this code exactly, and write nothing else:\n\n{fenced}", "```python\n")
        yield (
            EDIT,
            chat(tokenizer, f"Write this code again with a comment above every function:\n\n{fenced}", "```python\n"),
        )
        yield FREE, chat(tokenizer, f"Write a story about {TOPICS[number % len(TOPICS)]}.", "")


def chat(tokenizer: Tokenizer, question: str, begun: str) -> np.ndarray:
    """A prompt that asks a question, with the answer begun: [tokens] int32."""
    turns = [{"role": "user", "content": question}]
    text = tokenizer.hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text + begun)


def measure(model: Path, drafts: Sequence[int], each: int, count: int, console: Console) -> list[dict[str, Any]]:
    """A row for each kind of task and number of draft tokens: medians over prompts, each answered in turns."""
    config, params = checkpoint.load(model, "float32")
    packed, tokenizer = arranged(params, PAGE), load_tokenizer(str(model))
    asked = [*prompts(tokenizer, each)]
    total = max(len(prompt) for _, prompt in asked) + count + 1
    pages = 2 * len(asked) * (total // PAGE + 2)
    engines = {
        draft: Engine(packed, config, EngineSettings(pages, total, PAGE, max_num_seqs=1, speculative_tokens=draft))
        for draft in drafts
    }
    for engine in engines.values():
        engine.start()
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for number, (kind, prompt) in enumerate(track(asked, description="answers", console=console)):
        first = number // TASKS % len(drafts)  # each engine is the first one of as many prompts of a task
        rows = {draft: answered(engines[draft], prompt, count) for draft in (*drafts[first:], *drafts[:first])}
        for draft, row in rows.items():
            row["speed"] = rows[drafts[0]]["token_ms"] / row["token_ms"]
            row["same"] = float(row["digest"] == rows[drafts[0]]["digest"])
            found.setdefault((kind, draft), []).append(row)
    for engine in engines.values():
        engine.stop()
    names = ("tokens", "token_ms", "accepted_per_step", "accepted_share", "speed")
    return [
        {"task": kind, "draft_tokens": draft, "answers": len(rows), "same": sum(row["same"] for row in rows)}
        | {name: round(median(row[name] for row in rows), 3) for name in names}
        for (kind, draft), rows in found.items()
    ]


def answered(engine: Engine, prompt: np.ndarray, count: int) -> dict[str, float]:
    """Answer a prompt: ms a token after the first one, and how many draft tokens were accepted."""
    timed_tokens(engine, prompt, 1)  # so that no answer waits for its prompt
    counters = engine.counters
    before = counters.generated_tokens, counters.draft_tokens, counters.accepted_tokens
    sampled = timed_tokens(engine, prompt, count)
    generated, drafted, accepted = np.subtract(
        (counters.generated_tokens, counters.draft_tokens, counters.accepted_tokens), before
    ).tolist()
    steps = max(1, generated - accepted - 1)  # after the one with the first token
    return {
        "tokens": generated,
        "token_ms": 1e3 * (sampled[-1][0] - sampled[0][0]) / max(1, generated - 1),
        "accepted_per_step": accepted / steps,
        "accepted_share": accepted / max(1, drafted),
        "digest": hash(tuple(token for _, token in sampled)),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Accepted tokens and speed."""
    columns = ("task", "draft tokens", "accepted a step", "of all drafts", "ms a token", "speed", "same answers")
    grid = make_table(columns, words=("task",), title="speculative decoding by prompt lookup, medians")
    for row in rows:
        grid.add_row(
            row["task"],
            str(row["draft_tokens"]),
            f"{row['accepted_per_step']:.2f}",
            f"{row['accepted_share']:.0%}",
            f"{row['token_ms']:.1f}",
            f"{row['speed']:.2f}x",
            f"{row['same']:.0f} of {row['answers']}",
        )
    return grid


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.quality.speculation", description=__doc__.split("\n")[0])
    cli.add_argument("--model", type=Path, help="a checkpoint (default: SmolLM2-135M-Instruct)")
    cli.add_argument("--drafts", type=int, nargs="+", default=DRAFTS, metavar="N", help="draft tokens; the first is 1x")
    cli.add_argument("--prompts", type=int, default=8, help="of each task (default: %(default)s)")
    cli.add_argument("--tokens", type=int, default=160, help="of each answer, at most (default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS, help="JSON to write (default: %(default)s)")
    args = cli.parse_args(argv)
    console, model = Console(), args.model or fetch()
    rows = measure(model, args.drafts, args.prompts, args.tokens, console)
    write_json(args.out, {"model": model.name, "dtype": "float32", "rows": rows} | provenance())
    console.print(table(rows))


if __name__ == "__main__":
    main()
