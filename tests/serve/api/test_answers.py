"""What the server sends back: fields of the API in its order, which the official types and client read."""

import json

import anthropic
import httpx2
import pytest
from anthropic.types import Message as SdkMessage
from anthropic.types import MessageTokensCount, RawMessageStreamEvent
from pydantic import TypeAdapter

from serve.api import answers
from serve.api import messages as wire
from serve.api.messages import TextBlock

USAGE = answers.Usage(3, 5, cache_read_input_tokens=7, output_tokens=11, cache_read_by_tier={"device": 4, "disk": 3})
ANSWER = answers.Message(
    id=answers.new_id("msg"),
    model="local-model",
    content=(
        wire.ThinkingBlock("Let me\u2028see", "sig"),
        TextBlock("Hi 😀\r\n\n"),
        wire.ToolUseBlock("toolu_1", "Read", {"path": "a\nb", "n": 1}),
    ),
    stop_reason="tool_use",
    usage=USAGE,
)
EVENTS: list[answers.Event] = [
    answers.MessageStart(answers.Message(id=ANSWER.id, model="local-model", usage=answers.Usage(3, 5, 7, 1))),
    answers.Ping(),
    answers.ContentBlockStart(0, wire.ThinkingBlock("")),
    answers.ContentBlockDelta(0, answers.ThinkingDelta("Let me\u2028")),
    answers.ContentBlockDelta(0, answers.ThinkingDelta("see")),
    answers.ContentBlockDelta(0, answers.SignatureDelta("sig")),
    answers.ContentBlockStop(0),
    answers.ContentBlockStart(1, TextBlock("")),
    answers.ContentBlockDelta(1, answers.TextDelta("Hi 😀")),
    answers.ContentBlockDelta(1, answers.TextDelta("\r\n\n")),
    answers.ContentBlockStop(1),
    answers.ContentBlockStart(2, wire.ToolUseBlock("toolu_1", "Read", {})),
    answers.ContentBlockDelta(2, answers.InputJsonDelta('{"path": "a\\n')),
    answers.ContentBlockDelta(2, answers.InputJsonDelta('b", "n": 1}')),
    answers.ContentBlockStop(2),
    answers.MessageDelta(answers.Stop("tool_use"), USAGE),
    answers.MessageStop(),
]


def client_of(body: bytes, status: int = 200, kind: str = "application/json") -> anthropic.Anthropic:
    """The official client in front of a server that always gives this answer."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, content=body, headers={"content-type": kind}, request=request)

    http_client = anthropic.DefaultHttpxClient(transport=httpx2.MockTransport(answer))
    return anthropic.Anthropic(api_key="none", base_url="http://test", max_retries=0, http_client=http_client)


def test_a_message_has_the_fields_of_the_api_in_its_order() -> None:
    message = json.loads(answers.encode(ANSWER))
    assert list(message) == ["id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"]
    assert list(message["content"][2]) == ["type", "id", "name", "input"]
    assert message["stop_sequence"] is None
    assert message["usage"] == {
        "input_tokens": 3,
        "cache_creation_input_tokens": 5,
        "cache_read_input_tokens": 7,
        "output_tokens": 11,
        "cache_read_by_tier": {"device": 4, "disk": 3},
    }


def test_the_official_types_read_our_answers_and_lose_nothing() -> None:
    body = answers.encode(ANSWER)
    message = SdkMessage.model_validate_json(body, strict=True)
    assert json.loads(message.model_dump_json(exclude_unset=True)) == json.loads(body)
    count = MessageTokensCount.model_validate_json(answers.encode(answers.TokenCount(9)), strict=True)
    assert count.input_tokens == 9


@pytest.mark.parametrize("event", EVENTS)
def test_the_official_types_read_each_event_and_lose_nothing(event: answers.Event) -> None:
    name, data, *rest = answers.encode_event(event).split(b"\n")
    assert rest == [b"", b""]
    fields = json.loads(data.removeprefix(b"data: "))
    assert next(iter(fields)) == "type"
    assert name.decode() == f"event: {fields['type']}"
    if fields["type"] != "ping":
        read = TypeAdapter(RawMessageStreamEvent).validate_python(fields)
        assert json.loads(read.model_dump_json(exclude_unset=True)) == fields


def test_the_official_client_assembles_our_events_to_our_message() -> None:
    stream_body = b"".join(map(answers.encode_event, EVENTS))
    with client_of(stream_body, kind="text/event-stream").messages.stream(
        model="local-model", max_tokens=9, messages=[{"role": "user", "content": "Hi"}]
    ) as stream:
        message = stream.get_final_message()
    whole = client_of(answers.encode(ANSWER)).messages.create(
        model="local-model", max_tokens=9, messages=[{"role": "user", "content": "Hi"}]
    )
    assert message.to_dict(mode="json")["content"] == whole.to_dict(mode="json")["content"]
    assert (message.id, message.model, message.stop_reason) == (ANSWER.id, "local-model", "tool_use")
    assert message.usage.output_tokens == 11


def test_the_official_client_raises_an_error_event() -> None:
    events = [EVENTS[0], answers.Error(answers.ErrorDetail("overloaded_error", "the queue is full"))]
    client = client_of(b"".join(map(answers.encode_event, events)), kind="text/event-stream")
    with (
        pytest.raises(anthropic.APIStatusError, match="the queue is full"),
        client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "Hi"}]) as stream,
    ):
        stream.get_final_message()


@pytest.mark.parametrize(("status", "kind"), answers.ERROR_TYPES.items())
def test_the_official_client_reads_our_errors(status: int, kind: str) -> None:
    body = answers.encode(answers.Error(answers.ErrorDetail(kind, "max_tokens: field required")))
    assert body == b'{"type":"error","error":{"type":"%b","message":"max_tokens: field required"}}' % kind.encode()
    assert answers.ERROR_STATUS[kind] == status
    with pytest.raises(anthropic.APIStatusError) as caught:
        client_of(body, status).messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "Hi"}])
    assert (caught.value.status_code, caught.value.body["error"]["type"]) == (status, kind)


def test_ids_have_their_prefix_and_differ() -> None:
    ids = {answers.new_id("msg") for _ in range(100)}
    assert len(ids) == 100
    assert all(id.startswith("msg_") for id in ids)
    assert answers.new_id("toolu").startswith("toolu_")
