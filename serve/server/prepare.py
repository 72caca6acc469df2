"""A request of the Messages API made ready for the engine: normalised, rendered, tokenised, its demands compiled.

What each of these means is decided in `normalize`, `render` and `constrain`. No HTTP.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from dataclasses import dataclass
from typing import Any

from serve.api.answers import new_id
from serve.api.messages import CountTokensRequest, InvalidRequest, MessagesRequest, SeededRequest, ThinkingBlock
from serve.api.stops import Stops
from serve.diagnosis.sections import message_parts, said, system_parts
from serve.engine.request import GenerationRequest
from serve.engine.steps import SamplingParams
from serve.prompt.conversation import answers
from serve.prompt.render import Prompt, Recalled, prompt
from serve.prompt.replay import RecordedAnswer
from serve.prompt.signing import verify
from serve.rules.log import warn_once
from serve.rules.normalize import Normalized, normalize
from serve.server.context import RequestContext, ServerContext
from serve.web.timing import Phases

log = logging.getLogger("tokenzero.serving")


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine."""

    id: str  # of the message that answers it
    caller: RequestContext
    original: MessagesRequest  # as it came
    message: MessagesRequest  # as the rules left it
    prompt: Prompt
    generation: GenerationRequest
    stops: Stops  # that end its text
    scope: bytes  # whose sampled turns it shares
    applied: tuple[str, ...]  # the rules that changed it, in order, with their places
    clamped: bool  # the context has less room than `max_tokens`


def prepare(serving: ServerContext, message: MessagesRequest, caller: RequestContext, phases: Phases) -> Prepared:
    """Normalise, render and tokenise a request, compile what it demands, clamp its `max_tokens` to the room left."""
    with phases.timed("normalize"):
        normalized = normalize(message, caller.rules)
    report(serving, normalized)
    scope = scope_of(serving.engine.fingerprint, caller)
    rendered = rendered_prompt(serving, normalized.request, scope, caller.rules, phases)
    limit = serving.engine.settings.max_model_len
    room = limit - len(rendered.tokens)
    if room < 1:
        raise InvalidRequest(
            f"messages: prompt is too long: {len(rendered.tokens)} tokens, expected at most {limit - 1}"
        )
    with phases.timed("constrain"):
        constraint = serving.constrain(normalized.request, rendered.thinking)
    generation = GenerationRequest(
        tokens=rendered.tokens,
        max_tokens=min(message.max_tokens, room),
        stop_ids=serving.stop_ids,
        sampling=SamplingParams(
            temperature=1.0 if message.temperature is None else message.temperature,
            top_k=message.top_k or 0,
            top_p=1.0 if message.top_p is None else message.top_p,
            seed=seed_of(message),
        ),
        salt=caller.salt,
        constraint=constraint,
    )
    applied = tuple(f"{a.rule} {a.where}" for a in normalized.applied)
    return Prepared(
        new_id("msg"),
        caller,
        message,
        normalized.request,
        rendered,
        generation,
        Stops(message.stop_sequences or ()),
        scope,
        applied,
        room < message.max_tokens,
    )


def prompt_length(serving: ServerContext, request: CountTokensRequest, caller: RequestContext, phases: Phases) -> int:
    """The length of the prompt that the request would have."""
    with phases.timed("normalize"):
        normalized = normalize(request, caller.rules).request
    scope = scope_of(serving.engine.fingerprint, caller)
    return len(rendered_prompt(serving, normalized, scope, caller.rules, phases).tokens)


def seed_of(message: MessagesRequest) -> int:
    """A seed of 32 bits: a fresh one unless the request has its own, of which those that need more are hashed."""
    seed = message.seed if isinstance(message, SeededRequest) else None
    if seed is None:
        return secrets.randbits(32)
    if 0 <= seed < 2**32:
        return seed
    written = seed.to_bytes(seed.bit_length() // 8 + 1, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(written, digest_size=4).digest(), "little")


def scope_of(fingerprint: bytes, caller: RequestContext) -> bytes:
    """What separates those who may share sampled turns: the model's fingerprint, the caller's salt and key."""
    parts = (fingerprint, caller.salt, caller.key)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def rendered_prompt(
    serving: ServerContext, request: CountTokensRequest, scope: bytes, rules: frozenset[str], phases: Phases
) -> Prompt:
    """The prompt of a normalised request, with those of its answers replayed that were sampled here."""
    most = serving.engine.settings.max_model_len - 1
    if (least := least_tokens(request, serving.tokenizer.max_token_chars)) > most:
        raise InvalidRequest(f"messages: prompt is too long: at least {least} tokens, expected at most {most}")
    with phases.timed("recall"):
        recalled = trusted(serving.replay.recall(scope, request.messages), request, serving.signing_key)
    with phases.timed("render"):
        return prompt(
            request, serving.tokenizer, recalled, serving.render_history_with_template, "tools-first" in rules
        )


def least_tokens(request: CountTokensRequest, longest: int) -> int:
    """Fewer tokens than a prompt can have: one a message, and texts of nothing but tokens of `longest` characters.

    So what is out of all proportion is refused before it is rendered.
    """
    texts = sum(len(text) for _, text in system_parts(request))
    texts += sum(len(said(block)) for _, block in message_parts(request) if not isinstance(block, ThinkingBlock))
    return max(len(request.messages), texts // longest)


def trusted(recalled: Recalled, request: CountTokensRequest, key: bytes) -> Recalled:
    """What was recalled, but for answers whose thinking somebody else has signed: these are text like any other.

    Clients that keep no signatures send empty ones, which prove nothing and harm nothing.
    """

    def ours(sampled: RecordedAnswer, block: Any) -> bool:
        signature = block.signature if isinstance(block, ThinkingBlock) else ""
        return not signature or verify(key, sampled.tokens, signature)

    return [
        sampled if sampled and all(ours(sampled, block) for block in answer) else None
        for sampled, answer in zip(recalled, answers(request.messages), strict=True)
    ]


def report(serving: ServerContext, normalized: Normalized[Any]) -> None:
    """Count what the rules did, and log once what they could not read."""
    for odd in normalized.unparsed:
        serving.metrics.unparsed.inc()
        warn_once(odd, serving.reported)
    for applied in normalized.applied:
        serving.metrics.normalized.labels(applied.rule).inc()
