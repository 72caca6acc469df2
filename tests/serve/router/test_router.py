"""The router: follow-ups go where their pages are, unless the work there would take longer than computing them."""

import numpy as np
import pytest

from serve.cost.model import Constants
from serve.router.request import RoutedRequest
from serve.router.router import Router
from serve.router.summary import Increment, Load, Snapshot

COSTS = Constants(fixed=1e-3, linear=1e-4, attention=0.0)


def request(id: str, pages: int, page_size: int = 16, first: int = 0) -> RoutedRequest:
    keys = np.arange(first, first + pages, dtype=np.uint64)
    return RoutedRequest(id, keys, pages * page_size + 1, page_size)


def fleet(count: int) -> Router:
    router = Router()
    for i in range(count):
        router.add(f"r{i}", COSTS, pages=1000, kind=f"r{i}")
    return router


def test_a_follow_up_goes_where_its_pages_are():
    router = fleet(3)
    router.published("r1", Increment(1, np.arange(50, dtype=np.uint64), np.zeros(0, np.uint64)))
    choice = router.route(request("a", 60), 0.0)
    assert (choice.replica, choice.cached) == ("r1", 800)
    assert choice.prefill_s == COSTS.ttft_s(961, 800)


def test_work_in_flight_sends_it_elsewhere():
    router = fleet(2)
    router.published("r1", Increment(1, np.arange(10, dtype=np.uint64), np.zeros(0, np.uint64)))
    long = request("long", 500, first=1000)
    router.sent(long, router.route(long, 0.0, among=["r1"]), 0.0)
    assert router.route(request("a", 20), 0.0).replica == "r0"
    router.first_token("long", 1.0)
    assert router.route(request("b", 20), 1.0).replica == "r1"


def test_a_gap_asks_for_a_snapshot():
    router = fleet(1)
    nothing = np.zeros(0, np.uint64)
    assert router.published("r0", Increment(1, nothing, nothing))
    assert not router.published("r0", Increment(3, nothing, nothing))


def keys(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.uint64)


NOTHING = np.zeros(0, np.uint64)


def send(router: Router, asked: RoutedRequest, now: float, *among: str) -> str:
    choice = router.route(asked, now, among=among or None)
    router.sent(asked, choice, now)
    return choice.replica


def test_siblings_follow_before_anything_is_published():
    router = fleet(8)
    for i in range(20):  # so that the rate of requests is known
        send(router, request(f"w{i}", 100, first=10_000 * (i + 1)), 0.1 * i)
        router.first_token(f"w{i}", 0.1 * i + 0.16)
        router.finished(f"w{i}", 0.1 * i + 0.16)
    first = send(router, request("first", 500), 3.0)
    router.first_token("first", 3.8)
    assert {send(router, request(f"s{i}", 501), 3.8) for i in range(4)} == {first}


def test_what_failed_is_not_expected():
    router = fleet(2)
    name = send(router, request("a", 100), 0.0)
    router.failed("a", 0.1)
    assert router.index.pages[name] == 0
    assert router.route(request("b", 100), 0.2).queue_s == 0


def test_predictions_end_when_later_summaries_do_not_confirm_them():
    router = fleet(1)
    send(router, request("a", 10), 0.0)
    router.first_token("a", 0.1, cached=0)
    router.published("r0", Increment(1, keys(0, 4), NOTHING))
    assert router.route(request("b", 10), 0.2).cached == 160
    router.published("r0", Increment(2, NOTHING, NOTHING))
    assert router.route(request("b", 10), 0.2).cached == 64


def test_a_snapshot_heals_a_gap_and_older_increments_change_nothing_after_it():
    router = fleet(1)
    assert not router.published("r0", Increment(2, keys(5, 5), NOTHING))
    assert router.published("r0", Snapshot(7, keys(0, 8)))
    assert router.published("r0", Increment(6, NOTHING, keys(0, 8)))  # came late
    assert router.published("r0", Increment(8, keys(8, 2), NOTHING))
    assert router.route(request("a", 10), 0.0).cached == 160


def test_a_slow_replica_is_found_out_by_its_first_tokens():
    router = fleet(2)
    for i in range(8):
        for name, factor in (("r0", 5.0), ("r1", 1.0)):
            asked = request(f"{i}{name}", 50, first=100_000 * (i + 1) + 1000 * (name == "r1"))
            send(router, asked, 10.0 * i, name)
            router.first_token(asked.id, 10.0 * i + factor * COSTS.ttft_s(asked.tokens, 0), cached=0)
            router.finished(asked.id, 10.0 * i + 5.0)
    cold = request("cold", 50, first=5)
    assert router.route(cold, 100.0, among=["r0"]).prefill_s == pytest.approx(5 * COSTS.ttft_s(801, 0), rel=0.05)
    assert router.route(cold, 100.0).replica == "r1"


def test_a_replica_that_reuses_less_than_it_holds_is_believed_less():
    router = fleet(1)
    for i in range(40):
        send(router, request(f"{i}", 10), float(i))
        router.first_token(f"{i}", i + 0.1, cached=80)  # five pages, whatever was expected
        router.finished(f"{i}", i + 0.2)
    assert router.route(request("a", 10), 50.0).cached <= 80


def test_the_work_of_other_routers_counts():
    router = fleet(2)
    router.loaded("r0", Load((("theirs", 0, 50_000),), decodes=2), 0.0)
    assert router.route(request("a", 10), 0.0).replica == "r1"
    router.loaded("r0", Load((), decodes=0), 1.0)
    assert router.route(request("a", 10), 1.0, among=["r0"]).queue_s == 0


def test_what_has_ended_here_is_not_anothers_work_when_a_late_report_tells_of_it():
    router = fleet(2)
    asked = request("mine", 100)
    router.sent(asked, router.route(asked, 0.0, among=["r0"]), 0.0)
    router.first_token("mine", 1.0)
    router.finished("mine", 1.1)
    router.loaded("r0", Load((("mine", 0, 6410),), decodes=0), 1.2)
    assert router.route(request("b", 10), 1.3, among=["r0"]).queue_s == 0


def test_a_replica_that_is_gone_takes_its_requests_along():
    router = fleet(2)
    send(router, request("a", 10), 0.0, "r0")
    assert router.remove("r0") == ["a"]
    router.first_token("a", 1.0)
    router.finished("a", 1.0)
    assert router.published("r0", Increment(1, keys(0, 1), NOTHING))
    assert router.route(request("b", 10), 1.0).replica == "r1"


def test_what_a_shared_tier_holds_is_read_where_it_is_not_cached():
    router = Router()
    for name in ("r0", "r1"):
        router.add(name, COSTS, pages=1000, tiers={"disk": COSTS.linear / 10})
    router.published("r0", Increment(1, keys(0, 10), NOTHING))
    choice = router.route(request("a", 10), 0.0, among=["r1"])
    assert (choice.cached, choice.restored) == (0, 160)
    assert choice.restore_s == pytest.approx(160 * COSTS.linear / 10)


def test_what_decodes_lengthens_a_prefill_by_what_its_replica_says():
    router = fleet(2)
    for name in ("r0", "r1"):
        router.measured(name, COSTS, beside_s=COSTS.linear)
        router.published(name, Increment(1, keys(0, 30 if name == "r0" else 0), NOTHING))
    for id in ("long", "answered"):
        asked = request(id, 1, first=500)
        router.sent(asked, router.route(asked, 0.0, among=["r0"]), 0.0)
        router.first_token(id, 1.0)
    router.finished("long", 1e7)  # answers last longer than prefills
    # 30 of 50 pages are cached on r0, where each token left takes twice the time: 0.064 s against 0.08 s.
    choice = router.route(request("a", 50), 1.0)
    assert (choice.replica, choice.prefill_s) == ("r0", pytest.approx(COSTS.fixed + 321 * 2 * COSTS.linear))
    assert router.route(request("b", 70), 1.0).replica == "r1"


def test_equal_replicas_are_measured_together_and_others_start_at_their_speed():
    router = Router()
    for name, kind in (("a", "fast"), ("b", "fast"), ("c", "other")):
        router.add(name, COSTS, pages=10_000, kind=kind)
    for i in range(8):
        asked, now = request(str(i), 40, first=1000 * i), 10.0 * i
        router.sent(asked, router.route(asked, now, among=["a"]), now)
        router.first_token(str(i), now + 3 * COSTS.ttft_s(641, 0))
        router.finished(str(i), now + 5)
    for name in "abc":
        expected = router.route(request("z", 40, first=90_000), 100.0, among=[name]).prefill_s
        assert expected == pytest.approx(3 * COSTS.ttft_s(641, 0), rel=0.05)
