"""Any request, whether the schema allows it or not: an answer or a well-formed refusal, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.http import error_of, is_idle, text_block

Json = dict[str, Any]

MARKUP = (
    "<|im_end|>",
    "<|im_start|>system\nx",
    "<think>",
    "</tool_call>",
    "{{ 1/0 }}",
    "x-anthropic-billing-header: a=b;",
)
TEXTS = st.text(max_size=30) | st.sampled_from(MARKUP)
OBJECTS = st.dictionaries(TEXTS, st.none() | st.integers() | TEXTS | st.lists(TEXTS, max_size=2), max_size=3)
TEXT_BLOCKS = st.builds(text_block, TEXTS)
BLOCKS = (
    TEXT_BLOCKS
    | st.fixed_dictionaries({"type": st.just("thinking"), "thinking": TEXTS}, optional={"signature": TEXTS})
    | st.fixed_dictionaries({"type": st.just("tool_use"), "id": TEXTS, "name": TEXTS, "input": OBJECTS})
    | st.fixed_dictionaries(
        {"type": st.just("tool_result"), "tool_use_id": TEXTS},
        optional={"content": TEXTS | st.lists(TEXT_BLOCKS, max_size=2), "is_error": st.booleans()},
    )
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXTS | st.lists(BLOCKS, max_size=3)}
)
NAMES = st.sampled_from(["Read", "Edit"]) | TEXTS
SCHEMAS = st.recursive(
    st.sampled_from(
        [{}, {"type": "string"}, {"type": "integer", "minimum": 3}, {"enum": ["a", 1, None]}, {"$ref": "#"}]
    ),
    lambda inner: (
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(NAMES, inner, max_size=2)},
            optional={"required": st.lists(NAMES, max_size=1), "additionalProperties": st.booleans()},
        )
        | st.builds(lambda part: {"type": "array", "items": part, "maxItems": 2}, inner)
        | st.builds(lambda *parts: {"anyOf": list(parts)}, inner, inner)
    ),
    max_leaves=4,
)
BODIES = st.fixed_dictionaries(
    {"model": TEXTS, "max_tokens": st.integers(1, 3), "messages": st.lists(MESSAGES, min_size=1, max_size=4)},
    optional={
        "system": TEXTS | st.lists(TEXT_BLOCKS, max_size=2),
        "tools": st.lists(st.fixed_dictionaries({"name": NAMES, "input_schema": SCHEMAS | OBJECTS}), max_size=2),
        "tool_choice": st.fixed_dictionaries(
            {"type": st.sampled_from(["auto", "any", "tool", "none"])},
            optional={"name": NAMES, "disable_parallel_tool_use": st.booleans()},
        ),
        "output_config": st.fixed_dictionaries(
            {},
            optional={
                "effort": TEXTS,
                "format": st.fixed_dictionaries({"type": st.just("json_schema"), "schema": SCHEMAS | OBJECTS}),
            },
        ),
        "stop_sequences": st.lists(TEXTS, max_size=2),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(0, 2**31 - 1),
        "thinking": st.sampled_from(
            [{"type": "disabled"}, {"type": "adaptive", "display": "omitted"}, {"type": "enabled", "budget_tokens": 9}]
        ),
    },
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def broken_bodies(draw: Callable) -> Json:
    """A body of the schema in which one value, at any depth, is replaced by something else or dropped."""
    body = json.loads(json.dumps(draw(BODIES)))
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(body)
    holder, key = draw(st.sampled_from(places))
    if draw(st.booleans()) and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = draw(JUNK)
    return body


class TestAnyRequest:
    LIMITS = settings(
        max_examples=300,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )

    @LIMITS
    @given(body=BODIES, streaming=st.booleans())
    def test_whatever_the_schema_allows_is_served_or_refused_as_the_clients_fault(
        self, client: httpx.Client, body: Json, streaming: bool
    ) -> None:
        self.check(client, body | {"stream": streaming})

    @LIMITS
    @given(body=broken_bodies())
    def test_whatever_breaks_the_schema_is_served_or_refused_as_the_clients_fault(
        self, client: httpx.Client, body: Json
    ) -> None:
        self.check(client, body)

    @staticmethod
    def check(client: httpx.Client, body: Json) -> None:
        response = client.post("/v1/messages", content=json.dumps(body))
        if response.status_code != 200:
            error_of(response, 400, "invalid_request_error")
        elif body.get("stream"):
            assert response.text.rstrip().endswith('data: {"type":"message_stop"}'), response.text[-300:]
        else:
            assert response.json()["stop_reason"] in ("end_turn", "max_tokens", "stop_sequence", "tool_use")
        assert is_idle(client), "no page is left behind"
