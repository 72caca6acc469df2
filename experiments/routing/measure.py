"""What a simulated run came to: hits, times to the first token, balance, and what the routers had to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cache.pool import PoolExhausted
from experiments.routing.cache import ReplicaCache, infinite_hits
from experiments.routing.fleet import Answered, Fleet


@dataclass(frozen=True)
class Measured:
    """A run's figures."""

    requests: int
    hit_rate: float  # the share of all prompt tokens that were not computed
    restored: float  # the share that came from the shared store
    moved: float  # the share that another replica held, and the chosen one did not; 0 for routers without an index
    ttft_p50: float  # seconds, as the next four
    ttft_p90: float
    ttft_p99: float
    ttft_mean: float
    span_s: float
    imbalance: float  # the busiest replica's seconds over the mean's
    busy: float  # the mean share of time in which a replica ran a step
    retried: int
    broken_off: int
    index_pages: int  # entries of all gateways' indexes at the end
    published_bytes: int  # 8 for each page that a summary names

    def as_json(self) -> dict[str, float]:
        """The figures, rounded."""
        return {name: round(value, 5) for name, value in asdict(self).items()}


def measure(fleet: Fleet, since_s: float = 0.0) -> Measured:
    """The figures of a fleet's run, of requests that were sent `since_s` seconds into it or later."""
    answered = [a for a in fleet.answered if a.sent >= since_s]
    ttft = np.array([a.first_token - a.sent for a in answered])
    ttft = ttft[~np.isnan(ttft)]
    tokens = sum(a.request.tokens for a in answered)
    span = max(a.finished for a in answered) - min(a.sent for a in answered)
    busy = np.array([replica.busy_s for replica in fleet.replicas.values()])
    p50, p90, p99 = np.percentile(ttft, [50, 90, 99])
    return Measured(
        requests=len(answered),
        hit_rate=sum(a.reused for a in answered) / tokens,
        restored=sum(a.restored for a in answered) / tokens,
        moved=sum(router.moved for router in fleet.routers) / sum(a.request.tokens for a in fleet.answered),
        ttft_p50=float(p50),
        ttft_p90=float(p90),
        ttft_p99=float(p99),
        ttft_mean=float(ttft.mean()),
        span_s=float(span),
        imbalance=float(busy.max() / max(busy.mean(), 1e-12)),
        busy=float(busy.mean() / span),
        retried=sum(a.retries for a in answered),
        broken_off=sum(a.broken_off for a in answered),
        index_pages=sum(router.pages_known() for router in fleet.routers),
        published_bytes=8 * fleet.published_pages,
    )


def bounds(answered: Sequence[Answered], page_size: int, big_pages: int) -> dict[str, float]:
    """The hit rates of one cache without a limit, and of one replica with `big_pages` pages, for these requests.

    They come one after another in the order of sending, each when the one before is cached.
    """
    requests = [a.request for a in answered]
    tokens = sum(request.tokens for request in requests)
    most = [(request.tokens - 1) // page_size for request in requests]
    infinite = infinite_hits((request.pages, count) for request, count in zip(requests, most, strict=True))
    cache, found = ReplicaCache(big_pages), 0
    for request, count in zip(requests, most, strict=True):
        lease = cache.match(request.pages[:count])
        found += lease.reused
        try:
            lease, _ = cache.extend(lease, len(request.pages))
        except PoolExhausted:
            cache.release(lease)
            continue
        cache.insert(lease, request.pages)
        cache.release(lease)
    return {
        "infinite": round(float(infinite.sum()) * page_size / tokens, 5),
        "one big replica": round(found * page_size / tokens, 5),
    }
