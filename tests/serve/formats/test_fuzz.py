"""Half a million random answers: no parser raises anything, and where a text is cut changes nothing of what is read."""

from __future__ import annotations

import random

import pytest

from serve.formats.families import BY_NAME
from serve.formats.readers import CutCall
from tests.serve.formats.test_faults import FAULTS, TOOLS, read

pytestmark = pytest.mark.fuzz
CASES = 500_000
OFFERED = {"Read": TOOLS["run"], **TOOLS}


def junk(source: random.Random) -> str:
    """A few characters of any kind but surrogates, which no text of a tokenizer has."""
    return "".join(chr(source.choice((source.randrange(0xD800), source.randrange(0xE000, 0x110000)))) for _ in "abc")


def test_any_cut_of_any_answer_is_read_as_the_whole() -> None:
    source, names = random.Random(1), sorted(BY_NAME)
    for _ in range(CASES // 2):  # each is read twice
        name = source.choice(names)
        parts = source.choices(FAULTS, k=source.randrange(13))
        if source.random() < 0.2:
            parts.insert(source.randrange(len(parts) + 1), junk(source))
        text, cuts = "".join(parts), [source.randrange(4000) for _ in range(source.randrange(5))]
        how = {"thinking": source.random() < 0.5, "cut": source.random() < 0.5, "tools": OFFERED}
        whole, cut = ([shown(event) for event in read(name, text, c, **how)] for c in ((), cuts))
        assert cut == whole, (name, text, cuts, how)


def shown(event: object) -> object:
    """An event in a form that can be compared."""
    return (event.name, event.arguments) if isinstance(event, CutCall) else event
