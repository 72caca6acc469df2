import importlib

import pytest

from experiments.bench.restart import covered
from experiments.bench.traced import STAGES, Span, wrap


def test_time_in_a_stage_counts_once_where_calls_overlap_and_only_within_the_request():
    spans = [Span("read", "a", *times) for times in ((0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (9.0, 12.0))]
    assert covered(spans, 0.5, 10.0) == pytest.approx(2.5 + 1.0 + 1.0)
    assert covered([], 0.0, 1.0) == 0


def test_a_wrapped_function_does_the_same_and_leaves_spans(monkeypatch):
    import cache.keys as keys
    import cache.tiers as user

    for module in (keys, user):
        monkeypatch.setattr(module, "tail_key", keys.tail_key)  # put back after the test
    spans, parent = [], bytes(32)
    before = keys.tail_key(parent, [1, 2])
    wrap("cache.keys:tail_key", "name", spans)
    assert keys.tail_key(parent, [1, 2]) == user.tail_key(parent, [1, 2]) == before
    assert [span.stage for span in spans] == ["name", "name"]
    assert all(span.start <= span.stop for span in spans)


@pytest.mark.parametrize("path", STAGES.values())
def test_every_stage_names_a_function(path):
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    assert callable(found)
