"""What a prompt's tokens cost to compute and to read back, in seconds: the grounds for restore-or-recompute.

FLOPs follow from the model's shape; how many a second, and how many bytes a second each tier reads, are measured as
the server runs. The newest measurements count most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from model.config import ModelConfig

# Of the weight that all earlier measurements have together, this much is left after the next one.
MEMORY = 0.9
# Bytes a second, until a tier was read for the first time: a memory copy, a disk, a network.
EXPECTED_BYTES_PER_S = {"host": 5e9, "disk": 1e9, "remote": 1e8}


@dataclass(frozen=True)
class Rate:
    """Units a second, as a decaying mean over work done: `units` took `seconds`."""

    units: float = 0.0
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """The rate; 0 as long as nothing was measured."""
        return self.units / self.seconds if self.seconds else 0.0

    def observed(self, units: float, seconds: float) -> Rate:
        """The rate after one more measurement."""
        return Rate(MEMORY * self.units + units, MEMORY * self.seconds + seconds)


@dataclass(frozen=True)
class CostModel:
    """Seconds of prefill and of reading pages back. Immutable: a measurement makes a new one."""

    linear_flops: float  # a token, in the layers' matrices
    attention_flops: float  # a pair of query and key token, over all layers
    prefill: Rate = Rate()  # FLOPs
    reads: Mapping[str, Rate] = field(default_factory=lambda: MappingProxyType({}))  # bytes, by tier

    def flops(self, start: int, stop: int) -> float:
        """FLOPs to prefill tokens [start, stop) behind `start` others: causal attention sees a triangle and a block."""
        return self.linear_flops * (stop - start) + self.attention_flops * (stop**2 - start**2) / 2

    def prefill_s(self, start: int, stop: int) -> float:
        """Seconds to compute tokens [start, stop); infinite as long as no prefill was measured."""
        rate = self.prefill.per_second
        return self.flops(start, stop) / rate if rate else float("inf")

    def read_s(self, tier: str, size: int) -> float:
        """Seconds to read `size` bytes from a tier."""
        measured = self.reads.get(tier, Rate()).per_second
        return size / (measured or EXPECTED_BYTES_PER_S[tier])

    def worth_restoring(self, tier: str, start: int, stop: int, size: int) -> bool:
        """Whether the page of tokens [start, stop), `size` bytes, comes sooner from the tier than from the model."""
        return self.read_s(tier, size) < self.prefill_s(start, stop)

    def prefilled(self, start: int, stop: int, seconds: float) -> CostModel:
        """The model after a prefill chunk of tokens [start, stop) was timed."""
        return replace(self, prefill=self.prefill.observed(self.flops(start, stop), seconds))

    def was_read(self, tier: str, size: int, seconds: float) -> CostModel:
        """The model after `size` bytes came from a tier."""
        rate = self.reads.get(tier, Rate()).observed(size, seconds)
        return replace(self, reads=MappingProxyType({**self.reads, tier: rate}))


def cost_model(config: ModelConfig) -> CostModel:
    """The FLOPs of a decoder of this shape, two for each multiply-add, nothing measured yet.

    Matrices: q, k, v, o and the gated feed-forward's three; the embedding is a lookup and the head runs once a step.
    Attention: a query-key product and a value sum of head_dim for each query head.
    """
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    weights = config.embed_size * (heads * config.head_dim + 3 * config.ffn_size)
    return CostModel(
        linear_flops=2.0 * config.num_layers * weights,
        attention_flops=4.0 * config.num_layers * config.num_heads * config.head_dim,
    )
