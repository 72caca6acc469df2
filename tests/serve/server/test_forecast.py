"""What a caller is told before it sends, and with every answer: what is read of the cache, from where, and the TTFT."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import openai
import pytest

from experiments.harness.client import scrape
from experiments.harness.server import Server
from serve.web.headers import FORECAST_HEADER, SALT_HEADER
from tests.helpers.http import CONTEXT, Json, ask, long, post, stream

QUESTION = "What will you find of this question in your cache, and when will you answer it? " * 4


def count(client: httpx.Client, body: Json, **headers: str) -> Json:
    response = client.post("/v1/messages/count_tokens", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def told(value: str) -> dict[str, float]:
    """A header's numbers by name."""
    return {name: float(number) for name, number in (part.split("=") for part in value.split(", "))}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_count_and_the_header_say_what_the_usage_then_says(client: httpx.Client, streaming: bool) -> None:
    body = ask(f"{streaming}: {QUESTION}", 2)
    for _ in range(2):
        counted = count(client, body)
        if streaming:
            answer = stream(client, body)
            header, usage = answer.headers[FORECAST_HEADER], answer.one("message_delta")["usage"]
        else:
            response = client.post("/v1/messages", json=body)
            header, usage = response.headers[FORECAST_HEADER], response.json()["usage"]
        cache = counted["cache"]
        assert cache["cache_read_input_tokens"] == usage["cache_read_input_tokens"]
        assert cache["cache_read_by_tier"] == usage["cache_read_by_tier"]
        assert cache["predicted_ttft_ms"] > 0
        expected = told(header)
        assert expected.pop("ttft-ms") > 0
        computed = counted["input_tokens"] - usage["cache_read_input_tokens"]
        assert expected == cache["cache_read_by_tier"] | {"computed": computed}
    assert usage["cache_read_input_tokens"] == counted["input_tokens"] - 1


def test_another_salt_is_told_of_nothing(client: httpx.Client) -> None:
    body = ask(f"salted: {QUESTION}", 1)
    post(client, body, **{SALT_HEADER: "one"})
    assert count(client, body, **{SALT_HEADER: "one"})["cache"]["cache_read_input_tokens"] > 100
    assert count(client, body, **{SALT_HEADER: "two"})["cache"]["cache_read_by_tier"] == {"device": 0}


def test_a_question_makes_nothing_cached(client: httpx.Client) -> None:
    body = ask(f"only asked: {QUESTION}", 1)
    before = scrape(client)["tokenzero_prompt_tokens_total"]
    for _ in range(2):
        assert count(client, body)["cache"]["cache_read_input_tokens"] < 50
    assert scrape(client)["tokenzero_prompt_tokens_total"] == before


def test_a_prompt_beyond_the_context_is_counted_without_a_forecast(client: httpx.Client) -> None:
    assert count(client, ask(long(31, CONTEXT - 200), 1)).keys() == {"input_tokens", "cache"}
    assert count(client, ask(long(32, CONTEXT + 10), 1)).keys() == {"input_tokens"}


def test_the_sdks_keep_the_fields_that_they_do_not_know(server: Server) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as sdk:
        counted: Any = sdk.messages.count_tokens(model="m", messages=[{"role": "user", "content": "Count."}])
        assert counted.input_tokens > 0
        assert counted.cache["predicted_ttft_ms"] > 0
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as other:
        found: Any = other.responses.input_tokens.count(model="m", input="Count.")
        assert found.input_tokens > 0
        assert found.cache["cache_read_by_tier"].keys() <= {"device"}


def test_each_answer_counts_how_far_off_its_forecast_was(client: httpx.Client) -> None:
    before = scrape(client)["tokenzero_forecast_error_count"]
    answer = post(client, ask(f"recorded: {QUESTION}", 1))
    assert scrape(client)["tokenzero_forecast_error_count"] == before + 1
    record = client.get(f"/v1/requests/{answer['id']}").json()
    assert record["forecast"]["cache_read_by_tier"] == answer["usage"]["cache_read_by_tier"]
