"""Conversations in the formats of the models that agents run: prompts extend each other, results name their calls."""

from __future__ import annotations

import json
import logging
import random
import re
from typing import Any

import msgspec
import numpy as np
import pytest

from serve.api.messages import decode_count_tokens
from serve.formats.readers import Call
from serve.formats.stream import NO_STOPS, AnswerStream
from serve.prompt.render import Prompt, prompt, render_text
from serve.prompt.replay import RecordedAnswer, ReplayLog
from tests.helpers.conversations import (
    OPENING,
    answer_of,
    back,
    generated,
    is_extension,
    message,
    next_messages,
    sent,
    text,
)
from tests.helpers.model_families import AGENT_FAMILIES, Family, tokenizer_of

Json = dict[str, Any]
SCOPE = b"key and model"
TURNS = 15
# The families whose prompts open thinking.
OPENED = {False: {"minimax-m2"}, True: {"glm-4.7", "minimax-m2", "nemotron-nano"}}
FAMILY = {family.name: family for family in AGENT_FAMILIES}


@pytest.fixture(autouse=True)
def nothing_is_rendered_whole(caplog: pytest.LogCaptureFixture) -> Any:
    with caplog.at_level(logging.WARNING, "tokenzero.render"):
        yield
    assert not [record.message for record in caplog.records if "whole conversations" in record.message]


def begun(made: Prompt) -> list[np.ndarray | str]:
    """The segments of a prompt without the end that the history does not have."""
    *front, end = made.segments
    assert isinstance(end, str)
    assert made.opening is not None
    assert end.endswith(made.opening)
    return [*front, end.removesuffix(made.opening)]


def test_each_family_has_its_format() -> None:
    assert {family.name: tokenizer_of(family).template.format.name for family in AGENT_FAMILIES} == {
        "glm-4.6": "glm45",
        "glm-4.7": "glm47",
        "kimi-k2": "kimi_k2",
        "minimax-m2": "minimax_m2",
        "gpt-oss": "harmony",
        "nemotron-nano": "nemotron",
    }


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("family", AGENT_FAMILIES, ids=lambda family: family.name)
class TestSessions:
    def test_every_prompt_extends_the_one_before_and_what_was_sampled(self, family: Family, thinking: bool) -> None:
        tokenizer, log, rng = tokenizer_of(family), ReplayLog(), random.Random(family.name)
        messages, previous = list(OPENING), np.zeros(0, np.int32)
        for turn in range(TURNS):
            request = sent(messages, thinking, turn)
            made = prompt(request, tokenizer, log.recall(SCOPE, request.messages))
            assert is_extension(made.tokens, previous), f"turn {turn}"
            answer = answer_of(turn, rng, thinking)
            assert made.thinking == (family.name in OPENED[thinking])
            ids = generated(answer, made.thinking, tokenizer)
            assert made.opening is not None
            previous = np.concatenate([made.tokens, ids])
            log.put(SCOPE, request.messages, answer, RecordedAnswer(made.opening, ids))
            messages += [message("assistant", *back(answer)), *next_messages(turn, answer)]

    def test_without_records_every_prompt_extends_the_one_before(self, family: Family, thinking: bool) -> None:
        tokenizer, rng = tokenizer_of(family), random.Random(family.name)
        messages, previous = list(OPENING), np.zeros(0, np.int32)
        for turn in range(TURNS):
            made = prompt(sent(messages, thinking, turn), tokenizer)
            assert is_extension(made.tokens, previous), f"turn {turn}"
            kept = begun(made)
            previous = np.concatenate([tokenizer.encode(p) if isinstance(p, str) else p for p in kept])
            answer = answer_of(turn, rng, thinking)
            messages += [message("assistant", *back(answer)), *next_messages(turn, answer)]


def answered(family: str, *calls: Json, results: dict[str, str], thinking: bool = False) -> str:
    """The prompt's text after an answer with calls and their results."""
    asked: list[Json] = [message("user", text("Go."))]
    for call in calls:
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": results[call["id"]]}
        asked += [message("assistant", call), message("user", result)]
    tools = [{"name": name, "input_schema": {"type": "object"}} for name in ("Read", "List")]
    body = {"model": "m", "tools": tools, "messages": asked}
    return render_text(decode_count_tokens(json.dumps(body).encode()), tokenizer_of(FAMILY[family]))


def use(id: str, name: str) -> Json:
    return {"type": "tool_use", "id": id, "name": name, "input": {"path": "a"}}


def test_harmony_names_each_result_after_its_call() -> None:
    written = answered("gpt-oss", use("a", "Read"), use("b", "List"), results={"a": "one", "b": "two"})
    assert '<|start|>functions.Read to=assistant<|channel|>commentary<|message|>"one"<|end|>' in written
    assert '<|start|>functions.List to=assistant<|channel|>commentary<|message|>"two"<|end|>' in written
    call = '<|start|>assistant<|channel|>commentary to=functions.List <|constrain|>json<|message|>{"path": "a"}<|call|>'
    assert call in written


def test_a_name_with_a_control_token_stays_text_where_results_have_it() -> None:
    request = decode_count_tokens(
        json.dumps(
            {
                "model": "m",
                "messages": [
                    message("user", text("Go.")),
                    message("assistant", use("a", "x<|end|>y")),
                    message("user", {"type": "tool_result", "tool_use_id": "a", "content": "one"}),
                ],
            }
        ).encode()
    )
    for family in AGENT_FAMILIES:
        tokenizer = tokenizer_of(family)
        plain = decode_count_tokens(msgspec.json.encode(request).replace(b"x<|end|>y", b"xandy"))
        controls = {i for i, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
        counts = [sum(int(t) in controls for t in prompt(r, tokenizer).tokens) for r in (request, plain)]
        assert counts[0] == counts[1], family.name


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (("toolu_01AbC", "toolu_02AbC"), ("functions.Read:0", "functions.List:1")),
        (("functions.Read:4", "functions.List:5"), ("functions.Read:4", "functions.List:5")),
        ((f"toolu_{'0' * 24}_7", f"toolu_{'1' * 24}_8"), ("functions.Read:7", "functions.List:8")),
        (("same", "same"), ("functions.Read:0", "functions.List:1")),
    ],
)
def test_kimis_ids_hold_the_name_and_the_number_of_the_call(ids: tuple[str, str], expected: tuple[str, str]) -> None:
    written = answered("kimi-k2", use(ids[0], "Read"), use(ids[1], "List"), results=dict.fromkeys(ids, "one"))
    for name, id in zip(("Read", "List"), expected, strict=True):
        assert f'<|tool_call_begin|>{id}<|tool_call_argument_begin|>{{"path": "a"}}<|tool_call_end|>' in written
        assert f"<|im_system|>{name}<|im_middle|>## Return of {id}\none<|im_end|>" in written


def test_a_call_that_kimi_numbered_has_its_number_in_the_history() -> None:
    tokenizer = tokenizer_of(FAMILY["kimi-k2"])
    stream = AnswerStream(
        tokenizer.hf.backend_tokenizer, tokenizer.template.format, NO_STOPS, {"Read": {"type": "object"}}
    )
    (call,) = [
        event
        for event in stream.read(
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.Read:12<|tool_call_argument_begin|>{}"
        )
        if isinstance(event, Call)
    ]
    assert re.fullmatch("[a-zA-Z0-9_-]+", call.id)
    assert "## Return of functions.Read:12\n" in answered("kimi-k2", use(call.id, "Read"), results={call.id: "one"})


def test_an_answer_that_the_client_begins_goes_on_in_the_final_channel() -> None:
    tokenizer = tokenizer_of(FAMILY["gpt-oss"])
    body = {"model": "m", "messages": [message("user", text("Go.")), message("assistant", text("So it"))]}
    made = prompt(decode_count_tokens(json.dumps(body).encode()), tokenizer)
    assert made.opening == "<|channel|>final<|message|>"
    assert tokenizer.hf.decode(made.tokens).endswith("<|start|>assistant<|channel|>final<|message|>So it")
