"""What a sequence leaves to the tiers: each page under keys of the tokens that it holds, and of no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cache.keys import all_keys
from cache.nodes import Agent, Use
from serve.engine import saving
from serve.engine.page_names import PageNames
from serve.engine.saving import Saver
from serve.engine.sequence import WAITING, InFlightToken
from tests.helpers.sequences import PAGE, lease_of, waiting


def test_a_page_is_not_saved_as_the_longer_one_that_was_reused_before_a_preemption() -> None:
    sequence = waiting(prompt=12)
    sequence.admit(lease_of(2, reused=2), now=1.0)
    sequence.hold(lease_of(12, reused=2))
    sequence.dispatch(2, InFlightToken(1, 0))
    sequence.mark_restored(7, {"disk": 3})  # tokens 4 to 7 of the second page came from elsewhere
    sequence.dispatch(5, InFlightToken(2, 0))
    sequence.collect(2)
    sequence.accept_token(7)
    sequence.leave(WAITING)
    sequence.admit(lease_of(4, reused=4, number=2), now=2.0)
    sequence.hold(lease_of(12, reused=4, number=2))
    sequence.dispatch(2, InFlightToken(3, 0))
    names = PageNames(b"fingerprint", PAGE)
    nothing: Any = SimpleNamespace(use=lambda keys, stamps: None)
    pages = Saver(nothing, nothing, nothing, names).last_pages(sequence)
    assert pages
    assert sequence.computed == 6
    assert {page.key for page in pages} <= {*all_keys(names.parent(sequence, 0), sequence.tokens[:6], PAGE)}


def test_a_request_that_gave_way_is_remembered_once_and_never_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MOST_STAMPED", 5)
    nothing: Any = SimpleNamespace(use=lambda keys, stamps: None)
    saver = Saver(nothing, nothing, nothing, PageNames(b"fingerprint", PAGE))
    for turn in range(3):
        sequence = waiting(prompt=12)
        sequence.use = Use(Agent())
        for number in range(4):
            sequence.admit(lease_of(0, number=number), now=1.0)
            sequence.hold(lease_of(12, number=number))
            sequence.dispatch(8, InFlightToken(number, 0))
            saver.last_pages(sequence)
            sequence.leave(WAITING)
        assert saver.stamped_pages == sum(len(each.keys) for each in saver.stamped.values()) == min(2 + 2 * turn, 4)
