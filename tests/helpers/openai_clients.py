"""The official OpenAI client with scripted answers, and one answer of the Messages API with every kind of block."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import httpx2
import openai
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from serve.api import answers
from serve.api import messages as wire
from tests.helpers.http import encoded


@dataclass(frozen=True)
class Translation:
    """Requests of one of the APIs as the Messages API has them: `minimal` with other fields, read by `read`."""

    read: Callable[[bytes], tuple[wire.MessagesRequest, Any]]
    minimal: dict[str, Any]

    def __call__(self, **fields: Any) -> wire.MessagesRequest:
        """The request with these fields."""
        return self.read(encoded(self.minimal | fields))[0]

    def refusal(self, **fields: Any) -> str:
        """Why the request with these fields is refused."""
        with pytest.raises(wire.InvalidRequest) as caught:
            self(**fields)
        return str(caught.value)


USAGE = answers.Usage(3, 5, 7, 11)
ANSWER = answers.Message(
    id="msg_1",
    model="local/model",
    content=(
        wire.ThinkingBlock("Let me\u2028see", "c2lnbmVk"),
        wire.TextBlock("Hi 😀\r\n\n"),
        wire.ToolUseBlock("toolu_1", "read", {"path": "a\nb", "n": 1.5}),
        wire.ToolUseBlock("toolu_2", "now", {}),
    ),
    stop_reason="tool_use",
    usage=USAGE,
)
EVENTS: list[answers.Event] = [
    answers.Ping(),
    answers.MessageStart(answers.Message(id=ANSWER.id, model=ANSWER.model, usage=answers.Usage(3, 5, 7, 0))),
    answers.ContentBlockStart(0, wire.ThinkingBlock("")),
    answers.ContentBlockDelta(0, answers.ThinkingDelta("Let me\u2028")),
    answers.Ping(),
    answers.ContentBlockDelta(0, answers.ThinkingDelta("see")),
    answers.ContentBlockDelta(0, answers.SignatureDelta("c2lnbmVk")),
    answers.ContentBlockStop(0),
    answers.ContentBlockStart(1, wire.TextBlock("")),
    answers.ContentBlockDelta(1, answers.TextDelta("Hi 😀")),
    answers.ContentBlockDelta(1, answers.TextDelta("\r\n\n")),
    answers.ContentBlockStop(1),
    answers.ContentBlockStart(2, wire.ToolUseBlock("toolu_1", "read", {})),
    answers.ContentBlockDelta(2, answers.InputJsonDelta('{"path":"a\\nb",')),
    answers.ContentBlockDelta(2, answers.InputJsonDelta('"n":1.5}')),
    answers.ContentBlockStop(2),
    answers.ContentBlockStart(3, wire.ToolUseBlock("toolu_2", "now", {})),
    answers.ContentBlockDelta(3, answers.InputJsonDelta("{}")),
    answers.ContentBlockStop(3),
    answers.MessageDelta(answers.Stop("tool_use"), USAGE),
    answers.MessageStop(),
]
BROKEN = answers.Error(answers.ErrorDetail("api_error", "the device is gone"))


def client_of(body: bytes, status: int = 200, kind: str = "application/json") -> openai.OpenAI:
    """The official client of a server that always gives this answer."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, content=body, headers={"content-type": kind}, request=request)

    http_client = openai.DefaultHttpxClient(transport=httpx2.MockTransport(answer))
    return openai.OpenAI(api_key="none", base_url="http://test/v1", max_retries=0, http_client=http_client)


def streaming(body: bytes) -> openai.OpenAI:
    """The same for a stream of events."""
    return client_of(body, kind="text/event-stream")


def data_of(stream: bytes) -> list[bytes]:
    """The data of a stream's events. Asserts that the other lines are only comments and names."""
    assert stream.endswith(b"\n\n")
    lines = [line for line in stream.split(b"\n") if line and not line.startswith((b":", b"event: "))]
    assert all(line.startswith(b"data: ") for line in lines)
    return [line.removeprefix(b"data: ") for line in lines]


WORDS = ["", "text", "input_text", "function", "message", "user", "assistant", "reasoning"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(WORDS),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=12,
)


ANY_REQUEST = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def served_or_refused(client: httpx.Client, path: str, body: Any, limit: str) -> None:
    """Assert that a real server answers a body with few tokens, or refuses it as OpenAI would."""
    if type(body.get(limit)) in (int, type(None)):
        body[limit] = min(body.get(limit) or 2, 2)
    response = client.post(path, content=json.dumps(body))
    if response.status_code == 200 and body.get("stream"):
        assert b"finish_reason" in response.content or b"response.incomplete" in response.content
    elif response.status_code == 200:
        assert response.json()["object"] in ("chat.completion", "response")
    else:
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert (sorted(error), error["type"]) == (["code", "message", "param", "type"], "invalid_request_error")
