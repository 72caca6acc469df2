"""How near quantised weights come to full precision: KL divergence and top-1 agreement on sources and prose.

`python -m experiments.quality.weights` loads a checkpoint in float32 and as `--quantize` would, and lets both read the
same texts. SmolLM2's file is Q4_1: what is compared are its dequantised weights and these quantised again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.quality.agreement import ALL, TOKENS, agreements
from experiments.quality.scoring import PAGE, Scorer
from experiments.workloads.trained_model import fetch
from model import checkpoint
from model.kernels.dispatch import arranged
from model.quantized import SCHEMES
from serve.prompt.tokenizer import load_tokenizer

RESULTS = Path("experiments/results/quality/weights.json")
GOALS = {"int8": {"top1": 0.99, "kl": 0.002}}  # at least, and under


def scorer(model: Path, quantize: str | None) -> Scorer:
    """A checkpoint that scores texts, quantised or not."""
    config, params = checkpoint.load(model, "float32", quantize=quantize)
    return Scorer(config, arranged(params, PAGE, consume=True))


def measure(model: Path, schemes: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """A row for each scheme and kind of text."""
    encode, reference = load_tokenizer(str(model)).encode, scorer(model, None)
    rows = []
    for name in schemes:
        for kind, found in agreements(reference, scorer(model, name), encode, tokens).items():
            numbers = {key: round(value, 6) for key, value in asdict(found).items()}
            rows.append({"weights": name, "group": SCHEMES[name].group, "text": kind} | numbers)
    return rows


def judged(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """By scheme that has goals, whether all texts together reach them."""
    return {
        row["weights"]: row["top1"] >= goal["top1"] and row["kl"] < goal["kl"]
        for row in rows
        if row["text"] == ALL and (goal := GOALS.get(row["weights"]))
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The agreements."""
    columns = ("weights", "group", "text", "tokens", "KL", "KL, 99th percentile", "top 1", "perplexity", "of float32")
    grid = make_table(columns, words=("weights", "text"), title="quantised weights beside float32; KL in nats")
    for row in rows:
        kl = (f"{row['kl']:.5f}", f"{row['kl_p99']:.4f}")
        perplexity = (f"{row['other_perplexity']:.3f}", f"{row['perplexity']:.3f}")
        grid.add_row(
            row["weights"], f"{row['group']}", row["text"], f"{row['tokens']:,}", *kl, f"{row['top1']:.2%}", *perplexity
        )
    grid.caption = "; ".join(f"{name}: goals {'reached' if ok else 'missed'}" for name, ok in judged(rows).items())
    return grid


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.quality.weights", description=__doc__.split("\n")[0])
    cli.add_argument("--model", type=Path, help="a checkpoint in full precision (default: SmolLM2-135M-Instruct)")
    cli.add_argument("--schemes", nargs="+", choices=tuple(SCHEMES), default=tuple(SCHEMES))
    cli.add_argument("--tokens", type=int, default=TOKENS, help="of all texts (default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS, help="JSON to write (default: %(default)s)")
    args = cli.parse_args(argv)
    model = args.model or fetch()
    rows = measure(model, args.schemes, args.tokens)
    about = {"model": model.name, "goals": GOALS, "reached": judged(rows), "rows": rows}
    write_json(args.out, about | provenance())
    Console(width=130).print(table(rows))


if __name__ == "__main__":
    main()
