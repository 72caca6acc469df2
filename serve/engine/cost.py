"""What a prompt's tokens cost to compute and to read back, in seconds: the grounds for restore-or-recompute.

The cost model is TTFT(n, p) = fixed + linear (n - p) + attention (n^2 - p^2)/2 + match p + restore r for a prompt of n
tokens, p of them cached and r of these read back from a tier. Its constants come from a sweep (`fit`), as a file that
the server loads. Without one, FLOPs follow from the model's shape, and how many a second is measured as the server
runs; how many bytes a second each tier reads always is. The newest measurements count most, a single slow one nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import numpy as np

from model.config import ModelConfig

# Measurements that a rate is taken from, the latest ones.
REMEMBERED = 16
# Bytes a second, until a tier was read for the first time: a memory copy, a disk, a network.
EXPECTED_BYTES_PER_S = {"host": 5e9, "disk": 1e9, "remote": 1e8}

Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1e6)]


@dataclass(frozen=True)
class Rate:
    """Units a second: the median of the latest measurements, each weighed by its units.

    In a mean, one stall of a minute (a suspended machine, a busy disk, a collection of garbage) would outweigh a
    thousand reads, and it says nothing of the rate.
    """

    per_second: float = 0.0  # 0 as long as nothing was measured
    latest: tuple[tuple[float, float], ...] = ()  # (units a second, units), the newest last

    def observed(self, units: float, seconds: float) -> Rate:
        """The rate after one more measurement: `units` took `seconds`, which must be above 0."""
        latest = (*self.latest[1 - REMEMBERED :], (units / seconds, units))
        return Rate(weighted_median(latest), latest)


def weighted_median(values: Sequence[tuple[float, float]]) -> float:
    """The value of the pairs (value, weight) that has half of the weight on either side; of two such, the larger."""
    ordered = sorted(values, reverse=True)
    reached = np.cumsum([weight for _, weight in ordered])
    return ordered[int(np.searchsorted(reached, reached[-1] / 2))][0]


@dataclass(frozen=True)
class Constants:
    """The cost model's constants, in seconds, of one model on one machine."""

    fixed: Seconds  # a request
    linear: Seconds  # a computed token
    attention: Seconds  # a pair of a computed token and a token before it
    match: Seconds = 0.0  # a cached token
    restore: Seconds = 0.0  # a cached token that was read back from a tier

    def compute_s(self, start: int, stop: int) -> float:
        """Seconds to compute tokens [start, stop) of a prompt: the price of a mismatch at `start`."""
        return self.linear * (stop - start) + self.attention * (stop**2 - start**2) / 2

    def ttft_s(self, prompt: int, cached: int, restored: int = 0) -> float:
        """Seconds to the first token behind `prompt` tokens, `cached` of them cached and `restored` of these read."""
        return self.fixed + self.compute_s(cached, prompt) + self.match * cached + self.restore * restored

    def crossover(self, restore_s: float) -> float:
        """The position from which on reading a token back, `restore_s` seconds each, beats computing it.

        0 where it always does, infinite where it never does.
        """
        if restore_s <= self.linear:
            return 0.0
        return (restore_s - self.linear) / self.attention if self.attention else float("inf")


@dataclass(frozen=True)
class CostModel:
    """Seconds of prefill and of reading pages back. Immutable: a measurement makes a new one."""

    linear_flops: float  # a token, in the layers' matrices
    attention_flops: float  # a pair of query and key token, over all layers
    prefill: Rate = Rate()  # FLOPs
    reads: Mapping[str, Rate] = field(default_factory=lambda: MappingProxyType({}))  # bytes, by tier
    constants: Constants | None = None  # from a sweep; they take the place of the rate of prefill

    def flops(self, start: int, stop: int) -> float:
        """FLOPs to prefill tokens [start, stop) behind `start` others: causal attention sees a triangle and a block."""
        return self.linear_flops * (stop - start) + self.attention_flops * (stop**2 - start**2) / 2

    def prefill_s(self, start: int, stop: int) -> float:
        """Seconds to compute tokens [start, stop); infinite as long as neither a sweep nor a prefill was measured."""
        if self.constants:
            return self.constants.compute_s(start, stop)
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


def cost_model(config: ModelConfig, constants: Constants | None = None) -> CostModel:
    """The FLOPs of a decoder of this shape, two for each multiply-add, and what a sweep measured, if one did.

    Matrices: q, k, v, o and the gated feed-forward's three; the embedding is a lookup and the head runs once a step.
    Attention: a query-key product and a value sum of head_dim for each query head.
    """
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    weights = config.embed_size * (heads * config.head_dim + 3 * config.ffn_size)
    return CostModel(
        linear_flops=2.0 * config.num_layers * weights,
        attention_flops=4.0 * config.num_layers * config.num_heads * config.head_dim,
        constants=constants,
    )


class CostFile(msgspec.Struct, frozen=True):
    """What the server reads of a cost model's file; fits keep more in it, for people."""

    constants: Constants
    linear_flops: float | None  # the model's, to know it by; None: of an endpoint whose model nobody knows
    attention_flops: float | None


def file_contents(constants: Constants, config: ModelConfig | None, **about: Any) -> dict[str, Any]:
    """A cost model's file as JSON values; `config` is the measured model's, and `about` what else to keep."""
    model = cost_model(config) if config else None
    return {
        "constants": asdict(constants),
        "linear_flops": model and model.linear_flops,
        "attention_flops": model and model.attention_flops,
        **about,
    }


def load_constants(path: str | Path, config: ModelConfig) -> Constants:
    """The constants in a cost model's file, for a server of this model.

    Raises OSError for a file that cannot be read, ValueError for one that is no cost model, or another model's.
    """
    try:
        found = msgspec.json.decode(Path(path).read_bytes(), type=CostFile)
    except msgspec.MsgspecError as error:
        raise ValueError(
            f"{path} is no cost model: {error}; write one with `python -m experiments.sweep.fit`"
        ) from None
    model = cost_model(config)
    if (found.linear_flops, found.attention_flops) != (model.linear_flops, model.attention_flops):
        raise ValueError(
            f"{path} was fitted to a model of {found.linear_flops} FLOP a token and {found.attention_flops} a pair, "
            f"expected {model.linear_flops} and {model.attention_flops}: fit one to this model"
        )
    return found.constants
