"""How near rounded weights and KV pages come to float32: KL divergence and top-1 agreement on sources and prose.

`python -m experiments.quality.rounding` loads a checkpoint as it is, as `--quantize` would, and with pages as
`--kv-dtype` keeps them, and lets all read the same texts. SmolLM2's file is Q4_1: what is compared with are the weights
that it stands for, and `--quantize` rounds these once more, which keeps them. With `--spread` they lie anywhere within
the half step by which the file's own rounding may have moved them, as weights in full precision would.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.harness.provenance import provenance
from experiments.harness.report import make_table, write_json
from experiments.quality.agreement import ALL, TOKENS, agreements
from experiments.quality.scoring import PAGE, Scorer
from experiments.workloads.trained_model import fetch
from model import checkpoint
from model.config import ModelConfig
from model.kernels.dispatch import arranged
from model.kv import KVPool, bytes_per_token, empty_pool
from model.kv_rows import QUANTIZED, pool_dtype
from model.params import Params
from model.quantized import SCHEMES, Quantized, Scheme, bits_of, by_input, dequantize, inputs_last, quantize
from serve.prompt.tokenizer import load_tokenizer

RESULTS = Path("experiments/results/quality/rounding.json")
WEIGHTS, PAGES = "weights", "KV pages"
# At least of top 1 and of a pool's tokens over float32's, and under of KL.
GOALS = {f"{WEIGHTS} int8": {"top1": 0.99, "kl": 0.002}, f"{PAGES} int8": {"top1": 0.99, "tokens_over_float32": 3.5}}


def scorer(model: Path, scheme: str | None, spread: bool) -> Scorer:
    """A checkpoint that scores texts, its weights rounded or as they are, which may be spread before."""
    config, params = checkpoint.load(model, "float32", quantize=None if spread else scheme)
    if spread:
        params = spread_weights(params)
        params = rounded_weights(params, SCHEMES[scheme]) if scheme else params
    return Scorer(config, arranged(params, PAGE, consume=True))


def spread_weights(params: Params) -> Params:
    """The weights in float32, quantised ones moved by up to half a step of their group; the same each time."""
    rng = np.random.default_rng(0)

    def moved(leaf: jax.Array | Quantized) -> jax.Array:
        if not isinstance(leaf, Quantized):
            return leaf
        steps = np.asarray(by_input(leaf, leaf.scales))
        return dequantize(leaf) + steps * rng.uniform(-0.5, 0.5, steps.shape).astype(np.float32)

    spread: Params = jax.tree.map(moved, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return spread


def rounded_weights(params: Params, scheme: Scheme) -> Params:
    """Stacked params in float32, rounded as `--quantize` rounds them."""

    def of_field(path: tuple[Any, ...], array: jax.Array) -> jax.Array | Quantized:
        field = path[-1].name
        bits = bits_of(field, scheme.bits)
        return array if bits is None else quantize(inputs_last(field, np.asarray(array)), bits, scheme.group)

    made: Params = jax.tree_util.tree_map_with_path(of_field, params)
    return made


def pool_in(kv_dtype: str, config: ModelConfig, pages: int) -> KVPool:
    """An empty pool as `--kv-dtype` makes it."""
    return empty_pool(config, pages, PAGE, pool_dtype(kv_dtype))


def rounded(
    model: Path, whole: Scorer, schemes: Sequence[str], kv_dtypes: Sequence[str], spread: bool
) -> Iterator[tuple[str, Scorer]]:
    """What is compared with the whole one, by name."""
    for scheme in schemes:
        yield f"{WEIGHTS} {scheme}", scorer(model, scheme, spread)
    for kv_dtype in kv_dtypes:
        yield f"{PAGES} {kv_dtype}", replace(whole, pool_of=partial(pool_in, kv_dtype, whole.config))


def measure(
    model: Path, schemes: Sequence[str], kv_dtypes: Sequence[str], tokens: int, spread: bool = False
) -> list[dict[str, Any]]:
    """A row for each that is rounded and kind of text."""
    encode, whole = load_tokenizer(str(model)).encode, scorer(model, None, spread)
    plain, rows = bytes_per_token(whole.config, np.float32), []
    for name, other in rounded(model, whole, schemes, kv_dtypes, spread):
        kept = bytes_per_token(whole.config, pool_dtype(name.split()[-1])) if name.startswith(PAGES) else plain
        for kind, found in agreements(whole, other, encode, tokens).items():
            numbers = {key: round(value, 6) for key, value in asdict(found).items()}
            rows.append({"rounded": name, "text": kind, "tokens_over_float32": round(plain / kept, 3)} | numbers)
    return rows


def judged(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """By what has goals, whether all texts together reach them."""
    return {
        row["rounded"]: all(row[key] < goal if key == "kl" else row[key] >= goal for key, goal in goals.items())
        for row in rows
        if row["text"] == ALL and (goals := GOALS.get(row["rounded"]))
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The agreements."""
    columns = ("rounded", "text", "tokens", "KL", "KL, 99th percentile", "top 1", "perplexity", "of float32")
    grid = make_table(columns, words=("rounded", "text"), title="rounded weights and pages beside float32; KL in nats")
    for row in rows:
        kl = (f"{row['kl']:.5f}", f"{row['kl_p99']:.4f}")
        perplexity = (f"{row['other_perplexity']:.3f}", f"{row['perplexity']:.3f}")
        grid.add_row(row["rounded"], row["text"], f"{row['tokens']:,}", *kl, f"{row['top1']:.2%}", *perplexity)
    grid.caption = "; ".join(f"{name}: goals {'reached' if ok else 'missed'}" for name, ok in judged(rows).items())
    return grid


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.quality.rounding", description=__doc__.split("\n")[0])
    cli.add_argument("--model", type=Path, help="a checkpoint in full precision (default: SmolLM2-135M-Instruct)")
    cli.add_argument("--schemes", nargs="*", choices=tuple(SCHEMES), default=tuple(SCHEMES))
    cli.add_argument("--kv-dtypes", nargs="*", choices=tuple(QUANTIZED), default=tuple(QUANTIZED))
    cli.add_argument("--tokens", type=int, default=TOKENS, help="of all texts (default: %(default)s)")
    cli.add_argument("--spread", action="store_true", help="weights that the file's own rounding may have come from")
    cli.add_argument("--out", type=Path, default=RESULTS, help="JSON to write (default: %(default)s)")
    args = cli.parse_args(argv)
    model = args.model or fetch()
    rows = measure(model, args.schemes, args.kv_dtypes, args.tokens, args.spread)
    about = {"model": model.name, "spread": args.spread, "goals": GOALS, "reached": judged(rows), "rows": rows}
    write_json(args.out, about | provenance())
    Console(width=130).print(table(rows))


if __name__ == "__main__":
    main()
