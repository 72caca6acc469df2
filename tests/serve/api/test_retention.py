"""What a body asks of the cache, as it is read beside the request."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.api.retention import HEAD, LAST, MOST_ASKED, Asked, Wishes, wishes

EPHEMERAL = {"type": "ephemeral"}


def of(**fields: Any) -> Wishes:
    return wishes(msgspec.json.encode(fields))


def block(**more: Any) -> dict[str, Any]:
    return {"type": "text", "text": "words"} | more


def test_markers_are_known_by_their_place_and_time() -> None:
    found = of(
        tools=[{"name": "a"}, {"name": "b", "cache_control": EPHEMERAL}],
        system=[block(cache_control=EPHEMERAL | {"ttl": "1h"})],
        messages=[
            {"role": "user", "content": [block(), block(cache_control=EPHEMERAL)]},
            {"role": "assistant", "content": "none"},
            {"role": "user", "content": [block(cache_control=EPHEMERAL | {"ttl": "5m"})]},
        ],
    )
    assert found.asked == (
        Asked("tools[1].cache_control", HEAD, 300, "5m"),
        Asked("system[0].cache_control", HEAD, 3600, "1h"),
        Asked("messages[0].content[1].cache_control", 3, 300, "5m"),
        Asked("messages[2].content[0].cache_control", LAST, 300, "5m"),
    )


def test_of_two_markers_in_one_place_the_later_counts() -> None:
    found = of(system=[block(cache_control=EPHEMERAL), block(cache_control=EPHEMERAL)])
    assert [each.field for each in found.asked] == ["system[1].cache_control"]


def test_of_many_markers_the_last_count_and_that_is_told() -> None:
    messages = [{"role": "user", "content": [block(cache_control=EPHEMERAL)]}] * 9
    first, *others = of(messages=messages).asked
    assert first.instead == "5 markers before it are left out: the last 4 count"
    assert [each.place for each in (first, *others)] == list(range(MOST_ASKED, 0, -1))


@pytest.mark.parametrize(
    ("ttl", "seconds"),
    [("1s", 1), ("90s", 90), ("5m", 300), ("1h", 3600), ("24h", 86_400), ("1d", 86_400)],
)
def test_times_are_read_as_they_are_written(ttl: str, seconds: float) -> None:
    (asked,) = of(cache_control={"ttl": ttl}).asked
    assert (asked.place, asked.seconds, asked.ttl, asked.instead) == (LAST, seconds, ttl, "")


@pytest.mark.parametrize("ttl", ["", "5", "0s", "2d", "99999999999h", "-5m", 300, {}, [], True, "5 minutes", "１h"])
def test_a_time_that_cannot_be_kept_is_replaced_and_told(ttl: Any) -> None:
    (asked,) = of(cache_control={"ttl": ttl}).asked
    assert asked.seconds in (300, 86_400)
    assert "kept for" in asked.instead


@pytest.mark.parametrize(
    ("fields", "background"),
    [
        ({"nvext": {"agent_hints": {"priority": 5}}}, False),
        ({"nvext": {"agent_hints": {"priority": -0.5}}, "service_tier": "auto"}, True),
        ({"nvext": {"agent_hints": {"priority": "high"}}}, None),
        ({"nvext": {"agent_hints": []}}, None),
        ({"nvext": 3}, None),
        ({"service_tier": "flex"}, True),
        ({"service_tier": "standard_only"}, None),
    ],
)
def test_what_is_urgent_is_read_from_hints_and_tiers(fields: dict[str, Any], background: bool | None) -> None:
    assert of(**fields).background is background


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["ttl", "content", "type"]), inner),
    max_leaves=6,
)
FIELDS = ("cache_control", "messages", "system", "tools", "nvext", "prompt_cache_retention", "service_tier", "x")


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(st.dictionaries(st.sampled_from(FIELDS), JSON))))
def test_no_body_fails_and_no_time_is_out_of_bounds(body: dict[str, Any]) -> None:
    for each in of(**body).asked:
        assert 0 <= each.seconds <= 86_400
        assert each.place >= HEAD
        assert each.seconds or each.instead


def test_what_is_no_body_asks_for_nothing() -> None:
    for body in (b"", b"[", b'"cache_control"', b'["cache_control"]', b'{"cache_control": ' + b"[" * 10_000):
        assert wishes(body) == Wishes()
