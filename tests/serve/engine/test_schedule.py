"""Whose turn it is: short before long, cached before cold, and nobody for ever behind the others."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from serve.engine.schedule import most_urgent, response_ratio


@dataclass(frozen=True)
class Request:
    """One that came at a time and takes a time, in seconds."""

    came: float
    takes: float


def chosen(requests: list[Request], now: float) -> Request:
    return most_urgent(requests, lambda r: now - r.came, lambda r: r.takes)


def test_a_short_request_passes_a_long_one_that_came_just_before() -> None:
    long, short = Request(0.0, 10.0), Request(0.1, 0.1)
    assert chosen([long, short], 0.2) is short


def test_a_long_request_that_has_waited_passes_a_short_one_that_comes() -> None:
    long, short = Request(0.0, 10.0), Request(100.0, 0.1)
    assert chosen([short, long], 100.1) is long


def test_of_equals_the_first_goes_first() -> None:
    first, second = Request(0.0, 1.0), Request(0.0, 1.0)
    assert chosen([first, second], 5.0) is first


def test_who_takes_no_time_goes_at_once_and_who_takes_for_ever_has_no_claim() -> None:
    assert response_ratio(0.0, 0.0) == float("inf")
    assert response_ratio(5.0, float("inf")) == 1


@given(takes=st.floats(0.001, 60), rival=st.floats(0.001, 60))
def test_nobody_starves_behind_an_endless_stream_of_others(takes: float, rival: float) -> None:
    """A new rival comes whenever the one before is done; the claim of who waits grows, the newcomer's is always 1."""
    patient, now, passed = Request(0.0, takes), 0.0, 0
    while chosen([Request(now, rival), patient], now) is not patient:
        now += rival
        passed += 1
    assert passed <= 1
