"""Seconds to compute a prompt's tokens and to read them back: the basis of the choice to restore or to recompute.

The cost model is TTFT(n, p) = fixed + linear (n - p) + attention (n^2 - p^2)/2 + match p + restore r for a prompt of n
tokens, p of them cached and r of these read back from a tier. Its constants come from a sweep (serve.cost.fit), as a
file that the server loads. Without one, FLOPs follow from the model's shape, and FLOPs a second are measured while the
server runs. Each tier's bytes a second are always measured. Only the latest measurements count, by their median.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated

import msgspec
import numpy as np

from model.config import ModelConfig

# The latest measurements, from which a rate is taken.
REMEMBERED = 16
# Bytes a second, assumed until a tier was read for the first time: a memory copy, a disk, a network.
EXPECTED_BYTES_PER_S = {"host": 5e9, "disk": 1e9, "remote": 1e8}

Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1e6)]


@dataclass(frozen=True)
class Rate:
    """Units a second: the median of the latest measurements, each weighted by its units.

    In a mean, one stall of a minute (a suspended machine, a busy disk, a garbage collection) would outweigh a thousand
    reads, though it says nothing about the rate.
    """

    per_second: float = 0.0  # 0 until something was measured
    latest: tuple[tuple[float, float], ...] = ()  # (units a second, units), the newest last

    def observed(self, units: float, seconds: float) -> Rate:
        """The rate after one more measurement: `units` took `seconds`, which must be above 0."""
        latest = (*self.latest[1 - REMEMBERED :], (units / seconds, units))
        return Rate(weighted_median(latest), latest)


def weighted_median(values: Sequence[tuple[float, float]]) -> float:
    """The value of the pairs (value, weight) with half of the weight on either side; the larger one of two such."""
    ordered = sorted(values, reverse=True)
    reached = np.cumsum([weight for _, weight in ordered])
    return ordered[int(np.searchsorted(reached, reached[-1] / 2))][0]


@dataclass(frozen=True)
class Constants:
    """The cost model's constants for one model on one machine, in seconds for one of what each comment names."""

    fixed: Seconds  # a request
    linear: Seconds  # a computed token
    attention: Seconds  # a pair of a computed token and a token before it
    match: Seconds = 0.0  # a cached token
    restore: Seconds = 0.0  # a cached token that was read back from a tier

    def compute_s(self, start: int, stop: int) -> float:
        """Seconds to compute tokens [start, stop) of a prompt, which is what a mismatch at `start` costs."""
        return self.linear * (stop - start) + self.attention * (stop**2 - start**2) / 2

    def ttft_s(self, prompt: int, cached: int, restored: int = 0) -> float:
        """Seconds to the first token after `prompt` tokens, `cached` of them cached and `restored` of these read."""
        return self.fixed + self.compute_s(cached, prompt) + self.match * cached + self.restore * restored

    def crossover(self, restore_s: float) -> float:
        """The position from which on a token is read back (in `restore_s` seconds) faster than it is computed.

        0 where it always is, infinite where it never is.
        """
        if restore_s <= self.linear:
            return 0.0
        return (restore_s - self.linear) / self.attention if self.attention else float("inf")


@dataclass(frozen=True)
class CostModel:
    """Seconds to prefill and to read pages back. Immutable: a measurement makes a new model."""

    linear_flops: float  # for a token, in the layers' matrices
    attention_flops: float  # for a pair of query and key token, over the layers whose attention is full
    prefill: Rate = Rate()  # FLOPs, of steps in which nothing decodes
    shared: Rate = Rate()  # tokens of a prefill times sequences that decode beside it, in the seconds that they add
    reads: Mapping[str, Rate] = field(default_factory=lambda: MappingProxyType({}))  # bytes, by tier
    constants: Constants | None = None  # from a sweep; used instead of the rate of prefill
    windows: tuple[tuple[int, float], ...] = ()  # of the other layers: keys that a query sees, and FLOPs for each

    @property
    def token_flops(self) -> float:
        """FLOPs for a token where every window is full: attention in windows is then a part of the linear term."""
        return self.linear_flops + sum(window * flops for window, flops in self.windows)

    def flops(self, start: int, stop: int) -> float:
        """FLOPs to prefill tokens [start, stop) after `start` others: causal attention is a triangle and a block."""
        full = self.linear_flops * (stop - start) + self.attention_flops * (stop**2 - start**2) / 2
        return full + sum(flops * (pairs(stop, window) - pairs(start, window)) for window, flops in self.windows)

    def prefill_s(self, start: int, stop: int) -> float:
        """Seconds to compute tokens [start, stop); infinite until a sweep or a prefill was measured."""
        if self.constants:
            return self.constants.compute_s(start, stop)
        rate = self.prefill.per_second
        return self.flops(start, stop) / rate if rate else float("inf")

    def read_s(self, tier: str, size: int) -> float:
        """Seconds to read `size` bytes from a tier."""
        measured = self.reads.get(tier, Rate()).per_second
        return size / (measured or EXPECTED_BYTES_PER_S[tier])

    def worth_restoring(self, tier: str, start: int, stop: int, size: int) -> bool:
        """Whether reading the page of tokens [start, stop), `size` bytes, from the tier is faster than computing it."""
        return self.read_s(tier, size) < self.prefill_s(start, stop)

    @property
    def known(self) -> Constants | None:
        """Constants of prefills beside which nothing decodes: a sweep's, or by FLOPs a second; None until measured."""
        rate = self.prefill.per_second
        if self.constants or not rate:
            return self.constants
        return Constants(0.0, self.token_flops / rate, self.attention_flops / rate)

    @property
    def beside_s(self) -> float:
        """Seconds by which each sequence that decodes lengthens the computing of a token; 0 until measured."""
        return 1 / self.shared.per_second if self.shared.per_second else 0.0

    def prefilled(self, start: int, stop: int, seconds: float, decoding: int = 0) -> CostModel:
        """The model after a prefill chunk of tokens [start, stop) was timed, with `decoding` sequences in its step."""
        if not decoding:
            return replace(self, prefill=self.prefill.observed(self.flops(start, stop), seconds))
        # Noise can make a step seem shorter than its chunk alone.
        more = max(seconds - self.prefill_s(start, stop), 1e-3 * seconds)
        return replace(self, shared=self.shared.observed((stop - start) * decoding, more))

    def was_read(self, tier: str, size: int, seconds: float) -> CostModel:
        """The model after `size` bytes came from a tier."""
        rate = self.reads.get(tier, Rate()).observed(size, seconds)
        return replace(self, reads=MappingProxyType({**self.reads, tier: rate}))


def pairs(tokens: int, window: int) -> float:
    """Pairs of query and key in the first tokens of a prompt, where a query sees the last `window` keys."""
    growing = min(tokens, window)
    return growing**2 / 2 + window * (tokens - growing)


class CostTracker:
    """One engine's cost model, the only one: prefills and reads refine it as they are measured."""

    def __init__(self, model: CostModel) -> None:
        self.model = model

    def prefilled(self, start: int, stop: int, seconds: float, decoding: int = 0) -> None:
        """Learn from a prefill chunk of tokens [start, stop), with `decoding` sequences in its step."""
        self.model = self.model.prefilled(start, stop, seconds, decoding)

    def was_read(self, tier: str, size: int, seconds: float) -> None:
        """Learn from a read of `size` bytes from a tier."""
        self.model = self.model.was_read(tier, size, seconds)


def cost_model(config: ModelConfig, constants: Constants | None = None) -> CostModel:
    """The cost model of a decoder of this shape, two FLOPs for each multiply-add, and a sweep's constants if given.

    Matrices: q, k, v, o and the gated feed-forward's three, of the experts that a token goes through and of the router;
    the embedding is a lookup and the head runs once a step.
    Attention: a query-key product and a value sum of head_dim for each query head; in a layer with a window, over the
    keys of the window.
    """
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    outputs = config.num_layers * heads * config.head_dim + sum(3 * units for units in config.active_ffn_sizes)
    if config.experts:
        outputs += config.experts.count * sum(kind.experts for kind in config.layers)
    pair = 4.0 * config.num_heads * config.head_dim
    windows = Counter(kind.window for kind in config.layers)
    full = windows.pop(None, 0)
    return CostModel(
        linear_flops=2.0 * config.embed_size * outputs,
        attention_flops=full * pair,
        constants=constants,
        windows=tuple((window, count * pair) for window, count in windows.items() if window),
    )
