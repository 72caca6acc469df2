"""A request to token ids: the checkpoint's own chat template around the answers, and the answers as sampled.

The way of a request, downhill: `conversation` makes turns of it, and `adapt` changes those that the template refuses
(`probe` has found out which); `plan` puts a placeholder in the place of each answer; `write_chat` has the template
write them, once; `split_at_answers` cuts the text there; `answer_segments` puts in the ids that were sampled, or else
the answer's text in the model's own format, tokenised by itself; `tokenize` makes the ids. So a turn's tokens are the
same wherever it stands, and each request extends the one before it and what was sampled for it. Text from outside never
becomes a control token. Nothing here changes a request; that is the business of the rules.

Some requests need more than one rendering:
- A template that moves tools or system text to the last question (Mistral's) writes the turns before the first answer
  by themselves and the rest after a question that is cut off. Both texts of the head are kept for the next request.
- Tools before the system text: where the template writes them is found with a small conversation, kept for each list
  of tools.
- A template that loses, repeats or reorders placeholders, or writes other text around them than when it was
  probed, writes the whole conversation once more with its answers; nothing is replayed then.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from serve.api.messages import CountTokensRequest, InvalidRequest
from serve.formats.format import Format, within_thinking, write_turn
from serve.prompt.conversation import ChatMessage
from serve.prompt.plan import Chat, PlannedAnswer, break_block, break_turn, plan_chat
from serve.prompt.replay import RecordedAnswer
from serve.prompt.template import Opening, Refused, Template, apply
from serve.prompt.tokenizer import FAR_BEYOND, LONG_CHARS, MOST_TOKENS, Tokenizer, TooManyTokens, refuse_too_many_tokens
from serve.prompt.tools_first import ToolsPlace, place_of_tools

log = logging.getLogger("tokenzero.render")

QUESTION: ChatMessage = {"role": "user", "content": "?"}  # before turns that are rendered without their head

USUAL_CHARS = 4  # of a token of English text or code
LIKELY_CHARS = 8  # a text of more characters than this for each token of a limit is likely too long

Recalled = Sequence[RecordedAnswer | None]  # what was sampled for each answer in a request, None where it is not known
PromptSegment = str | np.ndarray  # text to be tokenised by itself, or the ids themselves, [tokens] int32


@dataclass(frozen=True)
class Prompt:
    """A rendered request.

    Its answer is recorded as RecordedAnswer(opening, prefilled_answer_ids followed by the sampled ids).
    """

    segments: tuple[PromptSegment, ...]
    tokens: np.ndarray  # [tokens] int32, of all segments
    counts: tuple[int, ...]  # tokens of each segment
    # The end of the prompt that the history of a conversation would not hold, such as `<think>\n`. None where it is not
    # known because the template itself wrote the prefilled answer: then there is nothing to record.
    opening: str | None
    prefilled_answer_ids: np.ndarray  # [tokens] int32, the last tokens: of an answer that the client has begun
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
    return "".join(segment for segment in prompt(request, tokenizer).segments if isinstance(segment, str))


def prompt(
    request: CountTokensRequest,
    tokenizer: Tokenizer,
    recalled: Recalled | None = None,
    render_history_with_template: bool = False,
    tools_first: bool = False,
    most_tokens: int = MOST_TOKENS,
) -> Prompt:
    """The prompt of a request with the answers that are recalled, one item for each (see `ReplayLog.recall`).

    `render_history_with_template` leaves the answers in the history to the chat template's own logic. The same happens,
    and is logged, where the template does not write placeholders in their place. `tools_first` renders tools
    before the system text. Raises InvalidRequest if the template refuses the conversation, or cannot render it so, and
    for a prompt of far more than `most_tokens`, before all of it is tokenised.
    """
    try:
        chat = plan_chat(request, tokenizer.template, tools_first)
        if render_history_with_template or not chat.can_be_written(tokenizer.template.format):
            return by_template(chat, tokenizer, most_tokens)
        try:
            return around_answers(chat, tokenizer, recalled or [None] * len(chat.answers), most_tokens)
        except Refused as error:
            whole = by_template(chat, tokenizer, most_tokens)
            say_once(f"the chat template renders whole conversations, nothing sampled is replayed: {error!s:.200}")
            return whole
    except TooManyTokens as error:
        raise too_long(error.tokens, error.most) from None
    # RecursionError: JSON that nests too deeply.
    except (Refused, RecursionError) as error:
        raise InvalidRequest(f"messages: the model's chat template refuses this conversation: {error}") from error


def too_long(tokens: int, most: int) -> InvalidRequest:
    """The refusal of a prompt, in the words of the Messages API: clients read both numbers.

    `tokens` is exact, or an estimate where the prompt was not tokenised to its end.
    """
    return InvalidRequest(f"prompt is too long: {tokens} tokens > {most} maximum", "max_model_len")


@lru_cache(100)
def say_once(warning: str) -> None:
    """Log a warning unless it was logged before."""
    log.warning(warning)


def by_template(chat: Chat, tokenizer: Tokenizer, most_tokens: int = MOST_TOKENS) -> Prompt:
    """The prompt as the chat template writes all of it, the answers in the history, too; raises Refused."""
    turns = [break_turn(turn, tokenizer.template.control_tokens, chat.placeholder) for turn in chat.adapted]
    text = apply_with_tools_first(turns, chat, tokenizer, **chat.template_flags, prefill=chat.prefilled)
    opening = None if chat.prefilled else chat.next_opening.generation
    return tokenize([text], chat, tokenizer, opening, most_tokens=most_tokens)


def around_answers(chat: Chat, tokenizer: Tokenizer, recalled: Recalled, most_tokens: int = MOST_TOKENS) -> Prompt:
    """The prompt with the template around the answers and the answers as sampled or written; raises Refused."""
    texts = split_at_answers(write_chat(chat, tokenizer), chat)
    segments: list[PromptSegment] = []
    for n, (answer, sampled) in enumerate(zip(chat.answers, recalled, strict=True)):
        segments += answer_segments(answer, sampled, texts[n], chat.template, chat.placeholder)
        if answer.prefilled:
            opening = sampled.opening if sampled else answer.opening.prefilled
            return tokenize(segments, chat, tokenizer, opening, prefilled=True, most_tokens=most_tokens)
        if answer.as_tool_call:
            texts[n + 1] = without_start(texts[n + 1], chat.template.after_call)
    return tokenize([*segments, texts[-1]], chat, tokenizer, chat.next_opening.generation, most_tokens=most_tokens)


def write_chat(chat: Chat, tokenizer: Tokenizer) -> str:
    """The template's text for a conversation, tools and system text always at the first question; raises Refused."""
    if not chat.answers or not chat.template.moves_tools_to_last_turn:
        return apply_with_tools_first(chat.turns, chat, tokenizer, **chat.template_flags)
    first, thinking = chat.answers[0].turn, chat.thinking
    head_turns, rest_turns = chat.turns[:first], [QUESTION, *chat.turns[first:]]

    def write_head() -> tuple[str, str]:
        head = apply_with_tools_first(head_turns, chat, tokenizer, thinking=thinking)
        return head, apply(tokenizer.hf, [QUESTION], chat.template.no_tools, thinking=thinking)

    key = [head_turns, chat.tools, thinking, chat.tools_first]
    head, question = kept(key, write_head, chat, tokenizer)
    rest = apply(tokenizer.hf, rest_turns, chat.template.no_tools, **chat.template_flags)
    return head + without_start(rest, question)


def apply_with_tools_first(turns: list[ChatMessage], chat: Chat, tokenizer: Tokenizer, **template_flags: bool) -> str:
    """The template's text for turns from the first on, its tools before the system text where that is wanted."""
    tools, hf = chat.tools, tokenizer.hf
    if not chat.tools_first or not tools or not turns or turns[0]["role"] != "system":
        return apply(hf, turns, tools, **template_flags)
    system = f"{chat.placeholder}-system"
    text = apply(hf, [turns[0] | {"content": system}, *turns[1:]], tools, **template_flags)

    def find_place() -> tuple[str, ...]:
        place = place_of_tools(hf, system, tools)
        return astuple(place) if place else ()

    found = kept(["tools", tools], find_place, chat, tokenizer)
    if found and not ToolsPlace(*found).is_in(text, system):
        found = find_place()  # the one that was kept may hold another request's system text, changed by the template
    if found:
        text = ToolsPlace(*found).tools_first(text, system)
    before, _, rest = text.rpartition(system)
    return f"{before}{turns[0]['content']}{rest}"


def kept(key: Any, write: Callable[[], tuple[str, ...]], chat: Chat, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The texts of `write`, which depend on `key` (JSON) and the template only: as they were kept, or written now.

    Texts with a placeholder are of one request only, and those of a template that reads the clock of one moment.
    """
    if tokenizer.template.reads_clock:
        return write()
    digest = hashlib.blake2b(msgspec.json.encode(key), digest_size=32).digest()
    if (texts := tokenizer.heads.get(digest)) is None:
        texts = write()
        if not any(chat.placeholder in text for text in texts):
            tokenizer.heads.put(digest, texts)
    return texts


def split_at_answers(text: str, chat: Chat) -> list[str]:
    """The texts before, between and after the answers, one more than there are; raises Refused."""
    first, *others = text.split(chat.answer_placeholder)
    numbers = [f"{n}x" for n in range(len(chat.answers))]
    if len(others) != len(numbers) or not all(map(str.startswith, others, numbers)):
        found = ", ".join(other.partition("x")[0][:9] for other in others[:20])
        raise Refused(f"expected {len(numbers)} answers in their order, found {found or 'none'}")
    return [first, *(other[len(number) :] for other, number in zip(others, numbers, strict=True))]


def answer_segments(
    answer: PlannedAnswer, sampled: RecordedAnswer | None, text: str, template: Template, placeholder: str
) -> list[PromptSegment]:
    """The template's `text` before an answer, and the answer: as sampled, or as text in the model's own format.

    Raises Refused unless the text ends as it did when the template was probed.
    """
    opening, format = answer.opening, template.format
    header, written = split_opening(text, opening)
    if sampled is not None:
        return [header + sampled.opening, sampled.tokens]
    said = write_turn(format, [break_block(block, template.control_tokens, placeholder) for block in answer.blocks])
    if format.headers and said and not answer.prefilled:
        return [header, said]  # with a header of its own
    if answer.prefilled:
        if not said.startswith(format.answer_header):
            raise Refused(f"expected an answer that begins with text, got {said[:40]!r}")
        return [header + opening.prefilled, said.removeprefix(format.answer_header)]
    if answer.as_tool_call and not written.startswith(opening.history):
        # Mistral's template begins the placeholder's call with `[TOOL_CALLS] [{"name": "call", `, which `header` no
        # longer has. It writes a space before a text answer and none before a call: so none is added here.
        return join_thinking(header, "", said, answer.thinking_opening, format)
    return join_thinking(header, opening.history, said, answer.thinking_opening, format)


def join_thinking(header: str, past: str, said: str, thinking: Opening, format: Format) -> list[PromptSegment]:
    """A header with what follows it in the history, and a written answer.

    An answer that begins with thinking begins as prompts for thinking do. `past` may open and close thinking at once,
    for answers that have none.
    """
    if format.think and said.startswith(format.think[0]):
        opened, (open_delimiter, close_delimiter) = header + thinking.generation, map(str.strip, format.think)
        if opened.endswith(format.think[0]):
            return [opened, said.removeprefix(format.think[0])]
        if header.endswith(open_delimiter):
            return [header, said.removeprefix(format.think[0])]
        if close_delimiter in past:
            return [header, said]
        if opened.endswith(open_delimiter) and past.strip():
            return [opened, said.removeprefix(format.think[0])]
    return [header + past, said]


def split_opening(text: str, opening: Opening) -> tuple[str, str]:
    """The text up to an answer's header, and what is written after the header; raises Refused."""
    for written in opening.written:
        if text.endswith(opening.header + written):
            return text[: len(text) - len(written)], written
    expected = [opening.header + written for written in opening.written]
    raise Refused(f"expected one of {expected} before an answer, found {text[-max(map(len, expected)) :]!r}")


def without_start(text: str, start: str) -> str:
    """The text without its start; raises Refused for another one."""
    if not text.startswith(start):
        raise Refused(f"expected {start!r} around an answer, found {text[: len(start)]!r}")
    return text.removeprefix(start)


def tokenize(
    segments: Sequence[PromptSegment],
    chat: Chat,
    tokenizer: Tokenizer,
    opening: str | None,
    prefilled: bool = False,
    most_tokens: int = MOST_TOKENS,
) -> Prompt:
    """The prompt of segments that still hold placeholders; the last one is a prefilled answer, if so.

    Raises TooManyTokens.
    """
    cut: list[PromptSegment] = []
    last = 0  # where in `cut` the last segment begins
    for segment in segments:
        last = len(cut)
        cut += [segment] if isinstance(segment, np.ndarray) else segment.split(chat.placeholder)
    ids = encode_segments(cut, tokenizer, most_tokens)
    answer = np.concatenate([np.zeros(0, np.int32), *(ids[last:] if prefilled else ())])
    written = "" if opening is None else chat.last_opening.header + opening
    if isinstance(cut[-1], np.ndarray):  # delimiters that were sampled are delimiters, those of the client are text
        written += tokenizer.hf.backend_tokenizer.decode(answer, skip_special_tokens=False)
    thinking = within_thinking(tokenizer.template.format, written)
    return Prompt(tuple(cut), np.concatenate(ids), tuple(map(len, ids)), opening, answer, thinking)


def encode_first(segment: str, following: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a text, [tokens] int32, tokenised together with those that follow. Raises TooManyTokens of its own."""
    try:
        return tokenizer.encode(segment, following)
    except TooManyTokens:  # of any of them: those that follow raise it when it is their turn
        return tokenizer.encode(segment)


def encode_segments(
    segments: Sequence[PromptSegment], tokenizer: Tokenizer, most_tokens: int = MOST_TOKENS
) -> list[np.ndarray]:
    """The ids of each segment, [tokens] int32.

    Raises TooManyTokens as soon as there are far more than `most_tokens`, with an estimate of all of them.
    """
    chars = [len(segment) * (1 if isinstance(segment, str) else USUAL_CHARS) for segment in segments]
    ids: list[np.ndarray] = []
    tokens, enough = 0, int(FAR_BEYOND * most_tokens)
    likely_fits = sum(chars) <= min(LONG_CHARS, LIKELY_CHARS * most_tokens)
    for n, segment in enumerate(segments):
        try:
            if isinstance(segment, str) and len(segment) > LIKELY_CHARS * (enough - tokens):
                refuse_too_many_tokens(tokenizer.hf, segment, enough - tokens)
            if isinstance(segment, np.ndarray):
                ids.append(segment)
            elif n == 0:
                following = [text for text in segments[1:] if isinstance(text, str)]
                ids.append(encode_first(segment, following if likely_fits else (), tokenizer))
            else:
                ids.append(tokenizer.encode_after(segment))
            tokens += len(ids[-1])
        except TooManyTokens as error:  # of this segment alone
            tokens, enough = tokens + error.tokens, 0
        if tokens > enough:
            raise TooManyTokens(tokens * sum(chars) // max(1, sum(chars[: n + 1])), most_tokens)
    return ids
