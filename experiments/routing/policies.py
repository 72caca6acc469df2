"""The choice of a replica, as other routers publish it: pure functions of a request and of what a router knows.

Each policy takes an `Asked` and a `Known` and returns the number of a live replica. Where a source leaves ties open,
they are broken by the fewest requests in flight and then by the request's random draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to be routed."""

    agent: int  # whose calls build on one another; a router sees it as a session's id
    tokens: int  # of its prompt
    pages: int  # full pages of its prompt
    number: int  # how many requests this router has sent before it
    draws: tuple[float, float]  # uniform in [0, 1), for policies that choose at random


@dataclass(frozen=True, eq=False, slots=True)
class Known:
    """What a router knows of its replicas as a request comes; each array is [replicas]."""

    alive: np.ndarray  # bool
    overlap: np.ndarray  # int64, pages of the request's prompt that are cached there, counted from its start
    requests: np.ndarray  # int64, sent there by this router and not finished
    prefill_pages: np.ndarray  # float64, of requests without a first token: those that were not cached when sent
    active_pages: np.ndarray  # int64, of all requests in flight
    queued: np.ndarray  # int64, requests that wait there, by the replica's own account
    used: np.ndarray  # float64, the share of its pages that running requests hold, by the replica's own account
    cached_pages: np.ndarray  # int64, in the router's index of it


Policy = Callable[[Asked, Known], int]


def lowest(scores: np.ndarray, known: Known, asked: Asked, among: np.ndarray | None = None) -> int:
    """The replica with the lowest score ([replicas] float), of equals that with the fewest requests."""
    allowed = known.alive if among is None else known.alive & among
    scores = np.where(allowed, scores, np.inf)
    best = np.flatnonzero(scores <= scores.min() + 1e-12)
    if len(best) > 1:
        requests = known.requests[best]
        best = best[requests == requests.min()]
    return int(best[int(asked.draws[0] * len(best))])


def round_robin(asked: Asked, known: Known) -> int:
    """The live replicas in turns."""
    alive = np.flatnonzero(known.alive)
    return int(alive[asked.number % len(alive)])


def least_loaded(asked: Asked, known: Known) -> int:
    """The fewest requests in flight."""
    return lowest(known.requests, known, asked)


def power_of_two(asked: Asked, known: Known) -> int:
    """Of two replicas drawn at random, the one with fewer requests (Mitzenmacher, 2001).

    https://doi.org/10.1109/71.963420
    """
    alive = np.flatnonzero(known.alive)
    first = int(asked.draws[0] * len(alive))
    # The second differs from the first where there are two.
    second = (first + 1 + int(asked.draws[1] * max(1, len(alive) - 1))) % len(alive)
    a, b = int(alive[first]), int(alive[second])
    return b if known.requests[b] < known.requests[a] else a


def sticky(asked: Asked, known: Known) -> int:
    """A replica by the hash of the agent: the highest of all hashes of agent and replica (rendezvous hashing).

    Where a replica dies only its agents move (Thaler and Ravishankar, 1998). https://doi.org/10.1109/90.663936
    """
    replicas = np.arange(len(known.alive), dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = (replicas + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(asked.agent + 1)
        # The finalizer of SplitMix64 (https://doi.org/10.1145/2660193.2660195).
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    return int(np.argmax(np.where(known.alive, mixed, np.uint64(0))))


def dynamo(asked: Asked, known: Known, prefill_load_scale: float = 1.0) -> int:
    """NVIDIA Dynamo's KV router: the lowest sum of prefill and decode blocks, at temperature 0.

    `scale * max(active prefill + incoming - overlap, 0) + decode blocks`, of which the last count the incoming request.
    https://docs.nvidia.com/dynamo/v1.6.2/knowledge-base/modular-components/router/routing-concepts
    """
    prefill, decode = dynamo_terms(asked, known)
    return lowest(prefill_load_scale * prefill + decode, known, asked)


def dynamo_lmetric(asked: Asked, known: Known) -> int:
    """NVIDIA Dynamo's other formula: the lowest product of adjusted prefill and decode blocks + 1.

    https://docs.nvidia.com/dynamo/v1.6.2/knowledge-base/modular-components/router/routing-concepts
    """
    prefill, decode = dynamo_terms(asked, known)
    return lowest(prefill * (decode + 1), known, asked)


def dynamo_terms(asked: Asked, known: Known) -> tuple[np.ndarray, np.ndarray]:
    """Prefill blocks with the incoming request's, less its overlap, and decode blocks with it; each [replicas]."""
    incoming = max(asked.pages, 1)
    return np.maximum(known.prefill_pages + incoming - known.overlap, 0), known.active_pages + incoming


def sglang_cache_aware(
    asked: Asked, known: Known, threshold: float = 0.3, absolute: int = 64, relative: float = 1.5
) -> int:
    """SGLang's cache_aware: the longest prefix above a threshold, but the fewest requests where load is uneven.

    https://github.com/lightseekorg/smg/blob/main/docs/concepts/routing/cache-aware.md
    """
    loads = known.requests[known.alive]
    if loads.max() - loads.min() > absolute and loads.max() > relative * loads.min():
        return least_loaded(asked, known)
    if best_match(asked, known) > threshold:
        return lowest(-known.overlap, known, asked)
    return least_loaded(asked, known)


def sglang_smallest_tree(
    asked: Asked, known: Known, threshold: float = 0.3, absolute: int = 64, relative: float = 1.5
) -> int:
    """SGLang's cache_aware as it was before: a low match goes to the smallest tree, whatever its load.

    https://github.com/sgl-project/sglang/issues/14305
    """
    loads = known.requests[known.alive]
    if loads.max() - loads.min() > absolute and loads.max() > relative * loads.min():
        return least_loaded(asked, known)
    if best_match(asked, known) > threshold:
        return lowest(-known.overlap, known, asked)
    return lowest(known.cached_pages, known, asked)


def best_match(asked: Asked, known: Known) -> float:
    """The largest share of the prompt's pages that a live replica has."""
    return float(known.overlap[known.alive].max()) / max(asked.pages, 1)


def llm_d(asked: Asked, known: Known, weights: tuple[float, float, float] = (3, 2, 2)) -> int:
    """llm-d's weighted scorers: prefix, queue and utilisation of the KV cache, 3 : 2 : 2.

    Prefix is the share of blocks found, queue is (max - own) / (max - min), utilisation is one less the share in use.
    https://llm-d.ai/docs/dev/guides/precise-prefix-cache-routing
    """
    queued = known.queued[known.alive]
    spread = queued.max() - queued.min()
    queue = (queued.max() - known.queued) / spread if spread else np.ones(len(known.alive))
    scores = weights[0] * known.overlap / max(asked.pages, 1) + weights[1] * queue + weights[2] * (1 - known.used)
    return lowest(-scores, known, asked)


def ray_prefix(asked: Asked, known: Known, imbalanced: float = 10, match_rate: float = 0.1) -> int:
    """Ray Serve's PrefixCacheAffinityRouter: prefix where queues are even, else power of two.

    A match below 10% goes to the replica with the fewest cached blocks.
    https://docs.ray.io/en/latest/serve/llm/prefix-aware-request-router.html
    """
    loads = known.requests[known.alive]
    if loads.max() - loads.min() >= imbalanced:
        return power_of_two(asked, known)
    if best_match(asked, known) >= match_rate:
        return lowest(-known.overlap, known, asked)
    return lowest(known.cached_pages, known, asked)


def aibrix(asked: Asked, known: Known, imbalance: int = 8, factor: float = 2.0) -> int:
    """AIBrix's prefix-cache routing: the longest match that is not overloaded, else the fewest requests.

    A spread of more than 8 running requests switches it off. A match counts where its requests are at most the mean and
    two standard deviations. https://github.com/vllm-project/aibrix/tree/main/pkg/plugins/gateway/algorithms
    """
    loads = known.requests[known.alive]
    if loads.max() - loads.min() <= imbalance:
        fit = (known.overlap > 0) & (known.requests <= loads.mean() + factor * loads.std())
        if (fit & known.alive).any():
            return lowest(-known.overlap, known, asked, among=fit)
    return least_loaded(asked, known)


POLICIES: dict[str, Policy] = {
    "round robin": round_robin,
    "least loaded": least_loaded,
    "power of two": power_of_two,
    "sticky": sticky,
    "Dynamo": dynamo,
    "Dynamo lmetric": dynamo_lmetric,
    "SGLang": sglang_cache_aware,
    "llm-d": llm_d,
    "Ray": ray_prefix,
    "AIBrix": aibrix,
}
# What chooses without regard to what is cached.
BLIND = frozenset({"round robin", "least loaded", "power of two", "sticky"})
