"""The official SDK against a real server: what it sends is understood, what it reads is what it expects."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import Server
from experiments.workloads import sessions
from experiments.workloads.sessions import Session
from tests.helpers.http import BODY_LIMIT, CONTEXT, ask, eventually, is_idle, long, post, text_of


@pytest.fixture
def sdk(server: Server, client: httpx.Client) -> Iterator[anthropic.Anthropic]:
    """The SDK's client, which repeats nothing by itself."""
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as sdk:
        yield sdk


QUESTION = {"role": "user", "content": "Hello from the SDK"}


def test_create_returns_a_message(sdk: anthropic.Anthropic, client: httpx.Client) -> None:
    message = sdk.messages.create(model="claude-x", max_tokens=6, messages=[QUESTION], extra_body={"temperature": 0})
    assert (message.type, message.role, message.model) == ("message", "assistant", "claude-x")
    assert message.content[0].text == text_of(post(client, ask("Hello from the SDK", 6)))
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 6)
    assert message._request_id.startswith("req_")


def test_the_stream_helper_gathers_the_message_that_create_returns(sdk: anthropic.Anthropic) -> None:
    asked = {"model": "m", "max_tokens": 20, "messages": [QUESTION], "extra_body": {"temperature": 0}}
    whole = sdk.messages.create(**asked)
    with sdk.messages.stream(**asked) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == whole.content[0].text == final.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, 20)
    usage = final.usage
    assert usage.cache_read_input_tokens + usage.cache_creation_input_tokens + usage.input_tokens == (
        whole.usage.cache_read_input_tokens + whole.usage.cache_creation_input_tokens + whole.usage.input_tokens
    )


def test_raw_events_come_typed_and_in_order(sdk: anthropic.Anthropic) -> None:
    events = list(
        sdk.messages.create(model="m", max_tokens=4, messages=[QUESTION], extra_body={"temperature": 0}, stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert events[0].message.model == "m"
    assert events[-2].usage.output_tokens == 4


def test_stop_sequences_reach_the_caller(sdk: anthropic.Anthropic) -> None:
    asked = {"model": "m", "max_tokens": 20, "messages": [QUESTION], "extra_body": {"temperature": 0}}
    text = sdk.messages.create(**asked).content[0].text
    stopped = sdk.messages.create(**asked, stop_sequences=[text[5:9]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[5:9])
    assert "".join(block.text for block in stopped.content) == text[: text.index(text[5:9])]


def test_count_tokens_and_the_list_of_models(sdk: anthropic.Anthropic) -> None:
    counted = sdk.messages.count_tokens(model="m", messages=[QUESTION], system="Be brief.")
    usage = sdk.messages.create(model="m", max_tokens=1, messages=[QUESTION], system="Be brief.").usage
    total = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
    assert counted.input_tokens == total
    (model,) = sdk.models.list()
    assert (model.id, model.type, model.max_input_tokens) == ("tiny-model", "model", CONTEXT)


def test_a_beta_request_of_an_agents_shape_is_served(sdk: anthropic.Anthropic) -> None:
    body = sessions.request(Session(scale=0.02), turn=1)
    del body["stream"], body["temperature"]  # the helper sets the one and refuses the other
    with sdk.beta.messages.stream(**body | {"max_tokens": 8, "betas": ["context-management-2025-06-27"]}) as stream:
        final = stream.get_final_message()
    assert final.model == "local-model"
    assert final.usage.output_tokens <= 8


MARKED = {"cache_control": {"type": "ephemeral"}}
READ = {"name": "Read", "description": "Reads a file.", "input_schema": {"type": "object", "properties": {}}}
CALLED = [
    {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
    {"type": "redacted_thinking", "data": "AAAA"},
    {"type": "text", "text": "I look."},
    {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a.py", "n": 1.0}},
    {"type": "tool_use", "id": "toolu_2", "name": "Read", "input": {}},
]
RESULTS = [
    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "nothing", "is_error": True},
    {
        "type": "tool_result",
        "tool_use_id": "toolu_2",
        "content": [{"type": "text", "text": "a line"}, {"type": "tool_reference", "tool_name": "Edit"}],
    },
    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "A page."}, "title": "Notes"},
    {"type": "text", "text": "Go on."} | MARKED,
]
EVERY_FIELD = {
    "system": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Work in /tmp."} | MARKED],
    "messages": [
        QUESTION,
        {"role": "system", "content": "Environment: none."},
        {"role": "assistant", "content": CALLED},
        {"role": "user", "content": RESULTS},
        {"role": "system", "content": [{"type": "text", "text": "<total_tokens>10 left</total_tokens>"}]},
    ],
    "tools": [READ | MARKED, READ | {"name": "Edit", "type": "custom"}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 2048, "display": "summarized"},
    "output_config": {"effort": "low"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "stop_sequences": ["never in it", "STOP"],
    "metadata": {"user_id": "user_1"},
    "service_tier": "auto",
}


def test_every_field_is_taken_streaming_and_not(sdk: anthropic.Anthropic) -> None:
    asked = {"model": "claude-x", "max_tokens": 12, **EVERY_FIELD, "extra_body": {"temperature": 0}}
    asked |= {"extra_body": {"temperature": 0, "top_k": 40, "top_p": 0.9}}
    whole = sdk.beta.messages.create(**asked)
    with sdk.beta.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert [block.model_dump(exclude={"signature"}) for block in whole.content] == [
        block.model_dump(exclude={"signature"}) for block in streamed.content
    ]
    assert (whole.stop_reason, whole.usage.output_tokens) == (streamed.stop_reason, streamed.usage.output_tokens)
    counted = {name: EVERY_FIELD[name] for name in ("system", "messages", "tools", "tool_choice", "thinking")}
    assert sdk.beta.messages.count_tokens(model="claude-x", **counted).input_tokens == (
        whole.usage.cache_read_input_tokens + whole.usage.cache_creation_input_tokens + whole.usage.input_tokens
    )


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("tools", [{"type": "web_search_20250305", "name": "web_search"}], "web_search_20250305"),
        ("messages", [{"role": "user", "content": None}], "null"),
        ("tool_choice", {"type": "tool", "name": "Write"}, "Write"),
        ("thinking", {"type": "enabled"}, "budget_tokens"),
    ],
)
def test_what_is_not_there_is_refused_by_name(sdk: anthropic.Anthropic, field: str, value: Any, named: str) -> None:
    asked = {"model": "m", "max_tokens": 1, "messages": [QUESTION], "tools": [READ]} | {field: value}
    with pytest.raises(anthropic.BadRequestError, match=f"^.*{field}.*{named}"):
        sdk.messages.create(**asked)


def test_errors_arrive_as_the_sdks_own(sdk: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens: expected int >= 0, got -1") as caught:
        sdk.messages.create(model="m", max_tokens=-1, messages=[QUESTION])
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert caught.value.request_id.startswith("req_")
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        sdk.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": long(91, CONTEXT)}])
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.batches.retrieve("batch")
    with pytest.raises(anthropic.RequestTooLargeError):
        sdk.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "x" * BODY_LIMIT}])


def test_a_stream_that_is_closed_early_stops_the_engine(sdk: anthropic.Anthropic, client: httpx.Client) -> None:
    before = scrape(client)["tokenzero_generated_tokens_total"]
    with sdk.messages.stream(model="m", max_tokens=32_000, messages=[QUESTION], extra_body={"top_k": 500}) as stream:
        next(iter(stream.text_stream))
    eventually(lambda: is_idle(client), "the request is given up")
    assert scrape(client)["tokenzero_generated_tokens_total"] - before < 5000


def test_the_async_client_runs_many_at_once(server: Server, client: httpx.Client) -> None:
    texts = [f"Asynchronous {number}" for number in range(8)]
    alone = [text_of(post(client, ask(text, 10))) for text in texts]

    async def answer(sdk: anthropic.AsyncAnthropic, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        message = await sdk.messages.create(model="m", max_tokens=10, messages=messages, extra_body={"temperature": 0})
        return "".join(block.text for block in message.content)

    async def together() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as sdk:
            return await asyncio.gather(*(answer(sdk, text) for text in texts))

    assert asyncio.run(together()) == alone
