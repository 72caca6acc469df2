"""A request of the Messages API made ready for the engine: normalised, rendered, tokenised, its grammar compiled.

The steps themselves are in `serve.rules` and `serve.prompt`. No HTTP.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.api.answers import new_id
from serve.api.messages import CountTokensRequest, MessagesRequest, SeededRequest, ThinkingBlock
from serve.api.stops import Stops
from serve.diagnosis.sections import message_parts, rendered_text, system_parts
from serve.engine.buckets import SamplingParams
from serve.engine.request import GenerationRequest
from serve.prompt.conversation import answers, is_silent, shown
from serve.prompt.render import USUAL_CHARS, Prompt, Recalled, prompt, too_long
from serve.prompt.replay import RecordedAnswer
from serve.prompt.signing import verify
from serve.prompt.tokenizer import MOST_TOKENS
from serve.rules.log import warn_once
from serve.rules.normalize import Normalized, normalize
from serve.server.context import BACKGROUND, RequestContext, ServerContext
from serve.server.retention import asks_of
from serve.server.unread import refuse_images, report_safeguards, report_unread
from serve.web.agents import own_id
from serve.web.timing import Phases

log = logging.getLogger("tokenzero.server")


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine."""

    id: str  # of the message that answers it
    request_context: RequestContext
    original: MessagesRequest  # as the client sent it
    message: MessagesRequest  # after the rules
    prompt: Prompt
    generation: GenerationRequest
    stops: Stops  # the texts that end its answer
    scope: bytes  # of the recorded answers that it shares: see `scope_of`
    applied: tuple[str, ...]  # the rules that changed it, in order, with their places
    clamped: bool  # `max_tokens` is more than the context has room for


def prepare(
    context: ServerContext, message: MessagesRequest, request_context: RequestContext, phases: Phases
) -> Prepared:
    """Normalise, render and tokenise a request, compile its grammar, clamp its `max_tokens` to the room left.

    Raises InvalidRequest for a request that cannot be answered.
    """
    if context.config.on_image == "error":
        refuse_images(message)
    report_unread(context, message)
    report_safeguards(context, message)
    with phases.timed("normalize"):
        normalized = normalize(message, request_context.rules)
    report_rules(context, normalized)
    scope = scope_of(context.engine.fingerprint, request_context)
    limit = context.engine.settings.max_model_len
    rendered = rendered_prompt(context, normalized.request, scope, request_context.rules, phases, limit - 1)
    room = limit - len(rendered.tokens)
    if room < 1:
        raise too_long(len(rendered.tokens), limit - 1)
    head = shared_head(context, normalized.request, rendered.tokens, request_context, phases)
    with phases.timed("constrain"):
        constraint = context.constrain(normalized.request, rendered.thinking) if message.max_tokens else None
    id = new_id("msg")
    generation = GenerationRequest(
        id=id,
        tokens=rendered.tokens,
        max_tokens=min(message.max_tokens, room),
        stop_ids=context.stop_ids,
        sampling=SamplingParams(
            temperature=1.0 if message.temperature is None else message.temperature,
            top_k=message.top_k or 0,
            top_p=1.0 if message.top_p is None else message.top_p,
            seed=seed_of(message),
        ),
        salt=request_context.salt,
        head=head,
        constraint=constraint,
        agent=own_id(request_context.owner, request_context.sender.agent),
        session=own_id(request_context.owner, request_context.sender.session),
        parent=own_id(request_context.owner, request_context.parent),
        owner=request_context.owner,
        priority=-1 if request_context.priority == BACKGROUND else 0,
        asks=asks_of(request_context.wishes, normalized.request, rendered, context.divergences.vocabulary),
        share=request_context.share,
    )
    applied = tuple(f"{a.rule} {a.where}" for a in normalized.applied)
    return Prepared(
        id,
        request_context,
        message,
        normalized.request,
        rendered,
        generation,
        Stops(message.stop_sequences or ()),
        scope,
        applied,
        room < message.max_tokens,
    )


@dataclass(frozen=True)
class Counted:
    """The prompt that a request would have."""

    tokens: np.ndarray  # [tokens] int32
    head: int  # of these, tokens that all keys share


def count_prompt(
    context: ServerContext,
    request: CountTokensRequest,
    request_context: RequestContext,
    phases: Phases,
    sent: bool = False,
) -> Counted:
    """The prompt that the request would have, or has if it is `sent`, see `shared_head`; raises InvalidRequest."""
    if context.config.on_image == "error":
        refuse_images(request)
    with phases.timed("normalize"):
        normalized = normalize(request, request_context.rules).request
    scope = scope_of(context.engine.fingerprint, request_context)
    tokens = rendered_prompt(context, normalized, scope, request_context.rules, phases).tokens
    return Counted(tokens, shared_head(context, normalized, tokens, request_context, phases, sent))


def shared_head(
    context: ServerContext,
    request: CountTokensRequest,
    tokens: np.ndarray,  # [tokens] int32
    request_context: RequestContext,
    phases: Phases,
    sent: bool = True,
) -> int:
    """How many of a prompt's first tokens keys share. A request that is `sent` counts for that, a question does not."""
    if not (context.heads and request_context.shares_head):
        return 0
    with phases.timed("render"):
        tools_first, owner = "tools-first" in request_context.rules, request_context.owner
        return context.heads.length(request, tokens, context.tokenizer, tools_first, owner, sent)


def seed_of(message: MessagesRequest) -> int:
    """A seed of 32 bits: the request's own, hashed if it needs more bits, or else a random one."""
    seed = message.seed if isinstance(message, SeededRequest) else None
    if seed is None:
        return secrets.randbits(32)
    if 0 <= seed < 2**32:
        return seed
    written = seed.to_bytes(seed.bit_length() // 8 + 1, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(written, digest_size=4).digest(), "little")


def scope_of(fingerprint: bytes, request_context: RequestContext) -> bytes:
    """A hash of the model and of the request's salt and key: only equal scopes share recorded answers."""
    parts = (fingerprint, request_context.salt, request_context.key)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def rendered_prompt(
    context: ServerContext,
    request: CountTokensRequest,
    scope: bytes,
    rules: frozenset[str],
    phases: Phases,
    most_tokens: int = MOST_TOKENS,
) -> Prompt:
    """The prompt of a normalised request; the answers in it that were sampled here are replayed.

    Raises InvalidRequest for a prompt of far more than `most_tokens` before all of it is tokenised.
    """
    most = context.engine.settings.max_model_len - 1
    if (least := least_tokens(request, context.tokenizer.max_token_chars)) > most:
        raise too_long(max(least, text_chars(request) // USUAL_CHARS), most)
    with phases.timed("recall"):
        recalled = trusted(context.replay.recall(scope, request.messages), request, context.signing_key)
    with phases.timed("render"):
        by_template = context.config.render_history_with_template
        return prompt(request, context.tokenizer, recalled, by_template, "tools-first" in rules, most_tokens)


def least_tokens(request: CountTokensRequest, max_token_chars: int) -> int:
    """A lower bound of a prompt's tokens: one for each message, and all texts in tokens of `max_token_chars`.

    With it a prompt that is far too long is refused before it is rendered; the refusal has an estimate instead, of
    USUAL_CHARS a token.
    """
    heard = sum(not is_silent(message) for message in request.messages)
    return max(heard, text_chars(request) // max_token_chars)


def text_chars(request: CountTokensRequest) -> int:
    """The characters of all texts of a request, without thinking and calls."""
    texts = sum(len(text) for _, text in system_parts(request))
    return texts + sum(
        len(rendered_text(block))
        for _, block in message_parts(shown(request.messages))
        if not isinstance(block, ThinkingBlock)
    )


def trusted(recalled: Recalled, request: CountTokensRequest, key: bytes) -> Recalled:
    """The recalled answers, with None for each whose thinking has a foreign signature: it is rendered as plain text.

    An empty signature is accepted, as clients that keep no signatures send it.
    """

    def is_ours(sampled: RecordedAnswer, block: Any) -> bool:
        signature = block.signature if isinstance(block, ThinkingBlock) else ""
        return not signature or verify(key, sampled.tokens, signature)

    return [
        sampled if sampled and all(is_ours(sampled, block) for block in answer) else None
        for sampled, answer in zip(recalled, answers(request.messages), strict=True)
    ]


def report_rules(context: ServerContext, normalized: Normalized[Any]) -> None:
    """Count the rules that were applied, and log each kind of unreadable header once."""
    for odd in normalized.unparsed:
        context.metrics.unparsed.inc()
        warn_once(odd, context.reported)
    for applied in normalized.applied:
        context.metrics.rule_applications.labels(applied.rule).inc()
