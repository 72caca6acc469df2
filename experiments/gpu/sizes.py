"""What `experiments.gpu_bench` measures: shapes, lengths and limits of time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from model.config import ExpertsConfig, LayerKind, ModelConfig, RopeConfig
from model.published import published


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
TINY_EXPERTS = ExpertsConfig(count=8, per_token=2, ffn_size=32)
TINY_OSS = replace(TINY_EXPERTS, router_bias=True, biases=True, clamp=(1.702, 7.0))
# What can be measured, and the same in tiny: its layers, and what they consist of.
MODELS: dict[str, tuple[ModelConfig, ModelConfig]] = {
    "llama-8b": (LLAMA_8B, TINY),
    "qwen3-coder-30b-a3b": (
        published("Qwen3-Coder-30B-A3B"),
        replace(TINY, family="qwen3_moe", qk_norm=True, layers=(LayerKind(experts=True),) * 2, experts=TINY_EXPERTS),
    ),
    "gpt-oss-20b": (
        published("gpt-oss-20b"),
        replace(
            TINY,
            family="gpt_oss",
            layers=(LayerKind(window=128, experts=True), LayerKind(experts=True)),
            experts=TINY_OSS,
            sinks=True,
            qkv_bias=True,
            out_bias=True,
        ),
    ),
}
FULL = Sizes(LLAMA_8B)
SMOKE = Sizes(  # in f32: XLA's bf16 is slow on CPUs
    TINY, "float32", 16, (64,), (0, 0.5), (2,), 256, 16, 128, 2**20, engine_chunk=64, checks=((1, 1), (9, 3))
)
