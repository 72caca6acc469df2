"""The figures of `experiments.gpu_bench` as tables; sections that were not measured have no rows."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from experiments.gpu.provenance import Json
from experiments.harness.report import make_table


def heading(result: Json) -> str:
    """The device, precision, versions and time of a run, in a line."""
    about = result["provenance"]
    versions = f"JAX {about['versions']['jax']}, commit {about['commit']}"
    return f"{about['device']}, {about['dtype']}, {versions}, {about['when'][:10]}"


def attention_table(result: Json) -> Table:
    """Attention of prompts and of decoded tokens: our rate, its share of the ceiling, its ratio to torch's best."""
    columns = ("what", "ours", "unit", "of the ceiling", "over torch's best")
    table = make_table(columns, words=("what", "unit"), no_wrap=True)
    for row in measured(result, "prefill", "flops"):
        cached = f"{row['prefix'] / row['length']:.0%} cached" if row["prefix"] else "cold"
        what = f"prompt of {row['length']:,}, {cached}"
        table.add_row(what, f"{row['flops'] / 1e12:,.0f}", "TFLOP/s", f"{row['mfu']:.0%}", over_torch(row, "flops"))
    for row in measured(result, "decode", "bytes_per_s"):
        what = f"one token after {row['context']:,}, batch {row['batch']}"
        share = f"{row['of_copy_bandwidth']:.0%}"
        table.add_row(what, f"{row['bytes_per_s'] / 1e12:,.2f}", "TB/s", share, over_torch(row, "bytes_per_s"))
    return table


def model_table(result: Json) -> Table:
    """The whole model's passes, then the engine's time to first token by arm, in ms."""
    table = make_table(("what", "new tokens", "cached", "ms"), words=("what",), no_wrap=True)
    for row in measured(result, "forward", "seconds"):
        what = f"{row['pass']} pass, {row['layers']} layers"
        table.add_row(what, f"{row['tokens']:,}", f"{row['prefix']:,}", f"{row['seconds'] * 1e3:,.1f}")
    for row in measured(result, "arms", "seconds"):
        new = f"{row['prompt'] - row['reused']:,}"
        table.add_row(f"TTFT, {row['arm']}", new, f"{row['reused']:,}", f"{row['seconds'] * 1e3:,.1f}")
    return table


def measured(result: Json, section: str, key: str) -> Iterator[Json]:
    """The rows of a section that have a figure."""
    yield from (row for row in result.get(section, []) if key in row)


def over_torch(row: Json, key: str) -> str:
    """The ratio of our rate to that of torch's best backend; empty if torch was not measured."""
    theirs = row.get("torch", {}).get(key)
    return f"{row[key] / theirs:.2f}" if theirs else ""
