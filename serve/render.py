"""Canonical request -> token ids: the checkpoint's own chat template, then tokenisation segment by segment.

A prompt is cut at its special tokens and every piece between them is tokenised once and remembered, so a request that
extends an earlier one tokenises only what is new. Nothing here changes a request; that is `normalize`'s business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from cachetools import LRUCache, cached

from serve.messages import (
    Block,
    CountTokensRequest,
    DocumentBlock,
    InputMessage,
    InvalidRequest,
    ResultBlock,
    TextBlock,
    ThinkingBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
)

SEGMENT_BYTES = 128 * 2**20  # of segments that are remembered, text and ids, about


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with its chat template and a remembering `encode`."""

    hf: Any
    encode: Callable[[str], np.ndarray]  # text -> [tokens] int32, special tokens recognised, none added


def load_tokenizer(folder: str) -> Tokenizer:
    """Read the tokenizer of a checkpoint; raises ValueError if it is not a fast one or has no chat template."""
    from transformers import AutoTokenizer

    if not Path(folder, "tokenizer.json").is_file():
        raise ValueError(
            f"{folder}: expected a tokenizer.json, found none: write one with transformers' save_pretrained"
        )
    hf = AutoTokenizer.from_pretrained(folder)
    if not getattr(hf, "is_fast", False):
        raise ValueError(f"{folder}: expected a tokenizer.json, found a slow tokenizer: convert it with transformers")
    if not hf.chat_template:
        raise ValueError(
            f"{folder}: the tokenizer has no chat_template, which chat requests are rendered with: add one"
        )
    return Tokenizer(hf, make_encoder(hf))


def make_encoder(hf: Any) -> Callable[[str], np.ndarray]:
    """`encode` for a tokenizer: by remembered segments where that is exact, else over the whole text."""

    def whole(text: str) -> np.ndarray:
        return np.asarray(hf.backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    if not splits_at_added_tokens(hf):
        return whole
    added = {str(token): index for index, token in hf.added_tokens_decoder.items()}
    # Longest first, as the tokenizer itself prefers them.
    cut = re.compile("(" + "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)) + ")")
    # Bounded by size and not by number, since it is the clients who choose how long a segment is.
    memory: LRUCache[Any, np.ndarray] = LRUCache(maxsize=SEGMENT_BYTES, getsizeof=lambda ids: 2 * ids.nbytes)
    remembered = cached(memory, lock=Lock())(whole)

    def encode(text: str) -> np.ndarray:
        pieces = [p for p in cut.split(text) if p]
        ids = [np.asarray([added[p]], np.int32) if p in added else remembered(p) for p in pieces]
        return np.concatenate(ids) if ids else np.zeros(0, np.int32)

    return encode


def splits_at_added_tokens(hf: Any) -> bool:
    """Whether tokenising the pieces between added tokens is the same as tokenising the whole text.

    It is for byte-level tokenizers whose added tokens match verbatim; a tokenizer that puts a blank before the first
    word only (Metaspace, Prepend), or whose tokens swallow the blanks around them, sees a piece's context.
    """
    tokens = hf.added_tokens_decoder.values()
    if not tokens or any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in tokens):
        return False
    spec = json.loads(hf.backend_tokenizer.to_str())
    parts = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    return not any(name in parts for name in ('"Metaspace"', '"Prepend"', '"Strip"', '"add_prefix_space": true'))


def render(request: CountTokensRequest, tokenizer: Tokenizer) -> np.ndarray:
    """The prompt's token ids, [tokens] int32. Raises InvalidRequest if the chat template refuses the conversation."""
    return tokenizer.encode(render_text(request, tokenizer))


def render_text(request: CountTokensRequest, tokenizer: Tokenizer) -> str:
    """The prompt as text, special tokens included."""
    from jinja2.exceptions import TemplateError

    messages, prefilled = conversation(request), is_prefilled(request)
    thinking = request.thinking is not None and request.thinking.type != "disabled"
    try:
        return tokenizer.hf.apply_chat_template(
            messages,
            tools=tool_definitions(request),
            add_generation_prompt=not prefilled,
            continue_final_message=prefilled,
            enable_thinking=thinking,
            tokenize=False,
        )
    # RecursionError: JSON that is nested too deeply for the template's `tojson`.
    except (TemplateError, ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"messages: the model's chat template refuses this conversation: {error}") from error


def is_prefilled(request: CountTokensRequest) -> bool:
    """Whether the last message is the start of the assistant's answer, to be continued."""
    last = request.messages[-1]
    return last.role == "assistant" and not any(isinstance(b, ToolUseBlock) for b in blocks(last))


def tool_definitions(request: CountTokensRequest) -> list[dict] | None:
    """The tools in the form that chat templates take; None where there are none."""
    if not request.tools:
        return None
    return [
        {
            "type": "function",
            "function": {"name": t.name, "description": t.description or "", "parameters": t.input_schema},
        }
        for t in request.tools
    ]


def conversation(request: CountTokensRequest) -> list[dict]:
    """The request as a chat template's messages: the system text first, tool results as turns of role `tool`."""
    system = request.system if isinstance(request.system, str) else join(request.system or ())
    head = [{"role": "system", "content": system}] if system else []
    return head + [turn for message in request.messages for turn in turns(message)]


def turns(message: InputMessage) -> list[dict]:
    """One message of the API as one or more of a chat template."""
    if message.role == "assistant":
        return [assistant_turn(message)]
    result: list[dict] = []
    texts: list[Block] = []
    for block in blocks(message):
        if isinstance(block, ToolResultBlock):
            if texts:
                result.append({"role": message.role, "content": join(texts)})
                texts = []
            result.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result_text(block)})
        else:
            texts.append(block)
    if texts or not result:
        result.append({"role": message.role, "content": join(texts)})
    return result


def assistant_turn(message: InputMessage) -> dict:
    """An assistant message: text, reasoning and tool calls."""
    turn: dict[str, Any] = {"role": "assistant", "content": join(blocks(message))}
    thoughts = "\n\n".join(b.thinking for b in blocks(message) if isinstance(b, ThinkingBlock))
    calls = [
        {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": b.input}}
        for b in blocks(message)
        if isinstance(b, ToolUseBlock)
    ]
    return turn | ({"reasoning_content": thoughts} if thoughts else {}) | ({"tool_calls": calls} if calls else {})


def blocks(message: InputMessage) -> tuple[Block, ...]:
    """A message's content as blocks; a plain string is one text block, so both forms render alike."""
    return (TextBlock(message.content),) if isinstance(message.content, str) else message.content


def result_text(block: ToolResultBlock) -> str:
    """What a tool returned, as text; an error is marked as one."""
    text = block.content if isinstance(block.content, str) else join(block.content or ())
    return f"Error: {text}" if block.is_error and not text.startswith("Error") else text


def join(content: tuple[Block | ResultBlock, ...] | list[Block]) -> str:
    """The texts among the blocks, separated by blank lines."""
    return "\n\n".join(text for block in content if (text := block_text(block)))


def block_text(block: Block | ResultBlock) -> str:
    """What a block adds to the visible text of its turn."""
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, DocumentBlock):
        return "\n".join(part for part in (block.title, block.context, block.source.data) if part)
    if isinstance(block, ToolReferenceBlock):
        return block.tool_name
    return ""
