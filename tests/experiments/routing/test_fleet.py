"""The simulated replicas and the fleet: times, batches, failures and what is published."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from experiments.routing.fleet import Answered, Change, Fleet, Publishing
from experiments.routing.gateway import FormulaGateway, Gateway, Meters, OurGateway
from experiments.routing.measure import measure
from experiments.routing.replica import Engine
from experiments.routing.workload import Lane, Request, Workload
from serve.cost.model import Constants

COSTS = Constants(fixed=0.01, linear=1e-4, attention=1e-8, match=1e-6)
ENGINE = Engine(COSTS, step_s=0.005, decode_pair_s=1e-8, num_pages=1000, page_size=64)


def by_policy(policy: str, replicas: int, **options: bool) -> Callable[[Meters, int], Gateway]:
    """A maker of gateways with this formula."""
    return lambda meters, number: FormulaGateway(policy, replicas, meters, seed=number, **options)


def ours(meters: Meters, number: int) -> Gateway:
    """A gateway with our router."""
    return OurGateway(64)


def ask(first_page: int, pages: int, output: int = 1, agent: int = 0, pause_s: float = 0.0) -> Request:
    """A request whose prompt is `pages` pages, numbered from `first_page` on, and half a page."""
    return Request(agent, np.arange(first_page, first_page + pages, dtype=np.int32), 64 * pages + 32, output, pause_s)


def play(lanes: list[Lane], engines: int = 1, policy: str = "least loaded", **options: object) -> Fleet:
    """A fleet that has played these lanes."""
    fleet = Fleet([ENGINE] * engines, by_policy(policy, engines), **options)  # type: ignore[arg-type]
    fleet.run(Workload("test", 64, lanes))
    return fleet


def ttft(answered: Answered) -> float:
    """Seconds to the first token."""
    return answered.first_token - answered.sent


def test_a_request_alone_takes_what_the_cost_model_says() -> None:
    fleet = play([Lane(1.0, [ask(0, 100), ask(0, 200)])])
    cold, warm = fleet.answered
    assert ttft(cold) == pytest.approx(COSTS.ttft_s(6432, 0))
    assert warm.sent == cold.finished == cold.first_token
    # The second extends the first: 100 pages are found.
    assert warm.reused == 6400
    assert ttft(warm) == pytest.approx(COSTS.ttft_s(12832, 6400))


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    whole = Request(0, np.arange(10, dtype=np.int32), 640, 1)
    fleet = play([Lane(0.0, [whole, whole])])
    assert [a.reused for a in fleet.answered] == [0, 576]


def test_decoding_takes_a_step_a_token_and_longer_after_a_longer_context() -> None:
    fleet = play([Lane(0.0, [ask(0, 10, output=101)])])
    (one,) = fleet.answered
    pairs = sum(range(673, 773))
    assert one.finished - one.first_token == pytest.approx(100 * ENGINE.step_s + 1e-8 * pairs)


def test_a_prefill_shares_its_steps_in_smaller_chunks_with_those_that_decode() -> None:
    alone = play([Lane(0.0, [ask(0, 10, output=400)])])
    both = play([Lane(0.0, [ask(0, 10, output=400)]), Lane(0.1, [ask(500, 100)])])
    # 6,432 tokens in chunks of 256: 26 steps, each longer by the chunk's tokens than one that only decodes.
    later = both.answered[0].finished - alone.answered[0].finished
    assert later == pytest.approx(26 * (257e-4 - ENGINE.step_s) + 1e-8 * 6432**2 / 2, rel=0.05)


def test_a_short_prompt_passes_a_long_one_after_the_chunk_in_progress() -> None:
    fleet = play([Lane(0.0, [ask(0, 400)]), Lane(0.3, [ask(500, 2)])])
    long, short = fleet.answered
    assert ttft(short) < 0.5 < ttft(long)


def test_replicas_that_share_cores_are_slowed_while_more_of_them_work_than_there_are_cores() -> None:
    costs = Constants(fixed=0.0, linear=1e-4, attention=0.0)

    def times(prompts: list[int], cores: float) -> list[float]:
        lanes = [Lane(0.0, [ask(1000 * i, pages, agent=i)]) for i, pages in enumerate(prompts)]
        engines = [Engine(costs, step_s=0.0, decode_pair_s=0.0, num_pages=1000, page_size=64)] * len(prompts)
        fleet = Fleet(engines, by_policy("round robin", len(prompts)), cores=cores)
        fleet.run(Workload("test", 64, lanes))
        return [ttft(answered) for answered in fleet.answered]

    alone = [1e-4 * (64 * pages + 32) for pages in (100, 100, 200)]
    assert times([100, 100, 200], 3.0) == pytest.approx(alone)
    # Two thirds of a core each, until two are done; then one has a core for itself.
    assert times([100, 100, 200], 2.0) == pytest.approx([1.5 * alone[0]] * 2 + [1.5 * alone[0] + alone[2] - alone[0]])


def test_a_delivery_takes_a_core_too() -> None:
    costs = Constants(fixed=0.5, linear=1e-4, attention=0.0)
    engine = Engine(costs, step_s=0.0, decode_pair_s=0.0, num_pages=1000, page_size=64)
    lanes = [Lane(0.0, [ask(0, 100)]), Lane(0.0, [ask(2000, 200, agent=1)])]
    fleet = Fleet([engine] * 2, by_policy("round robin", 2), cores=1.0)
    fleet.run(Workload("test", 64, lanes))
    first, second = (1e-4 * (64 * pages + 32) for pages in (100, 200))
    short, long = sorted(map(ttft, fleet.answered))
    assert short == pytest.approx(2 * first + 2 * 0.5), "beside the other's prefill all the time"
    assert long == pytest.approx(first + second + 0.5 + 0.5, abs=0.01)


def test_siblings_on_one_replica_compute_their_common_prefix_once() -> None:
    fleet = play([Lane(0.0, [ask(0, 300)]), Lane(0.0, [ask(0, 300)]), Lane(0.0, [ask(0, 300)])])
    assert sum(a.request.tokens - a.reused for a in fleet.answered) < 1.4 * 300 * 64
    assert sum(a.reused for a in fleet.answered) > 1.6 * 300 * 64


def test_more_sequences_than_places_wait() -> None:
    lanes = [Lane(0.0, [ask(1000 * i, 4, output=50)]) for i in range(33)]
    fleet = play(lanes)
    first_tokens = sorted(a.first_token for a in fleet.answered)
    ended = sorted(a.finished for a in fleet.answered)
    assert first_tokens[16] > ended[0]
    assert first_tokens[32] > ended[16]


def test_a_request_that_no_replica_has_room_for_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs 1001 pages, a replica has 1000"):
        play([Lane(0.0, [ask(0, 1000)])])


def test_what_does_not_fit_waits_until_pages_are_free() -> None:
    fleet = play([Lane(0.0, [ask(0, 600, output=50)]), Lane(0.0, [ask(5000, 600, output=50)])])
    early, late = sorted(fleet.answered, key=lambda a: a.first_token)
    assert late.first_token > early.finished - 0.02


def test_a_dead_replicas_requests_are_sent_again_before_their_first_token() -> None:
    lanes = [Lane(0.0, [ask(0, 400), ask(0, 400)]), Lane(0.0, [ask(5000, 1, output=2000), ask(5000, 1)])]
    fleet = play(lanes, engines=2, changes=[Change(0.5, 0)])
    retried = [a for a in fleet.answered if a.retries]
    assert all(a.replica == 1 for a in fleet.answered if a.sent > 0.5)
    assert len(retried) + sum(a.broken_off for a in fleet.answered) == 1
    assert all(a.finished >= a.sent for a in fleet.answered)
    assert len(fleet.answered) == 4


def test_an_answer_that_had_begun_is_broken_off_and_its_agent_goes_on() -> None:
    lanes = [Lane(0.0, [ask(0, 1, output=2000), ask(0, 2)])]
    fleet = play(lanes, engines=2, changes=[Change(0.5, 0)], policy="round robin")
    first, second = fleet.answered
    assert first.broken_off
    assert first.finished == second.sent == 0.5
    assert second.replica == 1
    assert second.reused == 0


def test_a_replica_that_comes_takes_requests() -> None:
    lanes = [Lane(0.1 * i, [ask(1000 * i, 10, output=200)]) for i in range(30)]
    fleet = play(lanes, engines=2, changes=[Change(1.0, 1, comes=True)])
    assert {a.replica for a in fleet.answered if a.sent < 1.0} == {0}
    assert {a.replica for a in fleet.answered if a.sent > 1.0} == {0, 1}


def test_the_shared_store_brings_what_another_replica_computed() -> None:
    engine = replace(ENGINE, restore_s=1e-5)
    lanes = [Lane(0.0, [ask(0, 300), ask(0, 310)])]
    fleet = Fleet([engine] * 2, by_policy("round robin", 2), shared_store=True)
    fleet.run(Workload("test", 64, lanes))
    second = fleet.answered[1]
    assert second.replica == 1
    assert second.restored == 300 * 64
    assert ttft(second) == pytest.approx(COSTS.ttft_s(310 * 64 + 32, 300 * 64) + 1e-5 * 300 * 64)


def test_a_slow_store_is_not_read() -> None:
    engine = replace(ENGINE, restore_s=1e-2)
    fleet = Fleet([engine] * 2, by_policy("round robin", 2), shared_store=True)
    fleet.run(Workload("test", 64, [Lane(0.0, [ask(0, 300), ask(0, 310)])]))
    assert fleet.answered[1].restored == 0


@pytest.mark.parametrize("make", [by_policy("SGLang", 2, predict=False), ours])
@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_gateways_learn_what_replicas_hold_although_summaries_get_lost(
    make: Callable[[Meters, int], Gateway], loss: float
) -> None:
    engine = replace(ENGINE, num_pages=60)
    lanes = [Lane(0.5 * i, [ask(20 * (i % 9), 20)]) for i in range(60)]
    fleet = Fleet([engine] * 2, make, gateways=2, publishing=Publishing(loss=loss), seed=3)
    fleet.run(Workload("test", 64, lanes))
    fleet.publishing = Publishing()
    fleet.run(Workload("test", 64, [Lane(50.0 + i, [ask(20 * i, 20)]) for i in range(9)]))
    while fleet.events:
        now, _, act = heapq.heappop(fleet.events)
        act(now)
    held = [replica.cache.ledger.held for replica in fleet.replicas.values()]
    for router in fleet.routers:
        if isinstance(router, FormulaGateway):
            for number, pages in enumerate(held):
                assert {p for p, bits in router.index.holders.items() if bits >> number & 1} == pages


def test_the_same_seed_gives_the_same_run() -> None:
    lanes = [Lane(0.05 * i, [ask(1000 * (i % 5), 30, output=30, agent=i)]) for i in range(60)]
    runs = [measure(play(lanes, engines=4, policy="power of two", seed=2)) for _ in range(2)]
    assert runs[0] == runs[1]
