"""`python -m serve explain A.json B.json`: where a request stops matching the one before it, under each set of rules.

No server and no model is needed. With a checkpoint's tokenizer positions are tokens of the prompt that would be
computed; without one they are characters of system texts, tools and messages in that order, which is the order of most
chat templates (with the rule tools-first: tools, system texts, messages).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cache.radix_tree import common_prefix
from serve.api.messages import Block, CountTokensRequest, InvalidRequest, ToolUseBlock
from serve.diagnosis.divergence import RememberedRequest, difference, sections_of
from serve.diagnosis.sections import Vocabulary, message_parts, rendered_text, system_parts
from serve.prompt.conversation import blocks, tool_definitions
from serve.prompt.render import Prompt
from serve.rules.normalize import DEFAULT_RULES, RULES, normalize

Render = Callable[[CountTokensRequest, bool], Prompt]  # the flag: tools ahead of the system text


@dataclass(frozen=True)
class Comparison:
    """How far a request matches the one before it. `cause` is None where it only goes on."""

    position: int = 0
    length: int = 0
    section: str = ""
    cause: str | None = None
    here: str = ""
    there: str = ""
    refused: str = ""  # why the chat template cannot render it so; then nothing else is known


def rule_sets() -> dict[str, frozenset[str]]:
    """The sets of rules that are compared, by name: none, the default, one more at a time, all."""
    more = {f"+ {name}": DEFAULT_RULES | {name} for name in RULES if name not in DEFAULT_RULES}
    return {"none": frozenset(), ", ".join(sorted(DEFAULT_RULES)): DEFAULT_RULES, **more, "all": frozenset(RULES)}


def compare(
    old: CountTokensRequest, new: CountTokensRequest, rules: frozenset[str], render: Render, vocabulary: Vocabulary
) -> Comparison:
    """How far `new` matches `old` once the rules are applied to both."""
    before, after = (normalize(request, rules).request for request in (old, new))
    try:
        was, now = (seen(request, render(request, "tools-first" in rules)) for request in (before, after))
    except InvalidRequest as error:
        return Comparison(refused=str(error))
    shared, length = common_prefix(now.tokens, was.tokens), len(now.tokens)
    # The start of an answer is no part of what was said.
    opening = len(was.prompt.opening.encode()) if was.prompt.opening else 0
    if shared == length or shared >= len(was.tokens) - (opening if extends(after, before) else 0):
        return Comparison(shared, length)
    found = difference(now, was, shared, sections_of(now, vocabulary))
    return Comparison(shared, length, found.section, found.cause, found.here, found.there)


def seen(request: CountTokensRequest, made: Prompt) -> RememberedRequest:
    """A request of a file; here a model is what it is called."""
    return RememberedRequest("", request, made, made.tokens, request.model)


def extends(new: CountTokensRequest, old: CountTokensRequest) -> bool:
    """Whether the new request has the old one's messages, and more behind them."""
    same = all(blocks(a) == blocks(b) for a, b in zip(new.messages, old.messages, strict=False))
    return same and len(new.messages) > len(old.messages)


def characters(request: CountTokensRequest, tools_first: bool) -> Prompt:
    """A request as plain text, each character a token."""
    system = [text for _, text in system_parts(request)]
    tools = [json.dumps(tool, ensure_ascii=False) for tool in tool_definitions(request) or ()]
    frame = [*tools, *system] if tools_first else [*system, *tools]
    text = "\n\n".join([*frame, *(written(block) for _, block in message_parts(request))])
    tokens = np.frombuffer(text.encode("utf-32-le", "replace"), np.int32)
    return Prompt((text,), tokens, (len(tokens),), None, np.zeros(0, np.int32), False)


def written(block: Block) -> str:
    """A block as plain text."""
    if isinstance(block, ToolUseBlock):
        return json.dumps({"name": block.name, "arguments": block.input}, ensure_ascii=False)
    return rendered_text(block)
