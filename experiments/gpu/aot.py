"""Compile every variant of the GPU kernels for an H200, without one, and check the programs.

Run `python -m experiments.gpu.aot` where jax's CUDA plug-in is installed (no GPU, no driver): it fails on register
spills, on more shared memory than a block may have, on a kernel without wgmma instructions or with serialised ones, and
on a forward pass that copies the pool or writes new keys or values anywhere else. The forward pass is compiled for one
H200 and divided over several, where it may send two sums a layer, the embedding's and the logits.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from experiments.gpu.collectives import collectives
from model import decoder
from model.batch import Batch
from model.config import LayerKind, ModelConfig, RopeConfig
from model.kernels.hopper import decode as paged_decode
from model.kernels.hopper import prefill as paged_prefill
from model.kernels.limits import SUPPORTED
from model.kv import KVPool
from model.params import Layer, Params
from model.sharding import AnyMesh, divide_groups, make_mesh, shardings

SHARED_MEMORY_LIMIT = 232_448
# Values of the data sheet; the compiler asks for them where no device answers.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
DEVICES = (1, 2, 4, 16)  # of a forward pass: the last are more than KV heads
DEVICES_OF_WINDOWS = (1, 16)  # where layers have windows or sinks
MODEL = ModelConfig("llama", 32_000, 1536, 3072, 4, 32, 8, 128, 131_072, 1e-5, RopeConfig())


@dataclass(frozen=True)
class Variant:
    """A kernel at one shape."""

    kernel: str  # paged_prefill or paged_decode
    head_dim: int
    group: int
    page_size: int
    seqs: int
    chunk: int
    windowed: bool = False
    sinks: bool = False

    @property
    def name(self) -> str:
        """Its name in tables and tests."""
        shape = f"d{self.head_dim}-group{self.group}-page{self.page_size}"
        return f"{self.kernel}-{shape}-{self.seqs}x{self.chunk}{'-window' * self.windowed}{'-sinks' * self.sinks}"

    @property
    def model(self) -> ModelConfig:
        """A model that runs it: with windows in every other layer."""
        layers = (LayerKind(window=128), LayerKind()) * 2 if self.windowed else ()
        heads = self.group * MODEL.num_kv_heads
        return replace(MODEL, num_heads=heads, head_dim=self.head_dim, layers=layers, sinks=self.sinks)

    @property
    def devices(self) -> tuple[int, ...]:
        """The numbers of devices for which a forward pass with it is compiled."""
        if self.windowed or self.sinks:
            return DEVICES_OF_WINDOWS
        return DEVICES if (self.head_dim, self.group, self.page_size) == (128, 4, 64) else ()

    @property
    def function(self) -> Callable[..., Any]:
        """The kernel's wrapper."""
        return {"paged_prefill": paged_prefill.paged_prefill, "paged_decode": paged_decode.paged_decode}[self.kernel]

    def arguments(self, sharding: Any = None, kv_heads: int = 8, context: int = 53_248) -> tuple[Any, ...]:
        """Shapes to trace `function` with, for a pool of two layers."""
        array: Any = partial(jax.ShapeDtypeStruct, sharding=sharding)
        tokens, pages = self.seqs * self.chunk, context // self.page_size
        side = array((2, pages, kv_heads, self.page_size, self.head_dim), jnp.bfloat16)
        batch = Batch(
            tokens=array((tokens,), jnp.int32),
            starts=array((self.seqs + 1,), jnp.int32),
            prefix=array((self.seqs,), jnp.int32),
            block_table=array((self.seqs, pages), jnp.int32),
            logit_indices=array((self.seqs,), jnp.int32),
            max_chunk=self.chunk,
        )
        queries = array((tokens, kv_heads, self.group, self.head_dim), jnp.bfloat16)
        window = array((), jnp.int32) if self.windowed else None
        sinks = array((kv_heads, self.group), jnp.float32) if self.sinks else None
        return queries, KVPool(k=side, v=side), array((), jnp.int32), batch, window, sinks


def variants() -> list[Variant]:
    """Both kernels, with the keys whole and split, at each head size and page size, usual groups and tuned shapes.

    With windows and sinks at the shapes of models that have them: gpt-oss (both, or sinks alone) and mistral (windows).
    """
    shapes: set[tuple[Any, int, Any]] = {(d, group, 64) for d in SUPPORTED["head_dim"] for group in (1, 4, 7, 8)}
    shapes |= {(d, 4, page) for d in SUPPORTED["head_dim"] for page in SUPPORTED["page_size"]}
    shapes |= {*paged_prefill.TUNED, *paged_decode.TUNED}
    batches = (
        ("paged_prefill", 1, 4096),
        ("paged_prefill", 1, 128),
        ("paged_decode", 64, 1),
        ("paged_decode", 1, 1),
    )
    kinds = [(shape, False, False) for shape in sorted(shapes)]
    kinds += [((64, 8, 64), True, True), ((64, 8, 64), False, True), ((128, 4, 64), True, False)]
    return [
        Variant(kernel, *shape, seqs, chunk, windowed, sinks)
        for shape, windowed, sinks in kinds
        for kernel, seqs, chunk in batches
    ]


@dataclass(frozen=True)
class Compiled:
    """What the compiler reported of one kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int  # instructions
    serialised: bool  # whether the assembler says that each wgmma waits for the one before

    def faults(self) -> list[str]:
        """What is wrong with it, a line each."""
        found = []
        if self.spilled_bytes:
            found.append(f"{self.spilled_bytes} bytes of registers are spilled")
        if not 0 < self.shared_bytes <= SHARED_MEMORY_LIMIT:
            found.append(f"{self.shared_bytes} bytes of shared memory, expected up to {SHARED_MEMORY_LIMIT}")
        if not self.wgmma:
            found.append("there is no wgmma")
        if self.serialised:
            found.append("wgmma instructions are serialised")
        return found


def read_dump(folder: Path) -> Compiled:
    """Read what Mosaic wrote into the folder that MOSAIC_GPU_DUMP_TO names, while it compiled one kernel; empty it."""
    text = {suffix: "".join(path.read_text() for path in folder.glob(f"*{suffix}")) for suffix in ("ptx", "ptxas")}
    numbers = partial(re.findall, string=text["ptxas"])
    passes = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".log", ".txt"))
    shared = [int(size) for size in re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", passes)]
    for path in folder.iterdir():
        path.unlink()
    return Compiled(
        registers=max(map(int, numbers(r"Used (\d+) registers")), default=0),
        spilled_bytes=sum(map(int, numbers(r"(\d+) bytes spill"))),
        shared_bytes=max(shared, default=0),
        wgmma=text["ptx"].count("wgmma.mma_async"),
        serialised="serialized" in text["ptxas"],
    )


def h200s(count: int) -> list[jax.Device]:
    """H200s of one machine, as devices to compile for."""
    topology = topologies.get_topology_desc(
        topology_name="", platform="cuda", topology=f"1x1x{count}", target_config=H200.strip()
    )
    return list(topology.devices)


def on_h200() -> NamedSharding:
    """The sharding with which programs are compiled for an H200."""
    return NamedSharding(Mesh(np.array(h200s(1)), ("x",)), PartitionSpec())


def compile_variant(variant: Variant, sharding: NamedSharding, dump: Path) -> Compiled:
    """Compile one variant; `dump` is an empty folder that MOSAIC_GPU_DUMP_TO names already."""
    jax.jit(variant.function).trace(*variant.arguments(sharding)).lower().compile()
    return read_dump(dump)


def param_shapes(config: ModelConfig, sharding: Any = None) -> Params:
    """The shapes of a llama's parameters in bf16."""

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    layers, embed, ffn = config.num_layers, config.embed_size, config.ffn_size
    heads = (config.num_kv_heads, config.group, config.head_dim)
    layer = Layer(
        attn_norm=array(layers, embed),
        qkv=array(layers, heads[0], heads[1] + 2, heads[2], embed),
        out=array(layers, embed, *heads),
        mlp_norm=array(layers, embed),
        gate_up=array(layers, 2, ffn, embed),
        down=array(layers, embed, ffn),
        sinks=array(layers, *heads[:2], dtype=jnp.float32) if config.sinks else None,
    )
    return Params(embed=array(config.vocab_size, embed), layers=(layer,), final_norm=array(embed))


def separate(params: Params, sharding: Any = None) -> Params:
    """The shapes of the same parameters with each layer's in arrays of their own."""
    (run,) = params.layers
    layer = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=sharding), run)
    return replace(params, layers=(layer,) * params.runs[0].norm.shape[0])


def forward_with(
    variant: Variant, config: ModelConfig, sharding: Any = None, stacked: bool = True, mesh: AnyMesh | None = None
) -> tuple[Any, KVPool]:
    """The forward pass traced with the variant's kernel in it, the pool donated; and the pool's shape on a device.

    With a mesh, it is divided over its devices, and `sharding` is that of the batch.
    """
    _, pool, _, batch, *_ = variant.arguments(sharding, config.num_kv_heads)
    params = param_shapes(config, sharding)
    params = params if stacked else separate(params, sharding)
    if mesh:
        params = jax.eval_shape(partial(divide_groups, mesh=mesh), on_mesh(params, mesh))
        params, pool = on_mesh(params, mesh), on_mesh(pool, mesh)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> Any:
        return variant.function(q, *rest)  # the new keys and values are in the pool already

    with mock.patch.object(decoder, "paged_attention", attention):
        # A new function each time: traces are cached by function, and this one depends on the patch.
        jitted = jax.jit(lambda p, b, pool: decoder.forward(p, b, pool, config, mesh), donate_argnums=2)
        traced = jitted.trace(params, batch, pool)
    if mesh:
        pool = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.sharding.shard_shape(a.shape), a.dtype), pool)
    return traced, pool


def on_mesh(shapes: Any, mesh: AnyMesh) -> Any:
    """The shapes of Params or a KVPool with the shardings that they have on a mesh."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes, shardings(shapes, mesh)
    )


def pool_sized(program: str, pool: KVPool) -> list[str]:
    """The instructions of a compiled program that make an array as large as a layer of the pool, or as all of it.

    Left out are those that only pass it on, and the updates in place.
    """
    size = ",".join(map(str, pool.k.shape[1:]))
    harmless = {"parameter", "get-tuple-element", "bitcast", "scatter", "dynamic-update-slice", "fusion"}
    made = re.compile(rf"\s*(?:ROOT )?%\S+ = bf16\[(?:\d+,)?{size}\]\S* ([\w-]+)\(")
    found = [(line, match[1]) for line in program.splitlines() if (match := made.match(line))]
    return [line.strip() for line, opcode in found if opcode not in harmless]


def keys_beside_pool(program: str, tokens: int, config: ModelConfig) -> list[str]:
    """The instructions of a compiled program that write the new tokens' keys or values anywhere but into the pool."""
    width = f"{config.num_kv_heads},(?:1,)?{config.head_dim}|{config.num_kv_heads * config.head_dim}"
    made = re.compile(rf"\s*(?:ROOT )?%\S+ = bf16\[{tokens},(?:{width})\]")
    # Each computation is a paragraph; what is fused stays in registers.
    computations = (part for part in program.split("\n\n") if not part.lstrip().startswith("%fused_"))
    return [line.strip() for part in computations for line in part.splitlines() if made.match(line)]


def check_forward(variant: Variant, devices: int, dump: Path) -> list[str]:
    """Compile the forward pass with a variant's kernel in it for some devices; what is wrong with it, a line each."""
    model = variant.model
    mesh = make_mesh(model, devices, h200s(devices))
    traced, pool = forward_with(variant, model, NamedSharding(mesh, PartitionSpec()) if mesh else on_h200(), mesh=mesh)
    program = traced.lower().compile().as_text()
    kernel = read_dump(dump)
    tokens, own = variant.seqs * variant.chunk, replace(model, num_kv_heads=pool.k.shape[2])
    faults = pool_sized(program, pool) + keys_beside_pool(program, tokens, own)
    if mesh:  # on one device the kernel is one that was compiled before, and then it is not compiled again
        faults += kernel.faults()
    # The layers are stacked, so the two sums of one are there once; the third sum is the embedding's.
    sums = [("all-reduce", tokens * model.embed_size)] * 3
    expected = [("all-gather", variant.seqs * model.vocab_size), *sums] if mesh else []
    sent = [(name, math.prod(shape)) for name, shape in collectives(program)]
    return faults + ([f"it sends {sent}, expected {expected}"] if sent != expected else [])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu.aot", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name contains this")
    args = parser.parse_args()
    console = Console()
    console.width = max(console.width, 100)  # a log has no terminal to fit in
    table = Table(
        Column("kernel", no_wrap=True),
        "registers",
        "spilled",
        "shared memory",
        "wgmma",
        title=f"sm_90a, jax {jax.__version__}",
    )
    faults = []
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # else the plug-in looks for a driver
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        chosen = [variant for variant in variants() if args.only in variant.name]
        sharding = on_h200()
        for variant in track(chosen, "compiling", console=console):
            compiled = compile_variant(variant, sharding, Path(folder))
            numbers = (compiled.registers, compiled.spilled_bytes, compiled.shared_bytes, compiled.wgmma)
            table.add_row(variant.name, *map(str, numbers))
            faults += [f"{variant.name}: {fault}" for fault in compiled.faults()]
        console.print(table)
        for variant in chosen:
            for devices in variant.devices:
                wrong = check_forward(variant, devices, Path(folder))
                console.print(f"forward pass with {variant.name} on {devices} of them: {len(wrong)} faults")
                faults += [f"forward pass with {variant.name} on {devices}: {line}" for line in wrong]
        del os.environ["MOSAIC_GPU_DUMP_TO"]
    sys.exit("\n".join(faults) if faults else None)


if __name__ == "__main__":
    main()
