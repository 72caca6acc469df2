"""Conversations in the shape of an agent's: what the model says in each turn, and what the client sends back of it."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np

from serve.api.messages import Block, CountTokensRequest, TextBlock, ThinkingBlock, ToolUseBlock, decode_count_tokens
from serve.formats.format import write_turn
from serve.prompt.tokenizer import Tokenizer

Json = dict[str, Any]


def message(role: str, *content: Json) -> Json:
    return {"role": role, "content": list(content)}


def text(value: str) -> Json:
    return {"type": "text", "text": value}


TOOLS = [
    {
        "name": name,
        "description": f"{name}s a file.",
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}, "limit": {"type": "number"}}},
    }
    for name in ("Read", "Edit")
]


def answer_of(turn: int, rng: random.Random, thinks: bool) -> tuple[Block, ...]:
    """What the model says in a turn: mostly a call, sometimes two, sometimes words only."""
    input = {"path": f"/tmp/a{turn}.py", "limit": 1.0, "nested": {"z": [1.0, 2.5, None, True], "é": 'a "b"\n<c>'}}
    calls = [
        ToolUseBlock(f"toolu_{turn:02}{n}{rng.getrandbits(40):010x}", "Read", input)
        for n in range((0, 1, 1, 2, 1)[turn % 5])
    ]
    thought = [ThinkingBlock(f"The user wants the thing number {turn}.\nI read it.")] if thinks and turn % 3 else []
    words = [TextBlock(f"I look at the file, turn {turn}.")] if turn % 4 or not calls else []
    return (*thought, *words, *calls)


def back(answer: tuple[Block, ...]) -> list[Json]:
    """An answer's blocks as a client sends them that keeps no signatures: through JavaScript's JSON."""
    parts: list[Json] = []
    for block in answer:
        if isinstance(block, ThinkingBlock):
            parts.append({"type": "thinking", "thinking": block.thinking, "signature": ""})
        elif isinstance(block, TextBlock):
            parts.append(text(block.text))
        elif isinstance(block, ToolUseBlock):
            limit = {"limit": 1, "nested": block.input["nested"] | {"z": [1, 2.5, None, True]}}
            parts.append({"type": "tool_use", "id": block.id, "name": block.name, "input": block.input | limit})
    return parts


def next_messages(turn: int, answer: tuple[Block, ...]) -> list[Json]:
    """The client's messages after an answer: results, words of the user, reminders."""
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": f'line {turn}\n  "x": <y>\n'}
        for block in answer
        if isinstance(block, ToolUseBlock)
    ]
    words = [text(f"Go on with {turn}, please.")] if not results or turn % 3 == 0 else []
    reminder = [message("system", text(f"Token usage: {turn}"))] if turn % 4 == 1 else []
    return [message("user", *results, *words), *reminder]


def body_of(messages: list[Json], thinking: bool, turn: int) -> Json:
    """A body: the cache marker on the last block, lone texts as strings in every other request."""
    shaped = [
        {"role": m["role"], "content": m["content"][0]["text"]}
        if turn % 2 and len(m["content"]) == 1 and m["content"][0]["type"] == "text"
        else m
        for m in messages[:-1]
    ]
    *others, last = messages[-1]["content"]
    marked = messages[-1] | {"content": [*others, last | {"cache_control": {"type": "ephemeral"}}]}
    system = [text("You are an agent."), text("Work in /tmp.") | {"cache_control": {"type": "ephemeral"}}]
    body = {"model": "m", "system": system, "tools": TOOLS, "messages": [*shaped, marked]}
    return body | ({"thinking": {"type": "adaptive"}} if thinking else {})


def sent(messages: list[Json], thinking: bool, turn: int) -> CountTokensRequest:
    """The same, as the server reads it."""
    return decode_count_tokens(json.dumps(body_of(messages, thinking, turn)).encode())


def generated(answer: tuple[Block, ...], in_thinking: bool, tokenizer: Tokenizer) -> np.ndarray:
    """Ids that a model might sample for an answer: other whitespace in its JSON, and no merges of the tokenizer.

    `in_thinking`: the prompt has opened thinking already.
    """
    written = write_turn(tokenizer.template.format, answer).replace('": ', '" :  ')
    if in_thinking:
        opening, closing = tokenizer.template.format.think or ("", "")
        written = written.removeprefix(opening) if written.startswith(opening) else closing + written
    controls = tokenizer.template.control_tokens
    assert controls is not None
    ids: list[np.ndarray] = []
    start = 0
    for control in [*controls.finditer(written), None]:
        end = control.start() if control else len(written)
        ids += [tokenizer.encode(character) for character in written[start:end]]
        if control:
            ids.append(tokenizer.encode(control[0]))
            start = control.end()
    return np.concatenate(ids)


def is_extension(longer: np.ndarray, shorter: np.ndarray) -> bool:
    return len(longer) >= len(shorter) and bool((longer[: len(shorter)] == shorter).all())


OPENING = [message("user", text("Fix the bug.")), message("system", text("# Environment\nThe folder is /tmp."))]
