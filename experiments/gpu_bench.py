"""Measure the kernels, the forward pass and the engine on this machine's GPU, against what the same GPU can do at best.

Run `python -m experiments.gpu_bench`: under nine minutes, nothing to download. Results and a picture go to
`experiments/results/gpu/` after every figure, so that a run that is cut short keeps what it has. `--smoke` runs the
same code at tiny sizes on the CPU and XLA's path, for `.cache/gpu_smoke`; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Before JAX takes most of the memory for itself: torch wants some.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments import gpu_rivals
from experiments.gpu_model import arms, forward_passes
from experiments.provenance import commit, versions
from model.attention import Batch, blockwise, locate, reference
from model.config import ModelConfig, RopeConfig
from model.kernels.dispatch import kernel_for
from model.kv import KVPool

Json = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "gpu"
COMPILED = Path(".cache/gpu_bench")
# Two roundings to bf16 of values of about one; a wrong mask or page is off by far more, NaN by everything.
TOLERANCE = 0.02
POOL_BYTES = 16 * 2**30  # of the pool that attention is timed on, at most


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: ModelConfig
    dtype: str = "bfloat16"
    page: int = 64
    prompts: tuple[int, ...] = (4096, 16_384, 53_248)
    prefix_shares: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 0.99)
    decode_batches: tuple[int, ...] = (1, 8, 64)
    context: int = 53_248
    warm: int = 128  # new tokens of a warm request
    matmul: int = 8192
    copy_bytes: int = 4 * 2**30
    engine_chunk: int = 4096
    # Chunks: of both kernels with the keys split and whole, and of few tokens each.
    checks: tuple[tuple[int, ...], ...] = ((1,) * 6, (3, 1, 2, 3, 1, 3), (1,) * 34, (40, 3), (64, 1, 7, 133, 3, 30))
    figure_s: float = 90.0  # the longest that one figure may take, its compilation included
    model_figure_s: float = 240.0  # likewise, of the sections that compile a whole model
    budget_s: float = 520.0  # of the whole run: what is under way then is ended


LLAMA_8B = ModelConfig("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 131_072, 1e-5, RopeConfig(theta=500_000.0))
TINY = ModelConfig("llama", 256, 64, 96, 2, 4, 2, 64, 4096, 1e-5, RopeConfig())
FULL = Sizes(LLAMA_8B)
SMOKE = Sizes(  # in f32: XLA's bf16 is slow on CPUs
    TINY, "float32", 16, (64,), (0, 0.5), (2,), 256, 16, 128, 2**20, engine_chunk=64, checks=((1, 1), (9, 3))
)


def seconds(function: Callable, *arguments: Any, budget: float = 0.5) -> float:
    """Seconds of one call: the mean of as many as fit the budget, up to 100 and back to back, after two to warm up."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    repeats = max(3, min(100, int(budget / (time.perf_counter() - start))))
    start = time.perf_counter()
    for _ in range(repeats):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def ceilings(sizes: Sizes) -> Iterator[Json]:
    """What this device reaches in one large matmul and one large copy: FLOP/s, and bytes read and written a second."""
    n = sizes.matmul
    a, b = (jax.random.normal(key, (n, n), jnp.dtype(sizes.dtype)) for key in jax.random.split(jax.random.key(0)))
    matmul = seconds(jax.jit(jnp.matmul), a, b)
    # An addition, because a bare copy would be optimised away; in place, because memory must be found for a new array.
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    array, repeats = jax.random.bits(jax.random.key(0), sizes.copy_bytes // 4), 50
    array = jax.block_until_ready(copy(copy(array)))
    start = time.perf_counter()
    for _ in range(repeats):
        array = copy(array)
    jax.block_until_ready(array)
    taken = (time.perf_counter() - start) / repeats
    yield {"flops": 2 * n**3 / matmul, "bytes_per_s": 2 * sizes.copy_bytes / taken}


def paged(
    sizes: Sizes, prefixes: Sequence[int], chunks: Sequence[int], layers: int = 1
) -> tuple[jax.Array, KVPool, jax.Array, Batch]:
    """Random arguments of `paged_attention`; the pages of the sequences lie in shuffled order."""
    config, dtype = sizes.model, jnp.dtype(sizes.dtype)
    width = max(-(-(p + c) // sizes.page) for p, c in zip(prefixes, chunks, strict=True))
    pages = np.random.default_rng(0).permutation(len(chunks) * width).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (layers, len(pages), config.num_kv_heads, sizes.page, config.head_dim)
    pool = KVPool(k=jax.random.normal(keys[0], shape, dtype), v=jax.random.normal(keys[1], shape, dtype))
    q = jax.random.normal(keys[2], (sum(chunks), config.num_kv_heads, config.group, config.head_dim), dtype)
    batch = Batch(
        tokens=jnp.zeros(sum(chunks), jnp.int32),
        starts=jnp.asarray(np.cumsum([0, *chunks]), jnp.int32),
        prefix=jnp.asarray(prefixes, jnp.int32),
        block_table=jnp.asarray(pages.reshape(-1, width)),
        rows=jnp.zeros(1, jnp.int32),
        max_chunk=max(chunks),
    )
    return q, pool, jnp.int32(layers - 1), batch


def poisoned(pool: KVPool, batch: Batch) -> KVPool:
    """The pool with NaN in every slot that no query of the batch may see."""
    seen = np.zeros((pool.num_pages, pool.page_size), bool)
    for pages, length in zip(np.asarray(batch.block_table), np.asarray(batch.prefix + batch.lengths), strict=True):
        slots = np.arange(len(pages) * pool.page_size).reshape(len(pages), -1)
        seen[pages] = slots < length
    return jax.tree.map(lambda side: jnp.where(seen[None, :, None, :, None], side, jnp.nan), pool)


def attention(q: jax.Array, pool: KVPool, batch: Batch) -> tuple[Callable, str]:
    """The attention that this machine uses for such a batch, compiled, and its name."""
    chosen = kernel_for(q, pool, batch)
    return (jax.jit(chosen), chosen.__name__) if chosen else (jax.jit(by_xla), blockwise.__name__)


def by_xla(q: jax.Array, pool: KVPool, layer: jax.Array, batch: Batch) -> jax.Array:
    """XLA's path, which wants the new keys and values beside the pool that holds them."""
    _, pages, offsets = locate(batch, pool)
    k, v = (side[layer, pages, :, offsets] for side in (pool.k, pool.v))
    return blockwise(q, k, v, pool, layer, batch)


def correctness(sizes: Sizes) -> Iterator[Json]:
    """The largest difference from the float32 reference over ragged batches with NaN around them."""
    page, cpu = sizes.page, jax.devices("cpu")[0]
    prefixes = (20 * page, 0, page + 1, 1, page, page - 1)
    for chunks in sizes.checks:
        behind = [prefixes[i % len(prefixes)] for i in range(len(chunks))]
        q, pool, layer, batch = paged(sizes, behind, chunks, layers=2)
        pool = poisoned(pool, batch)
        function, name = attention(q, pool, batch)
        actual = np.asarray(function(q, pool, layer, batch).astype(jnp.float32))
        with jax.default_device(cpu):  # the reference is many small steps
            wide = jax.tree.map(lambda x: jax.device_put(x, cpu).astype(jnp.float32), (q, pool))
            expected = np.asarray(reference(*wide, 1, jax.device_put(batch, cpu)))
        error = float(np.abs(actual - expected).max())
        wrong = {} if error < TOLERANCE else {"wrong": f"{name} is off by {error} at chunks {chunks} behind {behind}"}
        row = {"kernel": name, "smallest_chunk": min(chunks), "largest_chunk": max(chunks), "sequences": len(chunks)}
        yield row | {"largest_error": error} | wrong


def over_layers(function: Callable, layers: int) -> Callable:
    """One program that attends in each layer of a pool, as a model does.

    A short kernel takes less time than its launch, and one layer's keys and values may still lie in the chip's cache.
    """
    return jax.jit(lambda q, pool, batch: [function(q, pool, jnp.int32(layer), batch) for layer in range(layers)])


def layers_for(sizes: Sizes, tokens: int) -> int:
    """Layers of a pool of so many tokens that `over_layers` takes: as many as fit the memory, up to eight."""
    layer = 2 * tokens * sizes.model.num_kv_heads * sizes.model.head_dim * jnp.dtype(sizes.dtype).itemsize
    return max(1, min(8, POOL_BYTES // layer))


def prefill(sizes: Sizes) -> Iterator[Json]:
    """FLOP/s of attention over a prompt, of which a share is cached, beside the rivals'."""
    config = sizes.model
    shape = (config.num_heads, config.num_kv_heads, config.head_dim)
    for length in sizes.prompts:
        for share in sizes.prefix_shares:
            prefix = int(length * share) // sizes.page * sizes.page
            chunk = length - prefix
            layers = layers_for(sizes, length)
            q, pool, _, batch = paged(sizes, [prefix], [chunk], layers)
            function, name = attention(q, pool, batch)
            # Each query multiplies with the keys that it sees, and their values, once.
            flop = 4 * config.num_heads * config.head_dim * (chunk * prefix + chunk * (chunk + 1) / 2)
            taken = seconds(over_layers(function, layers), q, pool, batch) / layers
            row = {"length": length, "prefix": prefix, "kernel": name, "seconds": taken, "flops": flop / taken}
            del q, pool, batch
            row["torch"] = gpu_rivals.torch_attention(chunk, length, 1, *shape)
            if prefix == 0:
                row["jax"] = gpu_rivals.jax_attention(length, *shape, seconds)
            for rival, key in (("torch", "best"), ("jax", "seconds")):
                if key in row.get(rival, {}):
                    row[rival]["flops"] = flop / row[rival][key]
            yield row


def decode(sizes: Sizes) -> Iterator[Json]:
    """Bytes of keys and values that attention reads a second, one new token per sequence, beside torch's."""
    config = sizes.model
    for seqs in sizes.decode_batches:
        layers = layers_for(sizes, seqs * sizes.context)
        q, pool, _, batch = paged(sizes, [sizes.context - 1] * seqs, [1] * seqs, layers)
        function, name = attention(q, pool, batch)
        taken = seconds(over_layers(function, layers), q, pool, batch) / layers
        read = (pool.k.nbytes + pool.v.nbytes) / layers
        row = {"batch": seqs, "context": sizes.context, "kernel": name, "seconds": taken, "bytes_per_s": read / taken}
        del q, pool, batch
        row["torch"] = gpu_rivals.torch_attention(
            1, sizes.context, seqs, config.num_heads, config.num_kv_heads, config.head_dim
        )
        if "best" in row["torch"]:
            row["torch"]["bytes_per_s"] = read / row["torch"]["best"]
        yield row


SECTIONS: dict[str, Callable[[Sizes], Iterator[Json]]] = {
    "ceilings": ceilings,
    "correctness": correctness,
    "prefill": prefill,
    "decode": decode,
    "forward": forward_passes,
    "arms": arms,
}


def provenance(sizes: Sizes, smoke: bool, revision: str | None) -> Json:
    """Where, when and with what this was measured."""
    device = jax.devices()[0]
    return {
        "smoke": smoke,
        "device": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "versions": versions(("jax", "jaxlib", "torch", "numpy")),
        "commit": revision or commit(),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dtype": sizes.dtype,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def run(
    sizes: Sizes,
    smoke: bool,
    folder: Path,
    console: Console,
    only: tuple[str, ...] = (),
    revision: str | None = None,
) -> Json:
    """Run the sections in order, writing the result after each figure; a failure is recorded and does not end the run.

    So is a wrong result, which raises AssertionError at the end: figures of that kernel are worth nothing, but those
    of the others and the rivals are.
    """
    start = time.perf_counter()
    result: Json = {"provenance": provenance(sizes, smoke, revision)}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in only or SECTIONS:
            task = progress.add_task(name, total=1)
            rows = result[name] = []
            for row in section(name, sizes, end=start + sizes.budget_s):
                add_shares(row, *result.get("ceilings", [])[:1])
                rows.append(row)
                console.print(f"{name}: {summary(row)}")
                result["provenance"]["seconds"] = round(time.perf_counter() - start, 1)
                save(result, folder)
            progress.update(task, completed=1)
    draw(result, folder / "gpu_bench.png")
    if wrong := [row["wrong"] for row in result.get("correctness", []) if "wrong" in row]:
        raise AssertionError("; ".join(wrong))
    return result


def section(name: str, sizes: Sizes, end: float) -> Iterator[Json]:
    """A section's figures as they come, until the clock says `end`; the last one may be a reason for there being none.

    It has a process of its own: a kernel that faults takes its process's hold on the GPU along, one that hangs can be
    ended, and no section has to do with memory that another has left in pieces.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, sizes, sender), daemon=True)
    process.start()
    sender.close()  # the process holds the only one: the pipe ends with it
    limit = sizes.model_figure_s if name in ("forward", "arms") else sizes.figure_s
    try:
        while receiver.poll(max(0.0, min(limit, end - time.perf_counter()))):
            yield receiver.recv()
        yield {"failed": f"no figure in {limit:g} s, or all {sizes.budget_s:g} s were over"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"failed": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def measure(name: str, sizes: Sizes, sender: Connection) -> None:
    """The work of a section's process: send each figure, and what went wrong."""
    if jax.default_backend() == "gpu":  # a second run is to spend its minutes on measuring
        jax.config.update("jax_compilation_cache_dir", str(COMPILED))
    try:
        for row in SECTIONS[name](sizes):
            sender.send(row)
    except Exception as error:  # such as a GPU with too little memory
        sender.send({"failed": f"{type(error).__name__}: {error}"})


def add_shares(row: Json, limits: Json | None = None) -> None:
    """Add to a measurement, ours and the rivals', its share of the ceilings: `mfu` and `of_copy_bandwidth`."""
    for measured in (row, row.get("torch", {}), row.get("jax", {})):
        for key, share in (("flops", "mfu"), ("bytes_per_s", "of_copy_bandwidth")):
            if limits and key in measured and key in limits:
                measured[share] = measured[key] / limits[key]


def summary(row: Json) -> str:
    """A measurement in a few words."""
    words = [f"{key} {value}" for key, value in row.items() if isinstance(value, int | str)]
    words += [f"largest error {row['largest_error']:.1e}"] if "largest_error" in row else []
    words += [f"{row['seconds'] * 1e3:.2f} ms"] if "seconds" in row else []
    words += [f"{row['flops'] / 1e12:.0f} TFLOP/s"] if "flops" in row else []
    words += [f"{row['bytes_per_s'] / 1e9:.0f} GB/s"] if "bytes_per_s" in row else []
    return ", ".join(words)


def save(result: Json, folder: Path) -> None:
    """Write the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu_bench.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def draw(result: Json, path: Path) -> None:
    """Prefill and decode beside the rivals and under the ceilings of the same run, and the arms: what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained", width_ratios=(4, 2, 1))
    limits = next(iter(result.get("ceilings", [])), {})
    panels = (
        ("prefill", "by share cached", "flops", 1e12, "TFLOP/s", share_cached),
        ("decode", "by sequences", "bytes_per_s", 1e9, "GB/s", lambda row: f"batch {row['batch']}"),
    )
    for ax, (name, order, key, unit, label, tick) in zip(axes[:2], panels, strict=True):
        rows = [row for row in result.get(name, []) if key in row]
        at = np.arange(len(rows))
        series = {"tokenzero, paged": [row[key] / unit for row in rows]}
        for rival in ("torch", "jax"):
            values = [row.get(rival, {}).get(key, np.nan) / unit for row in rows]
            series |= {} if np.isnan(values).all() else {f"{rival}, contiguous": values}
        for i, (who, values) in enumerate(series.items()):
            ax.bar(at + (i - (len(series) - 1) / 2) * 0.28, values, 0.26, label=who)
        if key in limits:
            ax.axhline(limits[key] / unit, color="black", linestyle="--", linewidth=1, label="measured ceiling")
        ax.set_xticks(at, [tick(row) for row in rows], fontsize=7)
        ax.set_ylabel(label)
        ax.set_title(f"attention, {name} {order}")
        ax.set_ylim(top=1.25 * ax.get_ylim()[1])
        ax.legend(fontsize=7, loc="upper left", ncols=2)
    rows = [row for row in result.get("arms", []) if "arm" in row]
    bars = axes[2].bar([row["arm"] for row in rows], [row["seconds"] * 1e3 for row in rows])
    axes[2].bar_label(bars, fmt="{:,.0f}")
    axes[2].set_ylabel("ms to the first token")
    axes[2].set_title(f"{rows[0]['prompt']:,}-token prompt" if rows else "arms: not measured")
    where = result["provenance"]
    figure.suptitle(f"{where['device']}, {where['dtype']}, jax {where['versions']['jax']}, {where['when'][:10]}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def share_cached(row: Json) -> str:
    """The length of a prompt and how much of it lay in the cache, in two short lines."""
    return f"{row['length'] // 1024}K\n" + (f"{row['prefix'] / row['length']:.0%}" if row["prefix"] else "cold")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu_bench", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs; on a CPU too")
    parser.add_argument("--only", nargs="+", default=(), choices=list(SECTIONS), help="run these sections")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/gpu beside this file)")
    parser.add_argument("--redraw", action="store_true", help="measure nothing, draw the folder's results again")
    parser.add_argument("--commit", help="what is measured, on a machine that has no git or no checkout")
    args = parser.parse_args(argv)
    console = Console()
    if args.redraw:
        folder = args.out or RESULTS
        draw(json.loads((folder / "gpu_bench.json").read_text(encoding="utf-8")), folder / "gpu_bench.png")
        return
    if not args.smoke and jax.default_backend() != "gpu":
        parser.error(f"there is no GPU, JAX found {jax.default_backend()}: use --smoke to try the script")
    sizes = SMOKE if args.smoke else FULL
    if args.smoke and jax.default_backend() == "gpu":
        sizes = replace(sizes, dtype="bfloat16", page=64)
    folder = args.out or (Path(".cache/gpu_smoke") if args.smoke else RESULTS)
    run(sizes, args.smoke, folder, console, tuple(args.only), args.commit)
    console.print(f"results: {folder / 'gpu_bench.json'}")


if __name__ == "__main__":
    main()
