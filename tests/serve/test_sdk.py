"""The official SDK against a real server: what it sends is understood, what it reads is what it expects."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import anthropic
import httpx
import pytest
from talking import CONTEXT, ask, eventually, is_idle, long, post, scrape, text_of

from experiments import sessions
from experiments.server import Server
from experiments.sessions import Session


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


def test_errors_arrive_as_the_sdks_own(sdk: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens: expected int >= 1, got 0") as caught:
        sdk.messages.create(model="m", max_tokens=0, messages=[QUESTION])
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert caught.value.request_id.startswith("req_")
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        sdk.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": long(91, CONTEXT)}])
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.batches.retrieve("batch")


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
