"""The choice of a replica: the lowest expected time to the first token, and what it costs others, all in seconds.

    wait      until the prefills before it are done, a place is free, and late work has come
    restore   bringing pages that a tier holds, where that is sooner than computing them
    prefill   computing the rest beside the sequences that decode there
    others    the seconds by which this work delays the requests there, and those that will come

Pure: everything that the choice depends on is in `Known`, one row for each replica.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from serve.router.request import RoutedRequest


@dataclass(frozen=True, eq=False)
class Tier:
    """What a tier below the device holds of a prompt, for each replica that reaches it."""

    depth: np.ndarray  # [replicas] int64, pages from the first one on
    token_s: np.ndarray  # [replicas] float64, seconds to read a token's part of a page; infinite where out of reach


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of the replicas at one time; each array has a row for each of `names`."""

    names: tuple[str, ...]
    fixed: np.ndarray  # [replicas] float64, as in serve.cost.model.Constants
    linear: np.ndarray  # [replicas] float64, as in Constants, beside the sequences that decode there now
    attention: np.ndarray  # [replicas] float64, as in Constants
    match: np.ndarray  # [replicas] float64, as in Constants
    left: np.ndarray  # [replicas, queue] float64, seconds that each prefill in flight takes still; 0 for none
    waited: np.ndarray  # [replicas, queue] float64, seconds since each was sent
    page: np.ndarray  # [replicas, queue] int64, the number of the first page that each computes
    key: np.ndarray  # [replicas, queue] uint64, of that page
    overtakes: np.ndarray  # [replicas] bool, whether a short prefill passes a long one there
    late_s: np.ndarray  # [replicas] float64, seconds by which the work there is overdue
    place_s: np.ndarray  # [replicas] float64, seconds until a place among the running requests is free
    arrivals: float  # requests a second to each replica, of late
    busy: float  # the share of time that prefills take, of late; below 1
    decodes: np.ndarray  # [replicas] int64, requests that are being answered
    held: np.ndarray  # [replicas] int64, pages cached
    room: np.ndarray  # [replicas] int64, pages that can be added before one is evicted
    regret: float  # the share of evicted pages that are asked for again
    reuse: np.ndarray  # [replicas] float64, the share of the pages cached there that requests do reuse


@dataclass(frozen=True)
class Choice:
    """A replica, and what a request's first token is expected to take there, in seconds."""

    replica: str
    cached: int  # tokens expected in its cache
    restored: int  # tokens after these that a tier brings
    queue_s: float  # until the work before it is done
    restore_s: float  # to bring pages from a tier
    prefill_s: float  # to compute the rest
    others_s: float  # what it costs other requests
    most_cached: int  # tokens expected in the cache of the replica that has most
    # [replicas] float64, seconds to the first token on each of Known's names
    everywhere_s: np.ndarray = field(compare=False, repr=False)

    @property
    def expected_ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.queue_s + self.restore_s + self.prefill_s


def choose(
    request: RoutedRequest,
    known: Known,
    overlap: np.ndarray,  # [replicas] int64, pages of the request that each replica has cached and will reuse
    tiers: tuple[Tier, ...] = (),
    preferred: str | None = None,
    among: np.ndarray | None = None,  # [replicas] bool, those that may be chosen
) -> Choice:
    """The replica with the lowest sum of expected TTFT and cost to others.

    Replicas whose sums differ by less than the fixed time of a request are equal. Of equals, the first of: `preferred`
    (where the request's agent was last), the least wait, the fewest answers, the least work, half of the prompt or
    more, the fewest pages, the first name. One that reuses less than half of what the best one does comes last: what is
    computed there has to be computed again. Raises ValueError if there is no replica.
    """
    allowed = np.ones(len(known.names), bool) if among is None else among
    if not allowed.any():
        raise ValueError("no replica to choose from: add one, or wait until one is back")
    # The last token of a prompt is always computed.
    cached = np.minimum(overlap * request.page_size, request.tokens - 1)
    restored, restore_s, compute_s = brought(request, known, cached, tiers)
    awaited = computes_for(request, known, overlap)
    wait_s, overtaken = waits(known, compute_s, awaited)
    prefill_s = known.fixed + known.match * (cached + restored) + compute_s
    others_s = compute_s * overtaken + evicted_s(request, known, overlap)
    if awaited.any():  # one of siblings, of which more will come; other requests go where nobody is in their way
        others_s += delay_of_later_requests(known, compute_s)
    everywhere_s = wait_s + restore_s + prefill_s
    total = np.where(allowed, everywhere_s + others_s, np.inf)
    lowest = int(total.argmin())
    equal = np.flatnonzero(total <= total[lowest] + known.fixed[lowest])
    work_s = known.left.sum(1)
    wasteful = known.reuse < known.reuse.max() / 2
    best = min(
        equal.tolist(),
        key=lambda i: (
            wasteful[i],
            known.names[i] != preferred,
            wait_s[i],
            known.decodes[i],
            work_s[i],
            2 * cached[i] < request.tokens,
            known.held[i],
            known.names[i],
        ),
    )
    return Choice(
        replica=known.names[best],
        cached=int(cached[best]),
        restored=int(restored[best]),
        queue_s=float(wait_s[best]),
        restore_s=float(restore_s[best]),
        prefill_s=float(prefill_s[best]),
        others_s=float(others_s[best]),
        most_cached=int(cached[allowed].max()),
        everywhere_s=everywhere_s,
    )


def brought(
    request: RoutedRequest, known: Known, cached: np.ndarray, tiers: tuple[Tier, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens read from a tier, seconds to read these, and seconds to compute the rest; each [replicas].

    A token's page is read where that is sooner than computing it, which is from some position on: a later token costs
    more to compute. Of several tiers, each replica takes the one with which it is done first.
    """
    start, stop = cached.astype(np.float64), float(request.tokens)
    restored, read_s = np.zeros(len(cached), np.int64), np.zeros(len(cached))
    compute_s = computing_s(known, start, np.full(len(cached), stop))
    for tier in tiers:
        end = np.clip(tier.depth * request.page_size, start, stop - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            crossover = (tier.token_s - known.linear) / known.attention
        begin = np.clip(np.where(np.isnan(crossover), np.inf, crossover), start, end)
        tokens = end - begin
        reading = np.where(tokens > 0, tokens * np.where(tokens > 0, tier.token_s, 0.0), 0.0)
        computing = computing_s(known, start, begin) + computing_s(known, end, np.full(len(cached), stop))
        sooner = reading + computing < read_s + compute_s
        restored = np.where(sooner, tokens.astype(np.int64), restored)
        read_s, compute_s = np.where(sooner, reading, read_s), np.where(sooner, computing, compute_s)
    return restored, read_s, compute_s


def computing_s(known: Known, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Seconds to compute tokens [start, stop) on each replica beside what decodes there, [replicas] float64."""
    seconds: np.ndarray = known.linear * (stop - start) + known.attention * (stop**2 - start**2) / 2
    return seconds


def waits(known: Known, compute_s: np.ndarray, awaited: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seconds until a request of `compute_s` runs, and how many prefills it overtakes; both [replicas] float64.

    Where short prefills overtake, the highest response ratio runs next, (waited + left) / left. The request passes a
    prefill at the time t with t / compute_s = (waited + t) / left. It runs at the first time at which all prefills that
    it has not passed are done. One that computes its own pages (`awaited`, [replicas, queue] bool) is never passed: the
    request waits for these.
    """
    others_s = known.overtakes.astype(np.float64)
    own = compute_s[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        passed_at = np.where(known.left > own, known.waited * own / (known.left - own), np.inf)
    passed_at = np.where(known.overtakes[:, None] & ~awaited, passed_at, np.inf)
    passed_at = np.where(known.left > 0, passed_at, 0.0)
    order = np.argsort(passed_at, axis=1)
    passed_at, left = np.take_along_axis(passed_at, order, 1), np.take_along_axis(known.left, order, 1)
    nothing = np.zeros((len(left), 1))
    # At time passed_at[k - 1] the first k are passed; the others take rest[k].
    rest = np.concatenate([np.cumsum(left[:, ::-1], axis=1)[:, ::-1], nothing], axis=1)
    runs_at = np.maximum(np.concatenate([nothing, passed_at], axis=1), rest)
    first = runs_at.min(1)
    overtaken = ((left > 0) & (passed_at <= first[:, None])).sum(1) * others_s
    return first + known.late_s + known.place_s, overtaken


def computes_for(request: RoutedRequest, known: Known, overlap: np.ndarray) -> np.ndarray:
    """Which prefills in flight compute pages that the request counts on, [replicas, queue] bool."""
    if not len(request.keys):
        return np.zeros(known.page.shape, bool)
    within = (known.page >= 0) & (known.page < overlap[:, None])
    computed: np.ndarray = within & (request.keys[np.where(within, known.page, 0)] == known.key)
    return computed


def delay_of_later_requests(known: Known, compute_s: np.ndarray) -> np.ndarray:
    """Seconds by which work of `compute_s` delays the requests that come while it or the work before it lasts.

    [replicas] float64. In a queue with arrivals at rate l that are served for the share b of time, work x behind work v
    delays others by l x (v + x / 2) / (1 - b) in all (Haviv and Ritov, "Externalities, tangible externalities, and
    queue disciplines", 1998, https://doi.org/10.1287/mnsc.44.6.850).
    """
    before = known.left.sum(1)
    seconds: np.ndarray = known.arrivals * compute_s * (before + compute_s / 2) / (1 - known.busy)
    return seconds


def evicted_s(request: RoutedRequest, known: Known, overlap: np.ndarray) -> np.ndarray:
    """Seconds that it takes to compute again what a request's new pages evict, [replicas] float64.

    A page is taken to cost what one of this prompt does, and to be asked for again as often as evicted pages were.
    """
    evicted = np.maximum(0, len(request.keys) - overlap - np.maximum(0, known.room))
    nothing, whole = np.zeros(len(overlap)), np.full(len(overlap), float(request.tokens))
    page_s = computing_s(known, nothing, whole) / max(1, len(request.keys))
    seconds: np.ndarray = known.regret * evicted * page_s
    return seconds
