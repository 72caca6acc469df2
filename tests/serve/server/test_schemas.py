"""A real server: schemas that cannot be enforced as a whole, the old `output_format`, and what is logged once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from experiments.harness.client import scrape
from tests.helpers.http import ask, encoded, post, text_of

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
EMAIL = {"type": "string", "format": "email", "pattern": r"^(?!\.)[a-z.]+@[a-z]+$"}
LOOKING_AHEAD = {"type": "object", "properties": {"to": EMAIL, "n": {"type": "null"}}, "required": ["n"]}


def json_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "schema": schema}


def test_the_old_output_format_is_enforced_as_the_new_field_is(client: httpx.Client) -> None:
    new = post(client, ask("A number", 40, output_config={"format": json_format(SCHEMA), "effort": "low"}))
    old = post(client, ask("A number", 40, output_format=json_format(SCHEMA)))
    assert json.loads(text_of(old)) == json.loads(text_of(new))
    assert json.loads(text_of(old))["a"] in range(10)
    both = ask("A number", 40, output_format=json_format(SCHEMA), output_config={"format": json_format({"const": 5})})
    assert text_of(post(client, both)) == "5"
    assert text_of(post(client, ask("A number", 4, output_format=None)))


def test_an_output_format_of_another_type_is_refused_by_name(client: httpx.Client) -> None:
    response = client.post("/v1/messages", json=ask("Hi", output_format={"type": "regex"}))
    assert response.status_code == 400
    assert "output_format.type: expected json_schema" in response.json()["error"]["message"]


def test_a_schema_with_look_ahead_fails_no_request_and_is_reported_once(client: httpx.Client, server_log: Path) -> None:
    user = [{"role": "user", "content": "Send"}]
    form = {"type": "json_schema", "name": "n", "strict": True, "schema": LOOKING_AHEAD}
    for path, body in (
        ("/v1/messages", ask("Send", 60, output_config={"format": json_format(LOOKING_AHEAD)})),
        ("/v1/chat/completions", {"messages": user, "response_format": {"type": "json_schema", "json_schema": form}}),
        ("/v1/responses", {"input": user, "text": {"format": form}}),
    ):
        response = client.post(path, json={"model": "m", "max_tokens": 60, "max_output_tokens": 60} | body)
        assert response.status_code == 200, response.text
    assert scrape(client)['tokenzero_unenforced_schema_keywords_total{keyword="pattern"}'] == 1
    assert server_log.read_text().count("left out: /properties/to/pattern") == 1


def test_safeguards_are_explained_once(client: httpx.Client, server_log: Path) -> None:
    asked = ask("Hi", 1, safeguards=[{"type": "dangerous_tool_use", "classifier_context": {"v": 1}}])
    for _ in range(2):
        assert client.post("/v1/messages", content=encoded(asked)).status_code == 200
    assert server_log.read_text().count("--permission-mode default") == 1
