"""Canonical request -> token ids: the checkpoint's own chat template around the answers, and the answers as sampled.

An answer of the model never goes through the template: a mark stands in its place, and where the mark comes out go the
ids that were sampled, or else the answer's text in the model's own format, tokenised by itself. So a turn's tokens are
the same wherever it stands, and each request extends the one before it and what was sampled for it. Text from outside
never becomes a control token. Pieces between special tokens are tokenised once and remembered. Nothing here changes a
request; that is `normalize`'s business.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers

from cache.disk import DiskTier
from cache.environment import RECORDS, check_directory
from cache.tiers import Tier
from cache.worker import Worker
from serve.bounds import DEFAULT_BOUNDS
from serve.formats import Format, within_thinking, write_turn
from serve.messages import (
    Block,
    CountTokensRequest,
    InvalidRequest,
    ToolUseBlock,
)
from serve.recent import Recent
from serve.replay import Sampled
from serve.template import Opening, Refused, Template, apply, fold, marker_turn, study, tools_ahead
from serve.turns import Turn, answers, conversation, is_prefilled, tool_definitions, wants_thinking

log = logging.getLogger("tokenzero.render")

# Of one text between two control tokens. To take the ids of more from the tokenizer holds the interpreter too long.
MOST_TOKENS = 2**20
# The tokens of longer texts are counted slice by slice first: all of them at once may be 30 million.
LONG_CHARS, COUNTED_CHARS, COUNTED_TOGETHER = 2**21, 2**16, 2**18
NUMPY_BYTES = 200  # of an array beside its values, and of a text beside its characters
SEGMENT_FOLDER = "segments"  # below the store directory
STORED_BYTES = 64 * 2**20  # of ids on disk
STORED_CHARS = 1000  # shorter segments are sooner tokenised than read


class TooManyTokens(ValueError):
    """A text has more than MOST_TOKENS tokens."""


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with its chat template and a remembering `encode`."""

    hf: Any
    encode: Callable[[str], np.ndarray]  # text -> [tokens] int32, special tokens recognised, none added
    follow: Callable[[str], np.ndarray]  # the same for text that has something in front
    template: Template
    longest: int  # characters that a token stands for, at most
    segments: Recent[str, np.ndarray]  # [tokens] int32 by text: what `encode` remembers


def load_tokenizer(
    folder: str,
    format_name: str | None = None,
    store: Path | None = None,
    segment_bytes: int = DEFAULT_BOUNDS.segments,
) -> Tokenizer:
    """Read the tokenizer of a checkpoint; `format_name` overrides how its model writes calls (see `formats.choose`).

    Segments that were tokenised are remembered, in so many bytes of memory. With a `store` directory, long ones are
    found there again after a restart. Raises ValueError
    if the tokenizer is not a fast one, has no chat template or the format is unknown, StoreError for a directory of
    another program or version.
    """
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
    if store is None:
        return make_tokenizer(hf, format_name, None, segment_bytes)
    check_directory(store)
    return make_tokenizer(hf, format_name, DiskTier(store / SEGMENT_FOLDER, STORED_BYTES, name=RECORDS), segment_bytes)


def make_tokenizer(
    hf: Any,
    format_name: str | None = None,
    segments: Tier | None = None,
    segment_bytes: int = DEFAULT_BOUNDS.segments,
) -> Tokenizer:
    """Study a fast Hugging Face tokenizer and its chat template; a tier of `segments` keeps the long ones."""
    memory = segment_memory(segment_bytes)
    encode = make_encoder(hf, segments, memory)
    longest = max(map(len, hf.get_vocab()))
    return Tokenizer(hf, encode, make_follower(hf, encode), study(hf, format_name), longest, memory)


def make_encoder(
    hf: Any, segments: Tier | None = None, memory: Recent[str, np.ndarray] | None = None
) -> Callable[[str], np.ndarray]:
    """`encode` for a tokenizer: by segments remembered in `memory` where that is exact, else over the whole text."""

    def whole(text: str) -> np.ndarray:
        # The fast way, which counts no characters, is there for batches only.
        fast = partial(hf.backend_tokenizer.encode_batch_fast, add_special_tokens=False)
        if len(text) > LONG_CHARS:
            refuse_many(text, lambda slices: sum(map(len, fast(slices))))
        (encoding,) = fast([text])
        if len(encoding) > MOST_TOKENS:
            raise TooManyTokens(f"a text of {len(encoding)} tokens, expected at most {MOST_TOKENS}")
        return np.asarray(encoding.ids, np.int32)

    if not splits_at_added_tokens(hf):
        return whole
    added = {str(token): index for index, token in hf.added_tokens_decoder.items()}
    single = {token: np.asarray([index], np.int32) for token, index in added.items()}
    # Longest first, as the tokenizer itself prefers them.
    cut = re.compile("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)))
    tokenize = stored(whole, identity(hf), segments) if segments else whole
    memory = segment_memory(DEFAULT_BOUNDS.segments) if memory is None else memory

    def remembered(text: str) -> np.ndarray:
        if (ids := memory.get(text)) is None:
            ids = tokenize(text)
            memory.put(text, ids)
        return ids

    def encode(text: str) -> np.ndarray:
        ids, at = [np.zeros(0, np.int32)], 0
        for found in cut.finditer(text):
            if found.start() > at:
                ids.append(remembered(text[at : found.start()]))
            ids.append(single[found[0]])
            at = found.end()
        if at < len(text):
            ids.append(remembered(text[at:]))
        return np.concatenate(ids)

    return encode


def segment_memory(most_bytes: int) -> Recent[str, np.ndarray]:
    """Room for segments; bounded by size and not by number, as it is the clients who choose how long a segment is."""
    return Recent(most_bytes, lambda ids: NUMPY_BYTES + 2 * ids.nbytes)


def refuse_many(text: str, count: Callable[[list[str]], int]) -> None:
    """Raise TooManyTokens for a text that has far more than MOST_TOKENS, without tokenising all of it.

    `count` tells the tokens of some texts together. Cut into slices a text has a few more.
    """
    tokens = 0
    for start in range(0, len(text), COUNTED_TOGETHER):
        ends = range(start, min(start + COUNTED_TOGETHER, len(text)), COUNTED_CHARS)
        tokens += count([text[at : at + COUNTED_CHARS] for at in ends])
        if tokens > 1.25 * MOST_TOKENS:
            raise TooManyTokens(f"a text of over {MOST_TOKENS} tokens, expected at most {MOST_TOKENS}")


def stored(tokenize: Callable[[str], np.ndarray], tokenizer: bytes, tier: Tier) -> Callable[[str], np.ndarray]:
    """`tokenize`, whose results for long texts are kept in a tier under the tokenizer's identity and the text."""
    writer = Worker("segments")

    def recall(text: str) -> np.ndarray:
        if len(text) < STORED_CHARS:
            return tokenize(text)
        key = hashlib.blake2b(tokenizer + text.encode(), digest_size=32).digest()
        (record,) = tier.get_many([key])
        if record is not None:
            return np.frombuffer(record, "<i4").astype(np.int32)
        ids = tokenize(text)
        writer.submit(tier.put_many, [(key, ids.astype("<i4").tobytes())])
        return ids

    return recall


def identity(hf: Any) -> bytes:
    """What tells a tokenizer from all that might give other ids: 32 bytes."""
    described = f"{tokenizers.__version__}\n{hf.backend_tokenizer.to_str()}"
    return hashlib.blake2b(described.encode(), digest_size=32).digest()


def make_follower(hf: Any, encode: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """`follow` for a tokenizer: where the start of a text gets a blank, a special token in front keeps it away."""
    anchors = [(str(t), i) for i, t in hf.added_tokens_decoder.items() if t.special and not (t.rstrip or t.single_word)]
    if splits_at_added_tokens(hf) or not anchors:
        return encode
    token, index = anchors[0]

    def follow(text: str) -> np.ndarray:
        ids = encode(token + text)
        return ids[1:] if len(ids) and ids[0] == index else encode(text)

    return follow


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


Recalled = Sequence[Sampled | None]  # what was sampled for each answer in a request, None where it is not known
Piece = str | np.ndarray  # text to be tokenised by itself, or the ids themselves


@dataclass(frozen=True)
class Prompt:
    """A rendered request. The turn that answers it is recorded as Sampled(opening, begun and then what is sampled)."""

    pieces: tuple[Piece, ...]
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
    template_history: bool = False,
    tools_first: bool = False,
) -> np.ndarray:
    """The prompt's token ids, [tokens] int32: see `prompt`."""
    return prompt(request, tokenizer, recalled, template_history, tools_first).tokens


def render_text(request: CountTokensRequest, tokenizer: Tokenizer) -> str:
    """The prompt as text, special tokens included, nothing recalled."""
    return "".join(piece for piece in prompt(request, tokenizer).pieces if isinstance(piece, str))


def prompt(
    request: CountTokensRequest,
    tokenizer: Tokenizer,
    recalled: Recalled | None = None,
    template_history: bool = False,
    tools_first: bool = False,
) -> Prompt:
    """Render a request with the answers that are recalled, one item for each (see `ReplayLog.recall`).

    `template_history` leaves the answers in the history to the chat template's own logic. The same happens, and is
    logged, where the template cannot be made to take marks in their place. `tools_first` renders tools ahead of the
    system text. Raises InvalidRequest if the template refuses the conversation, or cannot render it so.
    """
    try:
        conversed = Conversation.of(request, tokenizer.template, tools_first)
        template_history = template_history or not conversed.writable(tokenizer.template.format)
        if not template_history:
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
    turns: list[Turn]
    answers: list[tuple[Block, ...]]  # the blocks of the turns of role assistant, as the client sent them
    tools: list[dict] | None
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

    pieces: list[Piece] = []
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


def thought_through(header: str, kept: str, text: str, thinking: Opening, format: Format) -> list[Piece]:
    """A header, what follows it and a written answer; one that begins with thinking begins as prompts for thinking do.

    What follows may open and close thinking at once, for answers that have none.
    """
    if format.think and text.startswith(format.think[0]):
        if (header + thinking.answer).endswith(format.think[0]):
            return [header + thinking.answer, text.removeprefix(format.think[0])]
        if format.think[1].strip() in kept:
            return [header, text]
    return [header + kept, text]


def whole_text(tokenizer: Tokenizer, turns: Sequence[Turn], first: int | None, c: Conversation) -> str:
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


def framed(tokenizer: Tokenizer, turns: Sequence[Turn], c: Conversation, **how: bool) -> str:
    """The template's text for turns from the first on, its tools ahead of the system text where that is wanted."""
    if not c.tools_first or not c.tools or turns[0]["role"] != "system":
        return apply(tokenizer.hf, turns, c.tools, **how)
    place = f"{c.mark}-system"
    text = apply(tokenizer.hf, [turns[0] | {"content": place}, *turns[1:]], c.tools, **how)
    head, _, rest = tools_ahead(tokenizer.hf, text, place, c.tools).rpartition(place)
    return head + turns[0]["content"] + rest


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
    pieces: Sequence[Piece], mark: str, tokenizer: Tokenizer, opening: str | None, begun: bool = False
) -> Prompt:
    """The prompt of pieces that still hold marks; the last piece is an answer that was begun, if so."""
    cut: list[Piece] = []
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
