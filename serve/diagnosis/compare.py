"""`python -m serve explain A.json B.json`: where a request stops matching the one before it, under each set of rules.

This needs no server and no weights. With a checkpoint's tokenizer, positions are tokens of the rendered prompt. Without
one they are characters of the plain text that `characters` makes of a request.
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
from serve.prompt.conversation import blocks, shown, tool_definitions
from serve.prompt.offered_tools import offered_tools
from serve.prompt.render import Prompt
from serve.rules.normalize import DEFAULT_RULES, RULES, normalize

Render = Callable[[CountTokensRequest, bool], Prompt]  # the flag: tools before the system text


@dataclass(frozen=True)
class Comparison:
    """How far a request matches the one before it. `cause` is None if it only continues that one."""

    position: int = 0
    length: int = 0
    section: str = ""
    cause: str | None = None
    prompt_text: str = ""  # a few tokens from the mismatch position on
    nearest_text: str = ""  # the same of the request before
    refused: str = ""  # why the chat template cannot render it, if so; then the other fields are not set


def rule_sets() -> dict[str, frozenset[str]]:
    """The sets of rules to compare, by name: none, the default, the default and one more, all."""
    more = {f"+ {name}": DEFAULT_RULES | {name} for name in RULES if name not in DEFAULT_RULES}
    return {"none": frozenset(), ", ".join(sorted(DEFAULT_RULES)): DEFAULT_RULES, **more, "all": frozenset(RULES)}


def compare(
    old: CountTokensRequest, new: CountTokensRequest, rules: frozenset[str], render: Render, vocabulary: Vocabulary
) -> Comparison:
    """How far `new` matches `old` after the rules were applied to both."""
    before, after = (normalize(request, rules).request for request in (old, new))
    try:
        old_made, new_made = (
            as_remembered(request, render(request, "tools-first" in rules)) for request in (before, after)
        )
    except InvalidRequest as error:
        return Comparison(refused=str(error))
    shared, length = common_prefix(new_made.tokens, old_made.tokens), len(new_made.tokens)
    # The text that opens an answer is not part of the conversation.
    opening = len(old_made.prompt.opening.encode()) if old_made.prompt.opening else 0
    if shared == length or shared >= len(old_made.tokens) - (opening if extends(after, before) else 0):
        return Comparison(shared, length)
    found = difference(new_made, old_made, shared, sections_of(new_made, vocabulary))
    return Comparison(shared, length, found.section, found.cause, found.prompt_text, found.nearest_text)


def as_remembered(request: CountTokensRequest, made: Prompt) -> RememberedRequest:
    """A request of a file, with the name of its model in place of the weights' fingerprint."""
    return RememberedRequest("", request, made, made.tokens, request.model)


def extends(new: CountTokensRequest, old: CountTokensRequest) -> bool:
    """Whether the new request has the old one's messages, and more after them."""
    same = all(blocks(a) == blocks(b) for a, b in zip(shown(new.messages), shown(old.messages), strict=False))
    return same and len(new.messages) > len(old.messages)


def characters(request: CountTokensRequest, tools_first: bool) -> Prompt:
    """A request as plain text, each character a token: system texts, tools, messages.

    That is the order of most chat templates. With `tools_first` the tools come first.
    """
    system = [text for _, text in system_parts(request)]
    tools = [json.dumps(tool, ensure_ascii=False) for tool in tool_definitions(request) or ()]
    frame = [*tools, *system] if tools_first else [*system, *tools]
    messages = shown(offered_tools(request).messages)
    text = "\n\n".join([*frame, *(block_as_text(block) for _, block in message_parts(messages))])
    tokens = np.frombuffer(text.encode("utf-32-le", "replace"), np.int32)
    return Prompt((text,), tokens, (len(tokens),), None, np.zeros(0, np.int32), False)


def block_as_text(block: Block) -> str:
    """A block as plain text."""
    if isinstance(block, ToolUseBlock):
        return json.dumps({"name": block.name, "arguments": block.input}, ensure_ascii=False)
    return rendered_text(block)
