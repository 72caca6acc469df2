"""The router: follow-ups go where their pages are, unless the work there would take longer than computing them."""

import numpy as np

from serve.cost.model import Constants
from serve.router.request import RoutedRequest
from serve.router.router import Router
from serve.router.summary import Increment

COSTS = Constants(fixed=1e-3, linear=1e-4, attention=0.0)


def request(id: str, pages: int, page_size: int = 16, first: int = 0) -> RoutedRequest:
    keys = np.arange(first, first + pages, dtype=np.uint64)
    return RoutedRequest(id, keys, pages * page_size + 1, page_size)


def fleet(count: int) -> Router:
    router = Router()
    for i in range(count):
        router.add(f"r{i}", COSTS, pages=1000)
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
