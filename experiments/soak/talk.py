"""The content of random sessions: openings, turns, demands on an answer, requests that must be refused.

All of it is drawn from the given generator. Openings share system texts and questions, so that prompts diverge at all
distances from their start.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.workloads.sessions import billing_header, with_header
from experiments.workloads.synthetic import Json, prose, text_block

BODY_BYTES = 1 << 20  # what the soaked server takes
SALT_HEADER = "x-tokenzero-cache-salt"
KEYS = ("", "key-one", "key-two")
SALTS = ("", "", "salt-one", "salt-two")
LENGTHS = (1, 2, 4, 12, 30, 48)  # max_tokens of an answer
ANY = {"type": "any"}
DEMAND_TOKENS = 96  # of an answer that obeys a schema: enough for most to end
STOPS = ((" the", "self"), ("e",), ("\n",), (" import", "def ", "zzzz"))
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "unit": {"enum": ["mm", "inch"]}},
    "required": ["x", "unit"],
    "additionalProperties": False,
}
TOOLS = (
    {
        "name": "look",
        "description": "Looks at a file.",
        "input_schema": {
            "type": "object",
            "properties": {"path": {"type": "string", "maxLength": 8}, "whole": {"type": "boolean"}},
            "required": ["path", "whole"],
            "additionalProperties": False,
        },
    },
    {"name": "move", "description": "Moves to a point.", "input_schema": POINT},
)
FORMATS = (
    POINT,
    {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "where": {"type": "array", "items": POINT, "maxItems": 2}},
        "required": ["ok", "where"],
        "additionalProperties": False,
    },
)


@dataclass(frozen=True)
class Topics:
    """Texts that conversations share."""

    systems: tuple[str, ...]
    questions: tuple[str, ...]

    @staticmethod
    def of(seed: int, scale: float) -> Topics:
        """A dozen system texts of 200 to 1,500 characters and 40 questions of 30 to 400, times `scale`."""
        rng = random.Random(f"soak topics {seed}")
        systems = tuple(prose(rng, round(scale * rng.randint(200, 1500))) for _ in range(12))
        return Topics(systems, tuple(prose(rng, round(scale * rng.randint(30, 400))) for _ in range(40)))


def who(rng: random.Random) -> dict[str, str]:
    """The headers of a client: its key and salt, if it has any."""
    key, salt = rng.choice(KEYS), rng.choice(SALTS)
    return ({"x-api-key": key} if key else {}) | ({SALT_HEADER: salt} if salt else {})


def opening(rng: random.Random, topics: Topics) -> Json:
    """A conversation's first body, without what `demand` adds."""
    body: Json = {"model": "soaked", "temperature": 0, "messages": [question(rng, topics)]}
    system = rng.choice(topics.systems)
    body |= rng.choice(({}, {"system": system}, {"system": system}, {"system": [text_block(system)]}))
    if rng.random() < 0.4:
        body["tools"] = list(TOOLS[: rng.randint(1, len(TOOLS))])
    if rng.random() < 0.2:
        body["messages"].append({"role": "system", "content": prose(rng, 60)})
    return with_header(body, billing_header(rng)) if rng.random() < 0.3 else body


def question(rng: random.Random, topics: Topics) -> Json:
    """A user's message: a known question, a fresh one, or both."""
    known, fresh = rng.choice(topics.questions), prose(rng, rng.randint(20, 120))
    return {"role": "user", "content": rng.choice((known, fresh, f"{known} {fresh}", [text_block(known)]))}


def demand(rng: random.Random, body: Json) -> Json:
    """Demands on the answer: its length, and sometimes sampling, stop sequences, a forced call or a schema."""
    kinds = ("plain", "sampled", "stop", "format", *(("any", "tool") if "tools" in body else ()))
    weights = (12, 1, 2, 1, 2, 1)[: len(kinds)]
    match rng.choices(kinds, weights)[0]:
        case "sampled":
            more: Json = {"temperature": 1.0, "top_p": 0.9, "top_k": rng.choice((0, 40))}
        case "stop":
            more = {"stop_sequences": list(rng.choice(STOPS))}
        case "format":
            schema = rng.choice(FORMATS)
            return {"output_config": {"format": {"type": "json_schema", "schema": schema}}, "max_tokens": DEMAND_TOKENS}
        case "any":
            return {"tool_choice": ANY | {"disable_parallel_tool_use": rng.random() < 0.7}, "max_tokens": DEMAND_TOKENS}
        case "tool":
            choice = {"type": "tool", "name": rng.choice(body["tools"])["name"], "disable_parallel_tool_use": True}
            return {"tool_choice": choice, "max_tokens": DEMAND_TOKENS}
        case _:
            more = {}
    return more | {"max_tokens": rng.choice(LENGTHS)}


def following(rng: random.Random, topics: Topics, content: Sequence[Json]) -> list[Json]:
    """The messages after an answer: results of its calls, a question, sometimes a system message."""
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": prose(rng, rng.randint(20, 300))}
        for block in content
        if block["type"] == "tool_use"
    ]
    asked = {"role": "user", "content": results} if results else question(rng, topics)
    return [asked, {"role": "system", "content": prose(rng, 50)}] if rng.random() < 0.1 else [asked]


def branched(rng: random.Random, topics: Topics, messages: Sequence[Json]) -> list[Json]:
    """The conversation up to one of its questions, which is replaced."""
    asked = [i for i, message in enumerate(messages) if message["role"] == "user" and not has_results(message)]
    return [*messages[: rng.choice(asked)], question(rng, topics)]


def edited(rng: random.Random, messages: Sequence[Json]) -> list[Json]:
    """The conversation with one answer rewritten by the client; unchanged if no answer has text."""
    texts = [i for i, m in enumerate(messages) if m["role"] == "assistant" and "text" in dict(*m["content"][:1])]
    if not texts:
        return list(messages)
    at = rng.choice(texts)
    first, *rest = messages[at]["content"]
    changed = messages[at] | {"content": [first | {"text": f"{first['text'][:40]} {prose(rng, 30)}"}, *rest]}
    return [*messages[:at], changed, *messages[at + 1 :]]


def has_results(message: Json) -> bool:
    """Whether a message brings tool results."""
    return isinstance(message["content"], list) and any(b["type"] == "tool_result" for b in message["content"])


# Answers that must obey a schema.


def disobeys(body: Json, message: Json) -> str:
    """The way in which an answer breaks its request's demands, or an empty string.

    An answer that `max_tokens` has cut need not be complete.
    """
    cut, choice = message["stop_reason"] == "max_tokens", body.get("tool_choice", {})
    texts = "".join(block["text"] for block in message["content"] if block["type"] == "text")
    calls = [block for block in message["content"] if block["type"] == "tool_use"]
    if found := [stop for stop in body.get("stop_sequences", ()) if stop in texts]:
        return f"the text holds the stop sequence {found[0]!r}"
    schemas = {tool["name"]: tool["input_schema"] for tool in body.get("tools", ())}
    allowed = {choice["name"]} if "name" in choice else set(schemas)
    forced = bool(choice) or "output_config" in body  # a call that was not forced may be anything
    if forced and (odd := [call for call in calls if not called(call, allowed, schemas)]):
        return f"the call {odd[0]['name']} {odd[0]['input']} does not fit its schema"
    if cut or calls or not forced:
        return ""
    if choice:
        return "expected a tool call, got none"
    try:
        value = json.loads(texts)
    except ValueError:
        return f"expected JSON, got {texts!r:.80}"
    return "" if fits(value, body["output_config"]["format"]["schema"]) else f"does not fit its schema: {texts:.80}"


def called(call: Json, allowed: set[str], schemas: dict[str, Json]) -> bool:
    """Whether a tool call names an allowed tool and its input fits the schema."""
    return call["name"] in allowed and fits(call["input"], schemas[call["name"]])


def fits(value: Any, schema: Json) -> bool:
    """Whether a value obeys a schema, of the keywords that this file uses."""
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "object":
            known = schema["properties"]
            return (
                isinstance(value, dict)
                and set(schema["required"]) <= set(value) <= set(known)
                and all(fits(item, known[key]) for key, item in value.items())
            )
        case "array":
            inner = schema["items"]
            return isinstance(value, list) and len(value) <= schema["maxItems"] and all(fits(v, inner) for v in value)
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case _:
            return isinstance(value, str) and len(value) <= schema["maxLength"]


# Requests that must be refused.


@dataclass(frozen=True)
class Bad:
    """A request that the server has to refuse by `status`."""

    status: int
    content: bytes
    path: str = "/v1/messages"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


def broken(**fields: Any) -> Callable[[Json], Bad]:
    """A function from a good body to the refused one with some fields changed."""
    return lambda body: Bad(400, json.dumps(body | fields).encode())


def user(content: Any) -> list[Json]:
    """A user's message as the only one of a conversation."""
    return [{"role": "user", "content": content}]


# The grammar of such a multiple would be too large.
ODD_TOOL = {"name": "t", "input_schema": {"type": "object", "properties": {"a": {"multipleOf": 10_000_019}}}}
BAD: dict[str, Callable[[Json], Bad]] = {
    "empty body": lambda body: Bad(400, b""),
    "torn JSON": lambda body: Bad(400, json.dumps(body).encode()[:-9]),
    "null": lambda body: Bad(400, b"null"),
    "array": lambda body: Bad(400, b"[]"),
    "not UTF-8": lambda body: Bad(400, json.dumps(body).encode().replace(b"model", b"\xff\xfe")),
    "deep nesting": lambda body: Bad(400, b'{"messages":' + b"[" * 60_000),
    "no messages": broken(messages=[]),
    "messages of numbers": broken(messages=[1, 2]),
    "unknown role": broken(messages=[{"role": "robot", "content": "x"}]),
    "last message without content": broken(messages=[{"role": "user"}]),
    "max_tokens -1": broken(max_tokens=-1),
    "max_tokens beyond int32": broken(max_tokens=2**40),
    "max_tokens text": broken(max_tokens="many"),
    "temperature 3": broken(temperature=3),
    "top_k -1": broken(top_k=-1),
    "top_p 2": broken(top_p=2),
    "empty stop sequence": broken(stop_sequences=[""]),
    "too many stop sequences": broken(stop_sequences=["x"] * 9000),
    "tool_choice without tools": broken(tool_choice=ANY, tools=[]),
    "tool_choice of no tool": broken(tool_choice={"type": "tool", "name": "nothing"}),
    "odd tool schema": broken(tools=[ODD_TOOL], tool_choice=ANY),
    "odd format": broken(
        tool_choice={"type": "none"},
        output_config={"format": {"type": "json_schema", "schema": {"multipleOf": 10_000_019}}},
    ),
    "thinking without budget": broken(thinking={"type": "enabled"}),
    "system of numbers": broken(system=[7]),
    "prompt too long": broken(messages=user("seven " * 20_000)),
    "body too large": lambda body: Bad(413, b" " * (BODY_BYTES + 1)),
    "unknown rule": lambda body: Bad(400, json.dumps(body).encode(), headers={"x-tokenzero-normalize": "no-such"}),
    "unknown route": lambda body: Bad(404, b"{}", "/v1/nothing"),
    "wrong method": lambda body: Bad(405, b"", "/v1/messages", "GET"),
    "unknown request": lambda body: Bad(404, b"", "/v1/requests/msg_of_nobody", "GET"),
    "chat without messages": lambda body: Bad(400, b'{"model": "m"}', "/v1/chat/completions"),
    "responses without input": lambda body: Bad(400, b'{"model": "m"}', "/v1/responses"),
    "count of nothing": lambda body: Bad(400, b"{}", "/v1/messages/count_tokens"),
}
