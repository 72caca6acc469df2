"""Each published formula on a case computed by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from experiments.routing import policies
from experiments.routing.policies import Asked, Known

ASKED = Asked(agent=7, tokens=640, pages=10, number=0, draws=(0.0, 0.0))


def known(**given: object) -> Known:
    """Three replicas that are idle and empty, but for what is given."""
    size = len(next(iter(given.values()))) if given else 3  # type: ignore[arg-type]
    plain = {
        "alive": np.ones(size, bool),
        "overlap": np.zeros(size, np.int64),
        "requests": np.zeros(size, np.int64),
        "prefill_pages": np.zeros(size),
        "active_pages": np.zeros(size, np.int64),
        "queued": np.zeros(size, np.int64),
        "used": np.zeros(size),
        "cached_pages": np.zeros(size, np.int64),
    }
    return Known(**plain | {name: np.array(value) for name, value in given.items()})  # type: ignore[arg-type]


def test_round_robin_takes_the_live_replicas_in_turns() -> None:
    fleet = known(alive=[True, False, True])
    numbers = [policies.round_robin(dataclasses.replace(ASKED, number=i), fleet) for i in range(4)]
    assert numbers == [0, 2, 0, 2]


def test_least_loaded_takes_the_fewest_requests() -> None:
    assert policies.least_loaded(ASKED, known(requests=[3, 1, 2])) == 1
    assert policies.least_loaded(ASKED, known(requests=[3, 1, 2], alive=[True, False, True])) == 2


@pytest.mark.parametrize(("draws", "chosen"), [((0.0, 0.0), 1), ((0.4, 0.9), 1), ((0.9, 0.0), 0)])
def test_power_of_two_takes_the_better_of_two_different_ones(draws: tuple[float, float], chosen: int) -> None:
    # Drawn are 0 and 1, 1 and 0, 2 and 0.
    asked = dataclasses.replace(ASKED, draws=draws)
    assert policies.power_of_two(asked, known(requests=[3, 1, 9])) == chosen


def test_sticky_keeps_an_agent_and_moves_only_those_of_a_replica_that_died() -> None:
    fleet = known(requests=[0] * 8)
    homes = [policies.sticky(dataclasses.replace(ASKED, agent=agent), fleet) for agent in range(400)]
    assert min(np.bincount(homes, minlength=8)) > 25
    without = known(alive=[number != 3 for number in range(8)])
    moved = [policies.sticky(dataclasses.replace(ASKED, agent=agent), without) for agent in range(400)]
    assert all(now == home for now, home in zip(moved, homes, strict=True) if home != 3)
    assert 3 not in moved


def test_dynamo_adds_adjusted_prefill_and_decode_blocks() -> None:
    # 8 + 10 - 2 + 20 + 10 = 46; 5 + 10 - 5 + 15 + 10 = 35; 2 + 10 - 8 + 22 + 10 = 36
    fleet = known(overlap=[2, 5, 8], prefill_pages=[8, 5, 2], active_pages=[20, 15, 22])
    assert policies.dynamo(ASKED, fleet) == 1
    # With prefill counted five times: 110, 75, 52.
    assert policies.dynamo(ASKED, fleet, prefill_load_scale=5) == 2
    # Prefill is never negative: 0 + 35, and 1 + 33.
    assert policies.dynamo(ASKED, known(overlap=[10, 9], active_pages=[25, 23])) == 1


def test_dynamo_lmetric_multiplies_them() -> None:
    # 16 * 31 = 496; 10 * 26 = 260; 4 * 33 = 132
    fleet = known(overlap=[2, 5, 8], prefill_pages=[8, 5, 2], active_pages=[20, 15, 22])
    assert policies.dynamo_lmetric(ASKED, fleet) == 2


def test_sglang_follows_a_match_above_30_percent_until_load_is_uneven() -> None:
    assert policies.sglang_cache_aware(ASKED, known(overlap=[0, 4, 2], requests=[0, 60, 0])) == 1
    # 30% is not above 30%.
    assert policies.sglang_cache_aware(ASKED, known(overlap=[0, 3, 2], requests=[1, 60, 0])) == 2
    # 66 - 1 > 64, and 66 > 1.5 * 1.
    assert policies.sglang_cache_aware(ASKED, known(overlap=[0, 10, 0], requests=[2, 66, 1])) == 2
    # 200 - 140 is not above 64.
    assert policies.sglang_cache_aware(ASKED, known(overlap=[0, 10, 0], requests=[140, 200, 150])) == 1
    # 300 - 230 is above 64, 300 is not above 1.5 * 230.
    assert policies.sglang_cache_aware(ASKED, known(overlap=[0, 10, 0], requests=[230, 300, 250])) == 1


def test_sglangs_earlier_form_sends_what_matches_little_to_the_smallest_tree() -> None:
    fleet = known(overlap=[3, 0, 0], requests=[0, 60, 0], cached_pages=[90, 10, 50])
    assert policies.sglang_smallest_tree(ASKED, fleet) == 1
    assert policies.sglang_smallest_tree(ASKED, dataclasses.replace(fleet, overlap=np.array([4, 0, 0]))) == 0


def test_llm_d_weighs_prefix_queue_and_utilisation() -> None:
    # 3 * 0.8 + 2 * 0 + 2 * 0.1 = 2.6; 3 * 0 + 2 * 1 + 2 * 0.9 = 3.8; 3 * 0.5 + 2 * 0.5 + 2 * 0.6 = 3.7
    fleet = known(overlap=[8, 0, 5], queued=[4, 0, 2], used=[0.9, 0.1, 0.4])
    assert policies.llm_d(ASKED, fleet) == 1
    # Queues that are equal score 1 everywhere: 4.6, 3.8, 4.7.
    assert policies.llm_d(ASKED, dataclasses.replace(fleet, queued=np.array([4, 4, 4]))) == 2


def test_ray_follows_a_match_from_10_percent_on_while_queues_differ_by_less_than_10() -> None:
    assert policies.ray_prefix(ASKED, known(overlap=[0, 1, 0], requests=[0, 9, 0])) == 1
    assert policies.ray_prefix(ASKED, known(overlap=[0, 0, 0], requests=[0, 9, 0], cached_pages=[5, 1, 3])) == 1
    # The queues differ by 10: the better of replicas 0 and 1.
    assert policies.ray_prefix(ASKED, known(overlap=[0, 10, 0], requests=[0, 10, 0])) == 0


def test_aibrix_takes_the_longest_match_that_is_not_overloaded() -> None:
    assert policies.aibrix(ASKED, known(overlap=[1, 6, 0], requests=[0, 8, 0])) == 1
    # A spread of 9 is above 8.
    assert policies.aibrix(ASKED, known(overlap=[1, 6, 0], requests=[1, 9, 0])) == 2
    # Of seven, six with 0 and one with 8: mean 8/7, deviation 2.8, so 8 is above 1.14 + 2 * 2.8 = 6.74.
    assert policies.aibrix(ASKED, known(overlap=[6, 3, 0, 0, 0, 0, 0], requests=[8, 0, 0, 0, 0, 0, 0])) == 1
    assert policies.aibrix(ASKED, known(overlap=[0, 0, 0], requests=[1, 2, 0])) == 2


def test_of_equals_the_fewest_requests_decide_and_then_the_draw() -> None:
    fleet = known(overlap=[5, 5, 5, 2], requests=[3, 1, 1, 0])
    asked = dataclasses.replace(ASKED, draws=(0.7, 0.0))
    assert policies.sglang_cache_aware(ASKED, fleet) == 1
    assert policies.sglang_cache_aware(asked, fleet) == 2


@pytest.mark.parametrize("policy", policies.POLICIES.values())
def test_no_policy_chooses_a_replica_that_is_dead(policy: policies.Policy) -> None:
    fleet = known(alive=[False, True, False], overlap=[10, 0, 10], requests=[0, 5, 0])
    assert policy(ASKED, fleet) == 1
