"""Agent sessions over HTTP with the official SDK: what was sampled comes back, and every prompt extends the last."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import numpy as np
import pytest

from model.config import ModelConfig
from model.params import Params
from serve.api.messages import Block, MessagesRequest, TextBlock, ThinkingBlock, ToolUseBlock
from serve.formats.format import write_turn
from serve.prompt.conversation import answers
from serve.prompt.tokenizer import make_tokenizer
from tests.helpers.conversations import OPENING, answer_of, body_of, generated, is_extension, message, next_messages
from tests.helpers.model_families import AGENT_FAMILIES, FAMILIES, Family, tokenizer_of
from tests.helpers.scripted_server import context_over, listening, saying

Json = dict[str, Any]
Model = tuple[ModelConfig, Params]
TURNS = 30
VOCAB = 384  # room for the tokens of every family, so that all share one model and its compiled steps


@pytest.fixture(scope="module")
def small(tiny_model: Callable[[int], Model]) -> Model:
    """The model of this file's engines."""
    return tiny_model(VOCAB)


def returned(content: list[Any]) -> list[Json]:
    """An answer's blocks as the SDK sends them back, numbers as JavaScript writes them."""
    whole = {"limit": 1}
    blocks = [block.to_dict() for block in content]
    return [b | {"input": b["input"] | whole} if b["type"] == "tool_use" else b for b in blocks]


def said(content: list[Any]) -> list[tuple]:
    """What an answer says, ids and signatures left out."""
    kinds = {"text": ("text",), "thinking": ("thinking",), "tool_use": ("name", "input")}
    return [(block.type, *(getattr(block, name) for name in kinds[block.type])) for block in content]


def meant(answer: tuple[Block, ...]) -> list[tuple]:
    """The same of what the model was made to say."""
    parts: list[tuple] = []
    for block in answer:
        match block:
            case TextBlock(text):
                parts.append(("text", text))
            case ThinkingBlock(thinking):
                parts.append(("thinking", thinking))
            case ToolUseBlock(_, name, input):
                parts.append(("tool_use", name, input))
    return parts


# Arguments in tags have types only where the schema has them, which these answers do not keep to.
WITH_JSON = [family for family in AGENT_FAMILIES if family.name == "gpt-oss"]


@pytest.mark.parametrize("family", [*FAMILIES, *WITH_JSON], ids=lambda family: family.name)
def test_thirty_turns_of_an_agent(family: Family, small: Model) -> None:
    tokenizer, rng = tokenizer_of(family), random.Random(family.name)
    planned = [answer_of(turn, rng, family.thinks) for turn in range(TURNS)]
    forced: list[list[int]] = []

    def next_answer(request: MessagesRequest, thinking_opened: bool) -> list[int]:
        turn = len(answers(request.messages))
        forced.append(generated(planned[turn], thinking_opened, tokenizer).tolist())
        return forced[-1]

    engine, context = context_over(small, tokenizer, saying(tokenizer, VOCAB, next_answer))
    messages, previous = list(OPENING), np.zeros(0, np.int32)
    with listening(context) as url, anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as sdk:
        for turn in range(TURNS):
            body = body_of(messages, family.thinks, turn)
            counted = sdk.messages.count_tokens(**body).input_tokens
            with sdk.messages.stream(**body | {"max_tokens": 2000}) as stream:
                final = stream.get_final_message()
            asked = engine.asked[-1].tokens
            assert is_extension(asked, previous), f"turn {turn}"
            usage = final.usage
            total = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
            assert counted == total == len(asked)
            # The last token of an answer, its end, is sampled and never computed.
            assert usage.cache_read_input_tokens >= len(previous) - 1
            assert said(final.content) == meant(planned[turn])
            calls = any(block.type == "tool_use" for block in final.content)
            assert final.stop_reason == ("tool_use" if calls else "end_turn")
            assert usage.output_tokens == len(forced[-1]) + 1
            previous = np.concatenate([asked, np.asarray(forced[-1], np.int32)])
            messages += [message("assistant", *returned(final.content))]
            messages += next_messages(
                turn, tuple(ToolUseBlock(b.id, b.name, b.input) for b in final.content if b.type == "tool_use")
            )
    assert len(engine.asked) == TURNS


def tool(name: str, properties: Json, **more: Any) -> Json:
    return {"name": name, "description": name, "input_schema": {"type": "object", "properties": properties}, **more}


def found(id: str, name: str) -> Json:
    """The result of a search that found a tool."""
    return {"type": "tool_result", "tool_use_id": id, "content": [{"type": "tool_reference", "tool_name": name}]}


QUESTION = message("user", {"type": "text", "text": "Edit the notebook. " * 50})
SEARCHED = [QUESTION, message("assistant", {"type": "tool_use", "id": "toolu_0", "name": "ToolSearch", "input": {}})]
BASH, SEARCH, WRITE = (tool(name, {"path": {"type": "string"}}) for name in ("Bash", "ToolSearch", "Write"))
HOLD = tool("Placeholder", {}, defer_loading=True)
EDIT = tool("NotebookEdit", {"mode": {"enum": ["insert", "delete"]}, "cell": {"type": "integer"}}, defer_loading=True)
EDIT["input_schema"]["required"] = ["mode"]


def test_a_tool_search_reads_the_prompt_before_and_its_tool_is_known(small: Model) -> None:
    hf = tokenizer_of(next(family for family in FAMILIES if family.name == "qwen3")).hf
    tokenizer = make_tokenizer(hf, "qwen3_coder")  # whose calls have no types of their own
    says = [ToolUseBlock("", "ToolSearch", {"path": "notebook"}), ToolUseBlock("", "NotebookEdit", {"cell": 5})]

    def next_answer(request: MessagesRequest, thinking_opened: bool) -> list[int]:
        answer = (says[len(answers(request.messages))],)
        return tokenizer.encode(write_turn(tokenizer.template.format, answer)).tolist()

    engine, context = context_over(small, tokenizer, saying(tokenizer, VOCAB, next_answer))
    with listening(context) as url, anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as sdk:

        def ask(tools: list[Any], *messages: Any) -> anthropic.types.Message:
            return sdk.messages.create(model="m", max_tokens=500, system="S", tools=tools, messages=messages)

        (search,) = ask([BASH, HOLD, SEARCH, WRITE], QUESTION).content
        history = [QUESTION, message("assistant", search.to_dict()), message("user", found(search.id, "NotebookEdit"))]
        second = ask([BASH, EDIT, SEARCH, WRITE, HOLD], *history)
    (call,) = second.content
    assert call.to_dict()["input"] == {"cell": 5}, "a number by the schema of the tool that was loaded"
    before, after = (request.tokens for request in engine.asked)
    assert is_extension(after, before)
    assert second.usage.cache_read_input_tokens >= 0.99 * len(before)


def test_a_tool_that_was_loaded_can_be_demanded_and_no_other(small: Model) -> None:
    _, context = context_over(small, tokenizer_of(next(family for family in FAMILIES if family.name == "qwen2.5")))
    choice = {"type": "tool", "name": "NotebookEdit", "disable_parallel_tool_use": True}

    def ask(client: httpx.Client, name: str) -> httpx.Response:
        messages = [*SEARCHED, message("user", found("toolu_0", name))]
        body = {"model": "m", "max_tokens": 200, "temperature": 0, "tools": [BASH, EDIT, SEARCH], "tool_choice": choice}
        return client.post("/v1/messages", json=body | {"messages": messages}, timeout=60)

    with listening(context) as url, httpx.Client(base_url=url) as client:
        loaded, missing = ask(client, "NotebookEdit"), ask(client, "Bash")
    (call,) = loaded.json()["content"]
    assert call["name"] == "NotebookEdit"
    assert call["input"]["mode"] in ("insert", "delete")
    assert missing.status_code == 400
    assert "tool_choice: expected a tool that may be called" in missing.json()["error"]["message"]
