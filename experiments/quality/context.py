"""Perplexity by context length, with a checkpoint's own rope scaling and with one that stretches its context.

`python -m experiments.quality.context`: each text is read once by each, and the last tokens before each length are
scored. All lengths come from the same texts, but not from the same tokens, so compare rows within a length.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.quality.scoring import PAGE, Scorer, surprises
from experiments.quality.texts import KINDS, documents
from experiments.workloads.trained_model import YARN, fetch
from model import checkpoint
from model.kernels.dispatch import arranged
from model.rope_scaling import parse_rope_scaling, with_rope_scaling
from serve.prompt.tokenizer import load_tokenizer

RESULTS = Path("experiments/results/quality/context.json")
LENGTHS = (2048, 8192, 16_384, 32_768)
OWN, STRETCHED = "own", "stretched"


def perplexities(
    found: Mapping[str, Sequence[np.ndarray]], lengths: Sequence[int], window: int
) -> dict[str, dict[int, float]]:
    """The perplexity of the `window` tokens before each length, by the way that texts were scored.

    `found` has the surprises of each text, [tokens - 1] nats, by way. Perplexity is `exp(mean surprise)`.
    """
    return {
        way: {
            length: math.exp(np.mean([each[length - 1 - window : length - 1].mean() for each in texts]))
            for length in lengths
        }
        for way, texts in found.items()
    }


def measure(
    model: Path,
    scaling: Mapping[str, Any],
    kinds: Sequence[str],
    lengths: Sequence[int],
    window: int,
    texts: int,
    console: Console,
) -> Iterator[list[dict[str, Any]]]:
    """A row for each length, of one kind of text after the other."""
    config, params = checkpoint.load(model, "float32")
    encode = load_tokenizer(str(model)).encode
    longest, packed = max(lengths), arranged(params, PAGE)
    own = Scorer(replace(config, max_position=longest), packed)
    scorers = {OWN: own, STRETCHED: replace(own, config=with_rope_scaling(config, scaling))}
    for kind in kinds:
        pieces = documents(kind, encode, longest, texts)
        work = [(way, piece) for piece in pieces for way in scorers]
        found: dict[str, list[np.ndarray]] = {way: [] for way in scorers}
        for way, piece in track(work, description=kind, console=console):
            found[way].append(surprises(scorers[way], piece))
        by_way = perplexities(found, lengths, window)
        yield [
            {"text": kind, "length": length} | {way: round(by_way[way][length], 3) for way in by_way}
            for length in lengths
        ]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The perplexities."""
    grid = make_table(("text", "length", "own rope scaling", "stretched"), words=("text",), title="perplexity")
    for row in rows:
        grid.add_row(row["text"], f"{row['length']:,}", *(f"{row[way]:.2f}" for way in (OWN, STRETCHED)))
    return grid


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.quality.context", description=__doc__.split("\n")[0])
    cli.add_argument("--model", type=Path, help="a checkpoint (default: SmolLM2-135M-Instruct)")
    cli.add_argument("--rope-scaling", type=parse_rope_scaling, default=YARN, metavar="JSON", help="the one to compare")
    cli.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of texts (default: both)")
    cli.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    cli.add_argument("--window", type=int, default=1024, metavar="TOKENS", help="scored before each length")
    cli.add_argument("--texts", type=int, default=2, metavar="N", help="of each kind (default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS, help="JSON to write (default: %(default)s)")
    args = cli.parse_args(argv)
    console, model = Console(), args.model or fetch()
    about = {"model": model.name, "dtype": "float32", "rope_scaling": args.rope_scaling}
    about |= {"window": args.window, "texts": args.texts} | provenance()
    rows: list[dict[str, Any]] = []
    for found in measure(model, args.rope_scaling, args.kinds, args.lengths, args.window, args.texts, console):
        rows += found
        write_json(args.out, about | {"rows": rows})  # each kind takes long
    console.print(table(rows))


if __name__ == "__main__":
    main()
