"""`max_tokens: 0`: a prompt is computed for later requests, and not answered."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import Server
from tests.helpers.http import ask, post, prompt_tokens, stream, text_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"name": "read", "input_schema": SCHEMA}


@pytest.mark.parametrize("streaming", [False, True])
def test_after_it_the_same_prompt_reads_all_but_its_last_token(client: httpx.Client, streaming: bool) -> None:
    text, cold = f"{streaming}, warm me up! " * 9, ask(f"{streaming}, never warmed! " * 9)
    if streaming:
        streamed = stream(client, ask(text, 0))
        assert streamed.kinds == ["message_start", "message_delta", "message_stop"]
        assert streamed.one("message_delta")["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
        usage = streamed.one("message_delta")["usage"]
        assert streamed.one("message_start")["message"]["usage"] == usage
    else:
        answer = post(client, ask(text, 0))
        assert (answer["content"], answer["stop_reason"]) == ([], "max_tokens")
        usage = answer["usage"]
    assert usage["output_tokens"] == 0
    assert usage["cache_creation_input_tokens"] > 80
    count = client.post("/v1/messages/count_tokens", json=ask(text)).json()["input_tokens"]
    assert prompt_tokens(usage) == count
    after = post(client, ask(text))
    assert text_of(after)
    assert after["usage"]["cache_read_input_tokens"] == count - 1
    assert post(client, cold)["usage"]["cache_read_input_tokens"] < 50


def test_a_placeholder_for_the_question_warms_what_comes_before_it(client: httpx.Client) -> None:
    system = "You have never seen this system text before. " * 10
    warmed = post(client, ask("warmup", 0, system=system, tools=[TOOL]))["usage"]
    asked = post(client, ask("What now?", 2, system=system, tools=[TOOL]))["usage"]
    assert asked["cache_read_input_tokens"] > 0.9 * prompt_tokens(warmed)


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [TOOL], "tool_choice": {"type": "any"}},
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "I begin"}]},
        {"stop_sequences": ["a"], "diagnostics": {"previous_message_id": None}},
    ],
)
def test_whatever_the_answer_would_have_been_it_is_empty(client: httpx.Client, more: dict[str, Any]) -> None:
    before = scrape(client)["tokenzero_generated_tokens_total"]
    answer = post(client, ask("Warm", 0, **more))
    assert (answer["content"], answer["stop_reason"], answer["usage"]["output_tokens"]) == ([], "max_tokens", 0)
    assert scrape(client)["tokenzero_generated_tokens_total"] == before
    record = client.get(f"/v1/requests/{answer['id']}").json()
    assert record["state"] == "done"


def test_no_answer_is_recorded_for_the_conversation(client: httpx.Client) -> None:
    opening = [{"role": "user", "content": "Warm a conversation."}]
    post(client, ask("", 0, messages=opening))
    again = [*opening, {"role": "assistant", "content": []}, {"role": "user", "content": "Go on."}]
    fresh = [*opening, {"role": "assistant", "content": ""}, {"role": "user", "content": "Go on."}]
    assert text_of(post(client, ask("", messages=again))) == text_of(post(client, ask("", messages=fresh)))


def test_the_sdk_reads_the_empty_answer(server: Server) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as sdk:
        asked: dict[str, Any] = {"model": "m", "max_tokens": 0, "messages": [{"role": "user", "content": "Warm it."}]}
        whole = sdk.messages.create(**asked)
        with sdk.messages.stream(**asked) as events:
            streamed = events.get_final_message()
    assert (whole.content, whole.stop_reason) == (streamed.content, streamed.stop_reason) == ([], "max_tokens")
    assert (streamed.usage.cache_creation_input_tokens, streamed.usage.input_tokens) == (0, 1)
    assert streamed.usage.cache_read_input_tokens > 0
