"""Which part of a request a token of its prompt comes from, such as `system[2]`, `tools[7] Bash`, `messages[3] user`.

The parts are searched in the rendered bytes, in their order, by their first words, so that no knowledge of the chat
template is needed. Text of the template between two parts belongs to the first of them; its text before all parts is
`template`. Paths are those of the rendered request, after the rules.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from serve.api.messages import (
    Block,
    CountTokensRequest,
    InputMessage,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from serve.prompt.conversation import block_text, blocks, shown
from serve.prompt.offered_tools import offered_tools
from serve.prompt.render import PromptSegment

PROBE = 64  # characters that a part is recognised by
WINDOW = 2**18  # bytes after one message in which the next one begins
MISSES = 32  # parts in a row that are not found: the search ends there
# The text of a tool before its name in chat templates, in the form of `conversation.tool_definitions`.
_BEFORE_NAME = re.compile(rb'\{\s*+"type":\s*+"function",\s*+"function":\s*+\{\s*+\Z')
LOOK_BACK = 100  # the most bytes of that text


@dataclass(frozen=True)
class Vocabulary:
    """The bytes that tokens stand for, in UTF-8."""

    lengths: Callable[[np.ndarray], np.ndarray]  # tokens [n] -> bytes of each [n] int64
    data: Callable[[np.ndarray], bytes]  # of all tokens together

    def text(self, tokens: np.ndarray) -> str:
        """Tokens [n] as text; half a character becomes a replacement character."""
        return self.data(tokens).decode("utf-8", "replace")


def vocabulary_of(hf: Any) -> Vocabulary:
    """The vocabulary of a fast Hugging Face tokenizer: byte-level, or of words with `▁` for spaces."""
    added = {index: str(token).encode() for index, token in hf.added_tokens_decoder.items()}
    byte_level = '"ByteLevel"' in json.dumps(json.loads(hf.backend_tokenizer.to_str()).get("decoder"))
    spelled = byte_level_bytes if byte_level else sentencepiece_bytes
    # One more, for ids that a model has and its tokenizer does not.
    values = [b""] * (max([*hf.get_vocab().values(), *added]) + 2)
    for token, index in hf.get_vocab().items():
        values[index] = added.get(index) or spelled(token)
    table, last = np.fromiter(map(len, values), np.int64, len(values)), len(values) - 1
    return Vocabulary(
        lambda tokens: np.take(table, tokens, mode="clip"),
        lambda tokens: b"".join([values[token] for token in np.minimum(tokens, last).tolist()]),
    )


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a token of a byte-level tokenizer, whose alphabet has a printable character for each byte.

    The alphabet is GPT-2's: https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    return bytes(_BYTE_OF.get(character, 0x3F) for character in token)


def sentencepiece_bytes(token: str) -> bytes:
    """The bytes of a token of a tokenizer that writes spaces as `▁` and single bytes as `<0x0A>`."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
# Each character is a token: for prompts whose tokenizer is unknown.
CHARACTERS = Vocabulary(
    lambda tokens: 1 + (tokens > 0x7F).astype(np.int64) + (tokens > 0x7FF) + (tokens > 0xFFFF),
    lambda tokens: "".join(map(chr, tokens.tolist())).encode("utf-8", "replace"),
)


@dataclass(frozen=True)
class Sections:
    """The sections of one prompt, each value computed on first use."""

    request: CountTokensRequest
    segments: tuple[PromptSegment, ...]
    counts: tuple[int, ...]  # tokens of each segment
    tokens: np.ndarray  # [tokens] int32
    vocabulary: Vocabulary

    @cached_property
    def rendered(self) -> list[bytes]:
        """The segments in UTF-8."""
        data = self.vocabulary.data
        return [s.encode("utf-8", "replace") if isinstance(s, str) else data(s) for s in self.segments]

    @cached_property
    def starts(self) -> np.ndarray:
        """[tokens] int64: where in the rendered bytes each token starts."""
        lengths = self.vocabulary.lengths(self.tokens)
        starts = np.cumsum(lengths) - lengths
        # A tokenizer may have changed a space or an accent: the starts are right again at each segment.
        counts, sizes = np.asarray(self.counts), np.fromiter(map(len, self.rendered), np.int64, len(self.rendered))
        filled = counts > 0
        counts, begins = counts[filled], (np.cumsum(sizes) - sizes)[filled]
        moved: np.ndarray = starts + np.repeat(begins - starts[np.cumsum(counts) - counts], counts)
        return moved

    @cached_property
    def section_starts(self) -> list[tuple[int, str]]:
        """The first rendered byte and the name of each section, in the order of the bytes."""
        return find_sections(self.request, b"".join(self.rendered))

    def at(self, position: int, into: int = 0) -> str:
        """The section of the byte that lies `into` bytes after the start of token `position`."""
        offset = (int(self.starts[position]) if position < len(self.starts) else len(b"".join(self.rendered))) + into
        index = bisect_right(self.section_starts, offset, key=lambda start: start[0])
        return self.section_starts[index - 1][1] if index else "template"

    def ranges(self) -> list[tuple[str, int, int]]:
        """The name, first token and token after the last of each section; each token is in one."""
        firsts = np.searchsorted(self.starts, [offset for offset, _ in self.section_starts]).tolist()
        names = ["template", *(name for _, name in self.section_starts)]
        bounds = [0, *firsts, len(self.tokens)]
        return [(name, *bounds[i : i + 2]) for i, name in enumerate(names) if bounds[i] < bounds[i + 1]]


def find_sections(request: CountTokensRequest, text: bytes) -> list[tuple[int, str]]:
    """The first byte and the name of each section of a request in its rendered text; parts not found are left out."""
    starts: list[tuple[int, str]] = []
    system_end = add_section_starts(text, system_parts(request), forms_of_text, 0, len(text), starts)
    offered = offered_tools(request)
    tools = ((f"{field} {tool.name}", tool.name) for field, tool in offered.head)
    tools_end = add_section_starts(text, tools, forms_of_name, 0, len(text), starts)
    # A call is known by its tool: its JSON is as the model wrote it.
    parts = (
        (n, block.name if isinstance(block, ToolUseBlock) else rendered_text(block))
        for n, block in message_parts(shown(offered.messages))
    )
    add_section_starts(text, parts, forms_of_text, max(system_end, tools_end), WINDOW, starts)
    return sorted(starts)


def add_section_starts(
    text: bytes,
    parts: Iterable[tuple[str, str]],
    forms: Callable[[str], Iterator[bytes]],
    start: int,
    window: int,
    section_starts: list[tuple[int, str]],
) -> int:
    """Add where parts, given by name and text, begin one after the other; return the byte where the next one may.

    `forms` has the ways in which the start of a part may be written. Each is searched in the next `window` bytes.
    """
    misses = 0
    for name, part in parts:
        if not part:
            continue
        at = next((at for form in forms(part) if (at := text.find(form, start, start + window)) >= 0), -1)
        misses = 0 if at >= 0 else misses + 1
        if misses == MISSES:
            break
        if at >= 0:
            before = _BEFORE_NAME.search(text, max(start, at - LOOK_BACK), at) if name.startswith("tools") else None
            section_starts.append((before.start() if before else at, name))
            start = at + len(part)
    return start


def forms_of_text(part: str) -> Iterator[bytes]:
    """The ways to render the start of a text: as it is, or as a JSON string."""
    if probe := part.strip()[:PROBE]:
        yield probe.encode("utf-8", "replace")
        yield json.dumps(probe, ensure_ascii=False)[1:-1].encode("utf-8", "replace")


def forms_of_name(name: str) -> Iterator[bytes]:
    """The ways to render a tool's name in its definition."""
    quoted = json.dumps(name, ensure_ascii=False).encode("utf-8", "replace")
    yield b'"name": ' + quoted
    yield b'"name":' + quoted


def system_parts(request: CountTokensRequest) -> Iterator[tuple[str, str]]:
    """Name and text of each system block."""
    if isinstance(request.system, str):
        yield "system", request.system
    else:
        for i, block in enumerate(request.system or ()):
            yield f"system[{i}]", block.text


def message_parts(messages: Iterable[InputMessage]) -> Iterator[tuple[str, Block]]:
    """Name and block of each block of the messages: texts under their role, other blocks under their kind."""
    for i, message in enumerate(messages):
        for block in blocks(message):
            kind = message.role if isinstance(block, TextBlock) else block.__struct_config__.tag
            yield f"messages[{i}] {kind}", block


def rendered_text(block: Block) -> str:
    """A block's text as it is rendered."""
    return block.thinking if isinstance(block, ThinkingBlock) else block_text(block)
