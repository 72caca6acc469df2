"""Canonical request -> token ids: the checkpoint's own chat template around the answers, and the answers as sampled.

An answer of the model never goes through the template: a mark stands in its place, and where the mark comes out go the
ids that were sampled, or else the answer's text in the model's own format, tokenised by itself. So a turn's tokens are
the same wherever it stands, and each request extends the one before it and what was sampled for it. Text from outside
never becomes a control token. Pieces between special tokens are tokenised once and remembered. Nothing here changes a
request; that is `normalize`'s business.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from serve.api.messages import Block, CountTokensRequest, InvalidRequest, ToolUseBlock
from serve.formats.families import Format, within_thinking, write_turn
from serve.prompt.conversation import ChatMessage, answers, conversation, is_prefilled, tool_definitions, wants_thinking
from serve.prompt.replay import RecordedAnswer
from serve.prompt.template import Opening, Refused, Template, apply, fold, marker_turn, tools_ahead
from serve.prompt.tokenizer import Tokenizer, TooManyTokens

log = logging.getLogger("tokenzero.render")


Recalled = Sequence[RecordedAnswer | None]  # what was sampled for each answer in a request, None where it is not known
PromptSegment = str | np.ndarray  # text to be tokenised by itself, or the ids themselves


@dataclass(frozen=True)
class Prompt:
    """A rendered request. Its answer is recorded as RecordedAnswer(opening, begun and then what is sampled)."""

    pieces: tuple[PromptSegment, ...]
    tokens: np.ndarray  # [tokens] int32, of all pieces
    counts: tuple[int, ...]  # tokens of each piece
    # What the prompt ends with that the history of a conversation would not hold, such as `<think>\n`. None if that is
    # not known, because the template itself wrote the begun answer: then there is nothing to record.
    opening: str | None
    begun: np.ndarray  # [tokens] int32, the last tokens: an answer that the client has begun
    thinking: bool  # the model goes on inside thinking


def render(
    request: CountTokensRequest,
    tokenizer: Tokenizer,
    recalled: Recalled | None = None,
    render_history_with_template: bool = False,
    tools_first: bool = False,
) -> np.ndarray:
    """The prompt's token ids, [tokens] int32: see `prompt`."""
    return prompt(request, tokenizer, recalled, render_history_with_template, tools_first).tokens


def render_text(request: CountTokensRequest, tokenizer: Tokenizer) -> str:
    """The prompt as text, special tokens included, nothing recalled."""
    return "".join(piece for piece in prompt(request, tokenizer).pieces if isinstance(piece, str))


def prompt(
    request: CountTokensRequest,
    tokenizer: Tokenizer,
    recalled: Recalled | None = None,
    render_history_with_template: bool = False,
    tools_first: bool = False,
) -> Prompt:
    """Render a request with the answers that are recalled, one item for each (see `ReplayLog.recall`).

    `render_history_with_template` leaves the answers in the history to the chat template's own logic. The same happens,
    and is logged, where the template cannot be made to take marks in their place. `tools_first` renders tools
    before the system text. Raises InvalidRequest if the template refuses the conversation, or cannot render it so.
    """
    try:
        conversed = Conversation.of(request, tokenizer.template, tools_first)
        render_history_with_template = render_history_with_template or not conversed.writable(tokenizer.template.format)
        if not render_history_with_template:
            try:
                return around_answers(conversed, tokenizer, recalled or [None] * len(conversed.answers))
            except Refused as error:
                own = by_template(conversed, tokenizer)
                say_once(f"the chat template renders whole conversations, nothing sampled is replayed: {error!s:.200}")
                return own
        return by_template(conversed, tokenizer)
    except TooManyTokens as error:
        raise InvalidRequest(f"messages: prompt is too long: {error}") from None
    # RecursionError: JSON that nests too deeply.
    except (Refused, RecursionError) as error:
        raise InvalidRequest(f"messages: the model's chat template refuses this conversation: {error}") from error


@lru_cache(100)
def say_once(warning: str) -> None:
    """Log a warning unless it was logged before."""
    log.warning(warning)


@dataclass(frozen=True)
class Conversation:
    """A request as its chat template takes it. Every string in it is guarded: see `guard`."""

    mark: str  # random letters and digits: no text of the request holds them
    turns: list[ChatMessage]
    answers: list[tuple[Block, ...]]  # the blocks of the turns of role assistant, as the client sent them
    tools: list[dict[str, Any]] | None
    thinking: bool
    prefilled: bool
    tools_first: bool = False

    @staticmethod
    def of(request: CountTokensRequest, template: Template, tools_first: bool = False) -> Conversation:
        """Take a request apart."""
        mark = secrets.token_hex(12)
        return Conversation(
            mark,
            guard(fold(conversation(request), template), template.controls, mark),
            answers(request.messages),
            guard(tool_definitions(request), template.controls, mark),
            wants_thinking(request),
            is_prefilled(request),
            tools_first,
        )

    def writable(self, format: Format) -> bool:
        """Whether a format can write all answers; one that knows no calls would lose them."""
        return format.call is not None or not any(isinstance(b, ToolUseBlock) for a in self.answers for b in a)

    def role_ahead(self, index: int) -> str:
        """The role of the turn in front of a turn."""
        return str(self.turns[index - 1]["role"]) if index else "user"


def guard(value: Any, controls: re.Pattern[str] | None, mark: str) -> Any:
    """JSON with `mark` behind the first character of each control token in its strings.

    The marks come out of the template with the text, which is cut at them before it is tokenised: half a control token
    is ordinary text.
    """
    if controls is None:
        return value
    if isinstance(value, str):
        return guard_text(value, controls, mark) if controls.search(value) else value
    if isinstance(value, dict):
        return {guard(key, controls, mark): guard(item, controls, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [guard(item, controls, mark) for item in value]
    return value


def guard_text(text: str, controls: re.Pattern[str], mark: str) -> str:
    """`guard` for a text. What follows a cut may hold a shorter control token."""
    return controls.sub(lambda m: m[0][0] + mark + guard_text(m[0][1:], controls, mark), text)


def by_template(conversed: Conversation, tokenizer: Tokenizer) -> Prompt:
    """The prompt as the chat template writes all of it; raises Refused."""
    c = conversed
    how = {"answer": not c.prefilled, "prefill": c.prefilled, "thinking": c.thinking}
    text = framed(tokenizer, c.turns, c, **how)
    opening = tokenizer.template.opening(c.role_ahead(len(c.turns)), c.thinking).answer
    return tokenized([text], c.mark, tokenizer, None if c.prefilled else opening)


def around_answers(conversed: Conversation, tokenizer: Tokenizer, recalled: Recalled) -> Prompt:
    """The prompt with the template around the answers and the answers as sampled or written; raises Refused."""
    c, template = conversed, tokenizer.template
    at = [i for i, turn in enumerate(c.turns) if turn["role"] == "assistant"]
    # A mark of an answer is the mark of the conversation, too, and its number.
    as_call = [template.as_call and c.turns[i + 1 : i + 2] and c.turns[i + 1]["role"] == "tool" for i in at]
    turns = list(c.turns)
    for n, i in enumerate(at):
        turns[i] = marker_turn(f"{c.mark}x{n}x", bool(as_call[n]))
    text = whole_text(tokenizer, turns, at[0] if at else None, c)
    texts = re.split(f"{c.mark}x(\\d+)x", text)
    if texts[1::2] != [str(n) for n in range(len(at))]:
        raise Refused(f"expected {len(at)} answers in their order, found {', '.join(texts[1::2]) or 'none'}")
    texts = texts[::2]

    pieces: list[PromptSegment] = []
    for n, (i, answer, sampled) in enumerate(zip(at, c.answers, recalled, strict=True)):
        opening, ahead = template.opening(c.role_ahead(i), c.thinking), texts[n]
        begun = c.prefilled and n == len(at) - 1
        written = opening.begun if begun else opening.call if as_call[n] else opening.past
        header = without_end(ahead, opening.header, written)
        if sampled is not None:
            pieces += [header + sampled.opening, sampled.tokens]
        else:
            said = write_turn(template.format, [guard_block(b, template, c.mark) for b in answer])
            # A call that was never there has a header of its own, unless it begins like all answers.
            kept = opening.past if as_call[n] and written.startswith(opening.past) else written * (not as_call[n])
            thinking = template.opening(c.role_ahead(i), True)
            pieces += [header + kept, said] if begun else thought_through(header, kept, said, thinking, template.format)
        if as_call[n]:
            texts[n + 1] = without_start(texts[n + 1], template.after_call)
        if begun:
            return tokenized(pieces, c.mark, tokenizer, sampled.opening if sampled else written, begun=True)
    opening = template.opening(c.role_ahead(len(c.turns)), c.thinking)
    return tokenized([*pieces, texts[-1]], c.mark, tokenizer, opening.answer)


def thought_through(header: str, kept: str, text: str, thinking: Opening, format: Format) -> list[PromptSegment]:
    """A header, what follows it and a written answer; one that begins with thinking begins as prompts for thinking do.

    What follows may open and close thinking at once, for answers that have none.
    """
    if format.think and text.startswith(format.think[0]):
        if (header + thinking.answer).endswith(format.think[0]):
            return [header + thinking.answer, text.removeprefix(format.think[0])]
        if format.think[1].strip() in kept:
            return [header, text]
    return [header + kept, text]


def whole_text(tokenizer: Tokenizer, turns: Sequence[ChatMessage], first: int | None, c: Conversation) -> str:
    """The template's text for a conversation whose first answer is the turn `first`.

    Where the template would move tools and system text on to the last question, they stay at the first: the turns ahead
    of the first answer are rendered by themselves, the rest behind a question that is cut off.
    """
    how = {"answer": not c.prefilled, "thinking": c.thinking}
    if first is None or not tokenizer.template.moves:
        return framed(tokenizer, turns, c, **how)
    head = framed(tokenizer, turns[:first], c, thinking=c.thinking)
    lead = [{"role": "user", "content": "?"}]
    rest = apply(tokenizer.hf, [*lead, *turns[first:]], None, **how)
    return head + without_start(rest, apply(tokenizer.hf, lead, thinking=c.thinking))


def framed(tokenizer: Tokenizer, turns: Sequence[ChatMessage], c: Conversation, **how: bool) -> str:
    """The template's text for turns from the first on, its tools ahead of the system text where that is wanted."""
    if not c.tools_first or not c.tools or turns[0]["role"] != "system":
        return apply(tokenizer.hf, turns, c.tools, **how)
    place = f"{c.mark}-system"
    text = apply(tokenizer.hf, [turns[0] | {"content": place}, *turns[1:]], c.tools, **how)
    head, _, rest = tools_ahead(tokenizer.hf, text, place, c.tools).rpartition(place)
    return f"{head}{turns[0]['content']}{rest}"


def without_end(ahead: str, header: str, written: str) -> str:
    """The text ahead of an answer up to its header, behind which `written` must stand, as it did in `study`."""
    if not ahead.endswith(header + written):
        raise Refused(f"expected {header + written!r} ahead of an answer, found {ahead[-len(header + written) :]!r}")
    return ahead.removesuffix(written)


def without_start(text: str, start: str) -> str:
    """The text without its start, which must be there."""
    if not text.startswith(start):
        raise Refused(f"expected {start!r} around an answer, found {text[: len(start)]!r}")
    return text.removeprefix(start)


def guard_block(block: Block, template: Template, mark: str) -> Block:
    """`guard` for what the model wrote of a block."""
    fields = {"text", "thinking", "name", "input"}.intersection(block.__struct_fields__)
    guarded = {name: guard(getattr(block, name), template.controls, mark) for name in fields}
    return msgspec.structs.replace(block, **guarded)


def tokenized(
    pieces: Sequence[PromptSegment], mark: str, tokenizer: Tokenizer, opening: str | None, begun: bool = False
) -> Prompt:
    """The prompt of pieces that still hold marks; the last piece is an answer that was begun, if so."""
    cut: list[PromptSegment] = []
    for piece in pieces:
        last = len(cut)
        cut += [piece] if isinstance(piece, np.ndarray) else piece.split(mark)
    ids = [
        piece if isinstance(piece, np.ndarray) else (tokenizer.follow if n else tokenizer.encode)(piece)
        for n, piece in enumerate(cut)
    ]
    answer = np.concatenate([np.zeros(0, np.int32), *(ids[last:] if begun else ())])
    written = opening or ""
    if isinstance(cut[-1], np.ndarray):  # marks that were sampled are marks, those that the client wrote are text
        written += tokenizer.hf.backend_tokenizer.decode(answer, skip_special_tokens=False)
    thinking = within_thinking(tokenizer.template.format, written)
    return Prompt(tuple(cut), np.concatenate(ids), tuple(map(len, ids)), opening, answer, thinking)
