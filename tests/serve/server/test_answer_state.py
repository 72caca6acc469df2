"""The state of an answer by itself: tokens in, events of the API out, without a server, an engine or a clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from msgspec import UNSET

from serve.api.answers import (
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    Event,
    InputJsonDelta,
    MessageDelta,
    MessageStart,
    MessageStop,
    SignatureDelta,
    Stop,
    ToolCallDispatch,
    encode,
)
from serve.api.messages import MessagesRequest, TextBlock, ToolUseBlock, decode_request
from serve.api.stops import Stops
from serve.engine.request import Started
from serve.formats.stream import AnswerStream
from serve.server.answer import filled
from serve.server.answer_state import AnswerState, reused_by_tier
from tests.helpers.model_families import FAMILIES, tokenizer_of

TOKENIZER = tokenizer_of(next(family for family in FAMILIES if family.name == "qwen3"))
CALL = '<tool_call>\n{"name": "Read", "arguments": {"path": "a.py"}}\n</tool_call>'
STARTED = Started(100, 80, 0.1, 0.2, {"disk": 30})
READ = {"name": "Read", "input_schema": {"type": "object"}}


def request(**more: Any) -> MessagesRequest:
    asked = {"model": "any", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], "tools": [READ]}
    return decode_request(encode(asked | more))


def state_of(begun: str = "", stops: tuple[str, ...] = (), dispatch: bool = False, **more: Any) -> AnswerState:
    """The state of an answer to a request; its prompt ends with `begun`."""
    message = request(**more)
    ids = tuple(TOKENIZER.encode(begun).tolist())
    tools = {tool.name: tool.input_schema for tool in message.tools or ()}
    return AnswerState(
        id="msg_1",
        message=message,
        stream=AnswerStream(
            TOKENIZER.hf.backend_tokenizer, TOKENIZER.template.format, Stops(stops), tools, begun=list(ids)
        ),
        begun=ids,
        sign=lambda ids: f"signed {len(ids)}",
        encode=TOKENIZER.encode_after,
        dispatch=dispatch,
    )


def feed(state: AnswerState, text: str) -> list[Event]:
    """The events of a text, token by token, until the answer has ended."""
    events: list[Event] = []
    for token in TOKENIZER.encode(text).tolist():
        if state.ended:
            break
        events += state.on_token(token)
    return events


def text_of(events: list[Event]) -> str:
    return "".join(event.delta.text for event in events if isinstance(event, ContentBlockDelta))  # type: ignore[union-attr]


def end_of(state: AnswerState) -> tuple[Stop, int]:
    """How the message ends: its stop, and the output tokens."""
    delta, stop = state.finish()
    assert isinstance(delta, MessageDelta)
    assert isinstance(stop, MessageStop)
    return delta.delta, delta.usage.output_tokens


def test_the_start_has_the_counts_of_the_prompt_and_where_they_came_from() -> None:
    state = state_of()
    (event,) = state.on_started(STARTED, UNSET)
    assert isinstance(event, MessageStart)
    usage = event.message.usage
    assert (usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens) == (1, 19, 80)
    assert usage.cache_read_by_tier == reused_by_tier(STARTED) == {"device": 50, "disk": 30}
    assert event.message.id == "msg_1"


def test_text_is_one_block_and_the_stop_id_counts_as_a_token() -> None:
    state = state_of()
    events = feed(state, "Hello there") + state.on_finished("stop") + state.close()
    assert isinstance(events[0], ContentBlockStart)
    assert isinstance(events[-1], ContentBlockStop)
    assert text_of(events) == "Hello there"
    assert state.blocks.blocks == [TextBlock("Hello there")]
    assert end_of(state) == (Stop("end_turn", None), len(TOKENIZER.encode("Hello there")) + 1)


@pytest.mark.parametrize(("clamped", "reason"), [(False, "max_tokens"), (True, "model_context_window_exceeded")])
def test_an_answer_that_ran_out_of_tokens_says_of_which(clamped: bool, reason: str) -> None:
    state = replace(state_of(), clamped=clamped)
    feed(state, "Hi")
    state.on_finished("length")
    state.close()
    assert end_of(state) == (Stop(reason, None), len(TOKENIZER.encode("Hi")))  # type: ignore[arg-type]


def test_a_stop_sequence_ends_the_answer_and_is_not_part_of_it() -> None:
    state = state_of(stops=("END",))
    events = feed(state, "One END two")
    assert state.ended
    assert text_of(events) == "One "
    state.close()
    assert end_of(state)[0] == Stop("stop_sequence", "END")


def test_several_calls_are_blocks_in_order_and_each_is_dispatched_after_its_block() -> None:
    state = state_of(dispatch=True)
    events = feed(state, f"{CALL}\n{CALL}") + state.on_finished("stop") + state.close()
    assert not state.ended, "the engine says when it ends"
    assert [type(event) for event in events] == [
        *(ContentBlockStart, ContentBlockDelta, ContentBlockStop, ToolCallDispatch),
        *(ContentBlockStart, ContentBlockDelta, ContentBlockStop, ToolCallDispatch),
    ]
    assert [event.tool_call.index for event in events if isinstance(event, ToolCallDispatch)] == [0, 1]
    assert all(isinstance(block, ToolUseBlock) for block in state.blocks.blocks)
    assert end_of(state)[0] == Stop("tool_use", None)


def test_the_only_call_that_is_allowed_ends_the_answer_and_its_tokens_are_completed() -> None:
    state = state_of(tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    feed(state, f"{CALL}\nand more")
    assert state.ended
    assert TOKENIZER.hf.decode(state.ids) == CALL, "as the conversation's history has it"
    state.close()
    assert end_of(state)[0] == Stop("tool_use", None)


def test_without_parallel_calls_forbidden_nothing_is_completed() -> None:
    state = state_of()
    feed(state, CALL)
    assert not state.ended
    assert state.sampled_ids == TOKENIZER.encode(CALL).tolist()


def test_tokens_that_the_client_has_begun_are_kept_apart_from_the_sampled_ones() -> None:
    state = state_of(begun="Well, ")
    feed(state, "yes")
    assert state.sampled_ids == TOKENIZER.encode("yes").tolist()
    assert state.ids == [*TOKENIZER.encode("Well, ").tolist(), *state.sampled_ids]
    assert state.sampled == len(state.sampled_ids)


def test_thinking_is_signed_over_all_tokens_up_to_its_end() -> None:
    state = state_of(thinking={"type": "adaptive"})
    text = "<think>\nFirst.\n</think>"
    events = feed(state, text) + state.on_finished("stop") + state.close()
    deltas = [event.delta for event in events if isinstance(event, ContentBlockDelta)]
    signatures = [delta.signature for delta in deltas if isinstance(delta, SignatureDelta)]
    assert signatures == [f"signed {len(TOKENIZER.encode(text))}"]


def test_a_call_that_was_cut_off_is_a_block_with_the_beginning_of_its_arguments() -> None:
    state = state_of()
    text = 'Look:\n<tool_call>\n{"name": "Read", "arguments": {"path": "a.py", "n": 3, "text": "half'
    events = feed(state, text) + state.on_finished("length") + state.close()
    delta, stop = events[-2:]
    assert isinstance(delta, ContentBlockDelta)
    assert delta.delta == InputJsonDelta('{"path":"a.py","n":3,"text":"half')
    assert isinstance(stop, ContentBlockStop)
    text_block, call = state.blocks.blocks
    assert text_block == TextBlock("Look:")
    assert isinstance(call, ToolUseBlock)
    assert (call.name, call.input) == ("Read", {"path": "a.py", "n": 3})
    assert filled(ToolUseBlock(call.id, call.name, {}), delta.delta.partial_json, "") == call
    assert end_of(state)[0] == Stop("max_tokens", None)


@pytest.mark.parametrize("shown", [{"type": "adaptive"}, {"type": "adaptive", "display": "omitted"}, None])
def test_calls_at_the_end_of_thinking_are_blocks_after_it(shown: dict[str, str] | None) -> None:
    state = state_of(**({"thinking": shown} if shown else {}))
    text = f"<think>\nI need it.\n{CALL}"
    assert not any(isinstance(e, ContentBlockDelta) and "tool_call" in repr(e) for e in feed(state, text))
    state.on_finished("stop")
    state.close()
    *thinking, call = state.blocks.blocks
    assert isinstance(call, ToolUseBlock)
    assert call.input == {"path": "a.py"}
    assert len(thinking) == (shown is not None)
    if thinking:
        assert thinking[0].signature == f"signed {len(TOKENIZER.encode(text))}"  # type: ignore[union-attr]
    assert end_of(state)[0] == Stop("tool_use", None)
    assert state.sampled_ids == TOKENIZER.encode(text).tolist(), "as sampled, for the next request"
