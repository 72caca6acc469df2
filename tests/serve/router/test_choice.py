"""The choice, against cases computed by hand."""

from dataclasses import replace

import numpy as np
import pytest

from serve.router.choice import Known, Tier, choose
from serve.router.request import RoutedRequest

PAGE = 100
LINEAR = 1e-3  # a second for a thousand tokens


def known(replicas: int = 2, queue: int = 3) -> Known:
    """Idle replicas a, b, ... that compute a thousand tokens in a second."""
    row, cell = np.zeros(replicas), np.zeros((replicas, queue))
    return Known(
        names=tuple("abcdefgh"[:replicas]),
        fixed=row,
        linear=np.full(replicas, LINEAR),
        attention=row,
        match=row,
        left=cell,
        waited=cell,
        page=np.full(cell.shape, -1),
        key=cell.astype(np.uint64),
        overtakes=np.ones(replicas, bool),
        late_s=row,
        place_s=row,
        arrivals=0.0,
        busy=0.0,
        decodes=np.zeros(replicas, np.int64),
        held=np.zeros(replicas, np.int64),
        room=np.full(replicas, 10**6),
        regret=0.0,
        reuse=np.ones(replicas),
    )


def ask(pages: int = 10) -> RoutedRequest:
    """A prompt of so many pages and nothing more, so that its last token is computed."""
    return RoutedRequest("r", np.arange(1, pages + 1, dtype=np.uint64), pages * PAGE, PAGE)


def at(replicas: int, *values: tuple[int, int, float]) -> np.ndarray:
    """Values (replica, place, value) in a queue."""
    made = np.zeros((replicas, 3))
    for row, column, value in values:
        made[row, column] = value
    return made


def test_idle_replicas_differ_by_what_they_have_cached():
    choice = choose(ask(), known(), np.array([2, 7]))
    assert (choice.replica, choice.cached) == ("b", 700)
    assert choice.expected_ttft_s == pytest.approx(0.3)


def test_work_ahead_outweighs_a_hit_when_it_takes_longer():
    # Each has waited long enough to run first: 0.5 s on b, where 0.6 s are saved, then 0.7 s.
    for ahead, expected in ((0.5, "b"), (0.7, "a")):
        state = replace(known(), left=at(2, (1, 0, ahead)), waited=at(2, (1, 0, 100.0)))
        assert choose(ask(), state, np.array([2, 8])).replica == expected


def test_tokens_in_flight_count_and_not_requests():
    # Two short prefills on a, one long one on b.
    left = at(2, (0, 0, 0.1), (0, 1, 0.1), (1, 0, 30.0))
    state = replace(known(), left=left, overtakes=np.zeros(2, bool))
    choice = choose(ask(), state, np.array([0, 0]))
    assert (choice.replica, choice.queue_s) == ("a", pytest.approx(0.2))


def test_a_short_prefill_passes_a_long_one_when_its_ratio_is_higher():
    # 0.1 s of work passes 10.1 s that have waited 20 s when t / 0.1 = (20 + t) / 10.1, after 0.2 s.
    state = replace(known(1), left=at(1, (0, 0, 10.1)), waited=at(1, (0, 0, 20.0)))
    choice = choose(ask(), state, np.array([9]))
    assert choice.queue_s == pytest.approx(0.2)
    # What it does to the other is a delay by its own 0.1 s.
    assert choice.others_s == pytest.approx(0.1)
    fifo = choose(ask(), replace(state, overtakes=np.zeros(1, bool)), np.array([9]))
    assert fifo.queue_s == pytest.approx(10.1)


def test_a_request_waits_for_the_prefill_that_computes_its_own_pages():
    computing = replace(known(1), left=at(1, (0, 0, 10.1)), page=np.array([[4, -1, -1]]))
    same = replace(computing, key=np.array([[5, 0, 0]], np.uint64))  # the key of page 4
    other = replace(computing, key=np.array([[77, 0, 0]], np.uint64))
    assert choose(ask(), same, np.array([9])).queue_s == pytest.approx(10.1)
    assert choose(ask(), other, np.array([9])).queue_s == 0


def test_siblings_follow_the_first_one_where_later_requests_would_pay_for_a_copy():
    # Both replicas are idle but for the first sibling's 1 s on a; computing it again on b takes as long as waiting.
    state = replace(
        known(), left=at(2, (0, 0, 1.0)), page=np.array([[0, -1, -1], [-1, -1, -1]]), arrivals=1.0, busy=0.5
    )
    state = replace(state, key=np.array([[1, 0, 0], [0, 0, 0]], np.uint64))
    choice = choose(ask(), state, np.array([9, 0]))
    assert choice.replica == "a"
    # arrivals * x (v + x / 2) / (1 - busy) with x = 0.1 and v = 1
    assert choice.others_s == pytest.approx(0.1 * 1.05 / 0.5)


def test_a_request_without_siblings_does_not_wait_for_the_sake_of_later_ones():
    # 2 s of other work before 0.1 s on a, and 1 s on b; ten requests a second come to each.
    queued = replace(known(2), left=at(2, (0, 0, 2.0)), overtakes=np.zeros(2, bool), arrivals=10.0, busy=0.5)
    assert choose(ask(), queued, np.array([9, 0])).replica == "b"


def test_a_tier_is_read_where_that_is_sooner_than_computing():
    tier = Tier(np.array([8, 8]), np.array([np.inf, LINEAR / 4]))
    choice = choose(ask(), known(), np.array([2, 2]), (tier,))
    assert (choice.replica, choice.cached, choice.restored) == ("b", 200, 600)
    assert choice.restore_s == pytest.approx(0.15)
    assert choice.prefill_s == pytest.approx(0.2)
    slow = Tier(tier.depth, np.full(2, LINEAR * 4))
    assert choose(ask(), known(), np.array([2, 2]), (slow,)).restored == 0


def test_pages_that_would_be_asked_for_again_are_not_evicted_for_nothing():
    state = replace(known(), room=np.array([0, 100]), regret=0.5)
    choice = choose(ask(), state, np.array([1, 0]))
    # 9 pages out, half of them computed again in 0.1 s each: 0.45 s more than the 0.1 s saved.
    assert choice.replica == "b"
    assert choose(ask(), replace(state, regret=0.0), np.array([1, 0])).replica == "a"


def test_equal_ones_are_told_apart_by_agent_then_load_then_name():
    state = replace(known(3), decodes=np.array([1, 0, 0]))
    nothing = np.zeros(3, np.int64)
    assert choose(ask(), state, nothing, preferred="c").replica == "c"
    assert choose(ask(), state, nothing).replica == "b"
    assert choose(ask(), known(3), nothing).replica == "a"
    # A difference below the fixed time of a request is none.
    state = replace(known(3), fixed=np.full(3, 0.5))
    assert choose(ask(), state, np.array([0, 0, 4]), preferred="a").replica == "a"
    assert choose(ask(), state, np.array([0, 0, 6]), preferred="a").replica == "c"
    # What is too short to matter is read where most of it is; a common first page keeps nobody together.
    state = replace(known(3), fixed=np.full(3, 1.0), held=np.array([1, 0, 9]))
    assert choose(ask(), state, np.array([0, 0, 5])).replica == "c"
    assert choose(ask(), state, np.array([0, 0, 1])).replica == "b"


def test_without_a_replica_the_error_says_so():
    with pytest.raises(ValueError, match="no replica to choose from"):
        choose(ask(), known(2), np.zeros(2, np.int64), among=np.zeros(2, bool))
