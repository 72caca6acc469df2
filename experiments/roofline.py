"""Lower bounds: the least time that a prompt's arithmetic and memory traffic take on a device, for any software.

`python -m experiments.roofline --prompt 52000` prints FLOPs, bytes and ms for named models and devices, cold and with a
cached prefix. A lower bound is the larger of both times, as if they overlapped without loss (the roofline model,
https://doi.org/10.1145/1498765.1498785).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from experiments.bench.work import kv_bytes, prefill_flops, weight_bytes
from experiments.harness.report import make_table
from model.config import ModelConfig, RopeConfig


@dataclass(frozen=True)
class Device:
    """A device's peak: FLOP/s of dense bf16 matrix products, and bytes a second from its memory."""

    flops_per_s: float
    bytes_per_s: float
    source: str


@dataclass(frozen=True)
class Floor:
    """The work of one prompt, or one decoded token, and the least ms that it takes."""

    flops: float
    bytes: float
    compute_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        """The lower bound: arithmetic and memory traffic overlap at best."""
        return max(self.compute_ms, self.memory_ms)


def decoder(family: str, vocab: int, embed: int, ffn: int, layers: int, heads: int, tied: bool = False) -> ModelConfig:
    """A decoder with 8 KV heads of 128 channels, as all models here have."""
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        embed_size=embed,
        ffn_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        max_position=131_072,
        norm_eps=1e-6,
        rope=RopeConfig(),
        tie_embeddings=tied,
    )


# From each checkpoint's config.json on the Hugging Face hub.
MODELS = {
    "Llama-3.1-8B": decoder("llama", 128_256, 4096, 14_336, 32, 32),
    "Qwen3-8B": decoder("qwen3", 151_936, 4096, 12_288, 36, 32),
    "Qwen3-0.6B": decoder("qwen3", 151_936, 1024, 3072, 28, 16, tied=True),
}

# Data sheets give bf16 with sparsity: half of it is dense.
DEVICES = {
    "H200": Device(1.979e15 / 2, 4.8e12, "NVIDIA H200 data sheet, SXM: 1,979 TFLOPS bf16 with sparsity, 4.8 TB/s"),
    "B200": Device(4.5e15 / 2, 7.7e12, "NVIDIA Blackwell data sheet, HGX B200: 4.5 PFLOPS with sparsity, 7.7 TB/s"),
}


def prefill(config: ModelConfig, device: Device, prompt: int, cached: int = 0) -> Floor:
    """The lower bound of TTFT for a prompt of which some tokens are cached.

    Bytes: the weights once, the cached keys and values read once, the new ones written once. Prefill in chunks reads
    more.
    """
    flops = prefill_flops(config, prompt, cached)
    moved = weight_bytes(config) + kv_bytes(config, prompt)
    return Floor(flops, moved, 1e3 * flops / device.flops_per_s, 1e3 * moved / device.bytes_per_s)


def decode(config: ModelConfig, device: Device, context: int) -> Floor:
    """The lower bound of one decoded token after `context` others: the prefill of a single token."""
    return prefill(config, device, context + 1, context)


def table(prompt: int, suffix: int) -> Table:
    """The lower bounds of all models and devices: cold, with all but the suffix cached, and for one decoded token."""
    words, numbers = ("model", "device", "what"), ("TFLOP", "GB", "compute, ms", "memory, ms", "floor, ms")
    caption = "bf16; " + "; ".join(device.source for device in DEVICES.values())
    grid = make_table((*words, *numbers), words, caption=caption)
    for model, config in MODELS.items():
        for name, device in DEVICES.items():
            rows = {
                f"{prompt:,} tokens, cold": prefill(config, device, prompt),
                f"all but {suffix:,} cached": prefill(config, device, prompt, prompt - suffix),
                "one decoded token": decode(config, device, prompt),
            }
            for what, floor in rows.items():
                times = (f"{floor.compute_ms:,.2f}", f"{floor.memory_ms:,.2f}", f"{floor.ms:,.2f}")
                grid.add_row(model, name, what, f"{floor.flops / 1e12:,.2f}", f"{floor.bytes / 1e9:,.1f}", *times)
    return grid


def main(argv: list[str] | None = None) -> None:
    """Print the lower bounds."""
    cli = argparse.ArgumentParser(prog="python -m experiments.roofline", description=__doc__)
    cli.add_argument("--prompt", type=int, default=52_000, metavar="TOKENS", help="(default: %(default)s)")
    cli.add_argument("--suffix", type=int, default=128, metavar="TOKENS", help="new tokens (default: %(default)s)")
    args = cli.parse_args(argv)
    if not 0 < args.suffix <= args.prompt:
        cli.error(f"--suffix: expected 1 to {args.prompt}, got {args.suffix}")
    Console(width=130).print(table(args.prompt, args.suffix))


if __name__ == "__main__":
    main()
