"""Half a million random bodies: the rules raise nothing, and what they leave is as valid as what they were given."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from serve.api.messages import InvalidRequest
from serve.rules.body import normalize_body
from serve.rules.normalize import normalize
from tests.helpers.fuzz import broken
from tests.serve.rules.test_body import ALL, COUNT, DATE, ENVIRONMENT, HEADER, READERS, REMINDER

pytestmark = pytest.mark.fuzz
CASES = 500_000
PIECES = (HEADER, DATE, COUNT, ENVIRONMENT, REMINDER, "\n", "You é help.\n", '"\\', "x-anthropic-billing-header: ")
RULES = [frozenset({name}) for name in sorted(ALL)] + [ALL]
ROLES = ("user", "assistant", "system", "developer", "tool")


def text(source: random.Random) -> str:
    return "".join(source.choices(PIECES, k=source.randint(1, 4)))


def content(source: random.Random, odd: bool) -> Any:
    blocks = [{"type": "text", "text": text(source)} for _ in "ab"]
    if odd:
        blocks[0]["type"] = source.choice(("input_text", "image", "", "tool_result"))
        return source.choice((blocks, None, [], [text(source)], {"text": text(source)}, "", 3))
    return source.choice((text(source), blocks))


def any_body(source: random.Random) -> tuple[str, dict[str, Any]]:
    """A path, and a body for it; every second one has odd content, roles that are not its API's, and fields missing."""
    odd = source.random() < 0.5
    roles = ROLES if odd else ("user", "assistant", "system")
    turns = [{"role": source.choice(roles), "content": content(source, odd)} for _ in range(source.randint(1, 4))]
    tool = {"name": "t", "type": "function", "input_schema": {"b": 1, "a": [2]}, "parameters": {"z": 1}}
    body = {"model": "m", "max_tokens": 1, "messages": turns, "input": source.choice((turns, text(source)))}
    body |= {"system": content(source, odd), "instructions": text(source)}
    if odd:
        body |= {"tools": [tool, {"name": "a"}], "messages": turns[: source.randrange(5)]}
        for name in source.sample(sorted(body), k=source.randrange(3)):
            del body[name]
    return source.choice(sorted(READERS)), body


def test_rules_raise_nothing_on_any_bytes_and_break_no_body() -> None:
    source, changed = random.Random(2), 0
    for _ in range(CASES // 2):  # each is normalised as bytes and as a request
        path, body = any_body(source)
        raw, rules = json.dumps(body).encode(), source.choice(RULES)
        raw = broken(source, raw) if source.random() < 0.3 else raw
        made = normalize_body(raw, path, rules)
        assert bool(made.applied) is (made.body != raw), (path, raw, rules)
        try:
            request = READERS[path](raw)
        except InvalidRequest:
            continue
        normalize(request, rules)
        READERS[path](made.body)
        changed += made.body != raw
    assert changed > CASES // 20, "too few bodies that are read reach the rules"
