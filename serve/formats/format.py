"""A format: how one family of models writes thinking and tool calls, and an assistant turn as text in that format.

Pure data and pure functions, without tokens and HTTP. `families` has the table of formats; `stream.AnswerStream` parses
what `write_turn` writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve.api.messages import Block, TextBlock, ThinkingBlock, ToolUseBlock
from serve.formats.readers import SPACE, Reader, Source


@dataclass(frozen=True)
class Format:
    """How a family of models writes an assistant turn. A delimiter may be one token, special or not, or several."""

    name: str
    think: tuple[str, str] | None = ("<think>\n", "\n</think>\n\n")  # around thinking, as written
    call: Callable[[ToolUseBlock], str] | None = None  # writes one call; None if the models cannot call tools
    read: Reader | None = None  # reads a call, or a group of calls, from its opening delimiter on
    call_openers: tuple[str, ...] = ()  # the delimiters that may begin a call
    call_without_marker: bool = False  # a `{` may begin a call as well, and at the start of a block a `[`
    delimiters_inside_text: bool = True  # delimiters count inside text, not only at the start of a block
    extra_delimiters: tuple[str, ...] = ()  # inside calls and after them
    before: str = ""  # written before the first of consecutive calls
    between: str = "\n"  # between two of them
    after: str = ""  # after the last of them
    text_call_separator: str = "\n"  # between text and a call
    parameter: tuple[str, str] | None = None  # around an argument that stands in tags, with {} for its name
    call_id: str = "[A-Za-z0-9]{9}"  # a pattern of what the models write for the id of a call
    history_id: Callable[[str, str, int], str] | None = None  # (name, id, calls before it) -> its id in the history
    named_results: bool = False  # chat templates name a result after the call before it
    call_end: str = ""  # the token that ends a turn of calls, where another one ends a turn of text
    ends_with_call: bool = False  # an answer has one call, as the models end their turn after it
    # For models that write each part of an answer as a message with a header (gpt-oss). `read` reads headers as well.
    headers: tuple[str, ...] = ()  # the delimiters that may begin or end a message, in text and in thinking
    leading: tuple[str, ...] = ()  # those at the start of an answer, whose first header the prompt has begun
    think_tokens: tuple[str, str] | None = None  # the delimiters in `think`, where it has more than them and whitespace
    answer_header: str = ""  # written before an answer that is text only
    write: Callable[[Sequence[Block]], str] | None = None  # writes all blocks of a turn
    hints: tuple[str, ...] = ()  # a chat template that contains all of these has this format

    @property
    def think_delimiters(self) -> tuple[str, str] | None:
        """The delimiters that open and close thinking, without the whitespace around them."""
        if self.think_tokens:
            return self.think_tokens
        return (self.think[0].strip(SPACE), self.think[1].strip(SPACE)) if self.think else None

    @property
    def delimiters(self) -> tuple[str, ...]:
        """All delimiters. Special tokens with these texts must be kept when an answer is decoded."""
        return (*(self.think_delimiters or ()), *self.call_openers, *self.headers, *self.extra_delimiters)


def to_json(value: Any) -> str:
    r"""JSON as models write it: keys in their order, `, ` and `: ` as separators, no \u escapes."""
    return json.dumps(value, ensure_ascii=False)


def json_call(call: ToolUseBlock, arguments: str = "arguments") -> str:
    """A call as a JSON object with its name and arguments."""
    return f'{{"name": {to_json(call.name)}, "{arguments}": {to_json(call.input)}}}'


def tagged_arguments(input: dict[str, Any], parameter: tuple[str, str]) -> str:
    """Arguments in tags, strings as they are and other values as JSON."""
    opening, closing = parameter
    values = ((key, value if isinstance(value, str) else to_json(value)) for key, value in input.items())
    return "".join(f"{opening.replace('{}', key)}{value}{closing}" for key, value in values)


def format_for_json(format: Format) -> Format:
    """The format for answers that are JSON, or calls instead. Delimiters inside JSON are text."""
    return replace(format, delimiters_inside_text=False)


def within_thinking(format: Format, written: str) -> bool:
    """Whether an answer that begins with the text `written` continues inside thinking."""
    delimiters = format.think_delimiters
    return delimiters is not None and written.rfind(delimiters[0]) > written.rfind(delimiters[1])


def write_turn(format: Format, blocks: Iterable[Block]) -> str:
    """An assistant turn as the model would have written it, without the generation prompt and the end of the turn.

    Redacted thinking and empty texts add nothing, nor do calls in a format without calls. `AnswerStream` reads the same
    blocks back, with these exceptions:

    - Texts and thinking that contain delimiters, or whitespace next to one.
    - Neighbouring texts, which become one.
    - Ids, which most formats do not write.
    - In formats with arguments in tags, values that have another type by their schema.
    - In `llama3`, text that looks like a call.
    """
    kept = [b for b in blocks if is_written(format, b)]
    if format.write:
        return format.write(kept)
    parts: list[str] = []
    for before, block, after in zip([None, *kept], kept, [*kept[1:], None], strict=False):
        parts.append(separator(format, before, block))
        if isinstance(block, ThinkingBlock):
            assert format.think
            parts += [format.think[0], block.thinking, format.think[1]]
        elif isinstance(block, TextBlock):
            parts.append(block.text)
        elif isinstance(block, ToolUseBlock):
            assert format.call
            first, last = not isinstance(before, ToolUseBlock), not isinstance(after, ToolUseBlock)
            parts += [format.before * first, format.call(block), format.after * last]
    return "".join(parts)


def text_after_call(format: Format) -> str:
    """The text between a complete last call and the end of the turn."""
    assert format.read
    source = Source()
    source.add(write_turn(format, [ToolUseBlock("any", "any", {})]))
    next(filter(None, format.read(source, {"any": {}})))
    return source.text[source.at :]


def is_written(format: Format, block: Block) -> bool:
    """Whether a block adds any text to a turn in this format."""
    match block:
        case TextBlock():
            return bool(block.text)
        case ThinkingBlock():
            return bool(block.thinking) and format.think is not None
        case ToolUseBlock():
            return format.call is not None
    return False


def separator(format: Format, before: Block | None, block: Block) -> str:
    """The text between two blocks. Thinking has its own whitespace."""
    if before is None or isinstance(before, ThinkingBlock):
        return ""
    if isinstance(block, ToolUseBlock):
        return format.between if isinstance(before, ToolUseBlock) else format.text_call_separator
    return "\n" if isinstance(before, ToolUseBlock) else ""
