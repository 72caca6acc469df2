"""What the parser makes of an answer, whichever way its text is cut into pieces."""

from __future__ import annotations

from functools import cache
from itertools import combinations, pairwise
from typing import Any

from serve.api.stops import Stops
from serve.formats.families import BY_NAME
from serve.formats.readers import Call
from serve.formats.stream import NO_STOPS, AnswerStream, Text, Thinking
from tests.helpers.model_families import FAMILIES, tokenizer_of

Schemas = dict[str, dict[str, Any]]
MOST_SPLITS = 200  # into three pieces; longer texts are cut at fewer places


@cache
def backend() -> Any:
    """A tokenizer for streams that are given text."""
    return tokenizer_of(FAMILIES[0]).hf.backend_tokenizer


def events_of(
    format: str, pieces: list[str], tools: Schemas, thinking: bool = False, stops: Stops = NO_STOPS
) -> list[Any]:
    """The events of an answer in pieces: text and thinking joined, calls as (name, input)."""
    stream = AnswerStream(backend(), BY_NAME[format], stops, tools, thinking)
    events: list[Any] = []
    for event in [*(event for piece in pieces for event in stream.read(piece)), *stream.finish()]:
        if isinstance(event, Text | Thinking) and events and type(events[-1]) is type(event):
            events[-1] = type(event)(events[-1].text + event.text)
        else:
            events.append((event.name, event.input) if isinstance(event, Call) else event)
    return events


def read_answer(format: str, text: str, tools: Schemas, thinking: bool = False) -> list[Any]:
    """The events of an answer, which are the same for every split of its text into one, two or three pieces."""
    whole = events_of(format, [text], tools, thinking)
    assert events_of(format, list(text), tools, thinking) == whole, "letter by letter"
    for at in range(1, len(text)):
        assert events_of(format, [text[:at], text[at:]], tools, thinking) == whole, (text[:at], text[at:])
    places = list(range(1, len(text)))
    step = max(1, len(places) * len(places) // 2 // MOST_SPLITS)
    for cuts in list(combinations(places, 2))[::step]:
        pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        assert events_of(format, pieces, tools, thinking) == whole, pieces
    return whole
