"""What `experiments.gpu_bench` measures: shapes, lengths and limits of time."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig, RopeConfig


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
