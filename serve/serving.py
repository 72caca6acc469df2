"""A request of the Messages API made ready for the engine, and what the engine samples made an answer.

What a request means is decided in `messages`, `normalize`, `render` and `constrain`; what an answer says, in `parse`
and `blocks`. Here one is led to the other. No HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from starlette.concurrency import run_in_threadpool

from serve import engine as eng
from serve.blocks import BlockStream, shown
from serve.constrain import constraint_of, make_constrainer
from serve.divergence import Divergences, Seen
from serve.formats import behind_call, of_json
from serve.messages import (
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    CountTokensRequest,
    Diagnostics,
    DiagnosticsRequest,
    DispatchedCall,
    Error,
    ErrorDetail,
    Event,
    FunctionCall,
    InputJsonDelta,
    InvalidRequest,
    Message,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    OutputBlock,
    Ping,
    SignatureDelta,
    Stop,
    StopReason,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolCallDispatch,
    ToolUseBlock,
    Usage,
    new_id,
)
from serve.metrics import ServerMetrics
from serve.normalize import DEFAULT_RULES, Normalized, Unparsed, normalize
from serve.outcomes import Outcomes, followed
from serve.parse import AnswerStream, Call, Stopped
from serve.render import Prompt, Recalled, Tokenizer, prompt
from serve.replay import ReplayLog, Sampled, sign, signing_key, verify
from serve.savings import Savings
from serve.sections import vocabulary_of
from serve.sequence import Constraint
from serve.steps import SamplingParams
from serve.timing import Phases
from serve.turns import answers
from serve.volatility import Volatility

log = logging.getLogger("tokenzero.serving")

PING_SECONDS = 5.0

# The constraint of a request's answer; the flag says that the prompt ends inside thinking.
Constrain = Callable[[MessagesRequest, bool], Constraint | None]


@dataclass(frozen=True)
class Serving:
    """Everything that a request needs on its way."""

    engine: eng.Engine
    tokenizer: Tokenizer
    model_name: str
    stop_ids: frozenset[int]
    rules: frozenset[str]  # of the normaliser, for requests that name none
    replay: ReplayLog
    signing_key: bytes
    constrain: Constrain
    metrics: ServerMetrics
    divergences: Divergences
    volatility: Volatility
    outcomes: Outcomes = field(default_factory=Outcomes)
    savings: Savings = field(default_factory=Savings)
    template_history: bool = False  # answers in the history are the chat template's business, nothing is replayed
    dispatch: bool = False  # tell each tool call as an event of its own
    reported: set[str] = field(default_factory=set)  # shapes of unparsed preambles that were logged already


@dataclass(frozen=True)
class Caller:
    """What a request says outside of its body: who asks, and how the prompt is to be made."""

    rules: frozenset[str]  # of the normaliser
    salt: bytes = b""  # requests with different salts share no page and no sampled turn
    key: bytes = b""  # callers with different keys share no sampled turn
    agent: str = ""  # the client's name, as its user agent has it


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine."""

    id: str  # of the message that answers it
    caller: Caller
    original: MessagesRequest  # as it came
    message: MessagesRequest  # as the rules left it
    prompt: Prompt
    generation: eng.GenerationRequest
    scope: bytes  # whose sampled turns it shares
    applied: tuple[str, ...]  # the rules that changed it, in order, with their places
    clamped: bool  # the context has less room than `max_tokens`


def make_serving(
    engine: eng.Engine,
    tokenizer: Tokenizer,
    model_name: str,
    stop_ids: Collection[int],
    *,
    rules: Collection[str] = DEFAULT_RULES,
    store: Path | None = None,
    constrain: Constrain | None = None,
    template_history: bool = False,
    dispatch: bool = False,
    trace_text: bool = True,
) -> Serving:
    """Open what a server needs beside its engine: the log of sampled turns below `store`, the key that signs, masks.

    `constrain` takes the place of what requests demand of their answers; without `trace_text` no report on a prompt
    shows its words. Raises StoreError and OSError for a store that
    cannot be used, ValueError for a tokenizer that constrained decoding cannot read and for a rule that its template
    does not allow.
    """
    if problem := unrendered(tokenizer, rules):
        raise ValueError(f"--normalize {problem}")
    if constrain is None:
        constrainer = make_constrainer(tokenizer.hf, stop_ids, engine.config.vocab_size)

        def constrain(request: MessagesRequest, thinking_opened: bool) -> Constraint | None:
            return constraint_of(request, constrainer, tokenizer.template.format, thinking_opened)

    return Serving(
        engine=engine,
        tokenizer=tokenizer,
        model_name=model_name,
        stop_ids=frozenset(stop_ids),
        rules=frozenset(rules),
        replay=ReplayLog(store),
        signing_key=signing_key(store),
        constrain=constrain,
        metrics=ServerMetrics(engine),
        divergences=Divergences(
            vocabulary_of(tokenizer.hf),
            engine.settings.page_size,
            lambda start, stop: engine.cost.prefill_s(start, stop),  # the engine's cost model grows as it measures
            trace_text,
        ),
        volatility=Volatility(trace_text),
        template_history=template_history,
        dispatch=dispatch,
    )


def unrendered(tokenizer: Tokenizer, rules: Collection[str]) -> str | None:
    """Which of the rules the chat template does not allow, and why; None for none."""
    if "tools-first" in rules and not tokenizer.template.tools_can_lead:
        return "tools-first: the chat template does not write the tools right behind the system text: leave it out"
    return None


def prepare(serving: Serving, message: MessagesRequest, caller: Caller, phases: Phases) -> Prepared:
    """Normalise, render and tokenise a request, compile what it demands, clamp its `max_tokens` to the room left."""
    with phases.timed("normalize"):
        normalized = normalize(message, caller.rules)
    report(serving, normalized)
    scope = scope_of(serving, caller)
    rendered = rendered_prompt(serving, normalized.request, scope, caller.rules, phases)
    limit = serving.engine.settings.max_model_len
    room = limit - len(rendered.tokens)
    if room < 1:
        raise InvalidRequest(
            f"messages: prompt is too long: {len(rendered.tokens)} tokens, expected at most {limit - 1}"
        )
    with phases.timed("constrain"):
        constraint = serving.constrain(normalized.request, rendered.thinking)
    generation = eng.GenerationRequest(
        tokens=rendered.tokens,
        max_tokens=min(message.max_tokens, room),
        stop_ids=serving.stop_ids,
        sampling=SamplingParams(
            temperature=1.0 if message.temperature is None else message.temperature,
            top_k=message.top_k or 0,
            top_p=1.0 if message.top_p is None else message.top_p,
            seed=secrets.randbits(32),
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
        scope,
        applied,
        room < message.max_tokens,
    )


def count_tokens(serving: Serving, request: CountTokensRequest, caller: Caller, phases: Phases) -> int:
    """The length of the prompt that the request would have."""
    with phases.timed("normalize"):
        normalized = normalize(request, caller.rules).request
    return len(rendered_prompt(serving, normalized, scope_of(serving, caller), caller.rules, phases).tokens)


def scope_of(serving: Serving, caller: Caller) -> bytes:
    """What separates those who may share sampled turns."""
    parts = (serving.engine.fingerprint, caller.salt, caller.key)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def rendered_prompt(
    serving: Serving, request: CountTokensRequest, scope: bytes, rules: frozenset[str], phases: Phases
) -> Prompt:
    """The prompt of a normalised request, with those of its answers replayed that were sampled here."""
    with phases.timed("recall"):
        recalled = trusted(serving.replay.recall(scope, request.messages), request, serving.signing_key)
    with phases.timed("render"):
        return prompt(request, serving.tokenizer, recalled, serving.template_history, "tools-first" in rules)


def trusted(recalled: Recalled, request: CountTokensRequest, key: bytes) -> Recalled:
    """What was recalled, but for answers whose thinking somebody else has signed: these are text like any other.

    Clients that keep no signatures send empty ones, which prove nothing and harm nothing.
    """

    def ours(sampled: Sampled, block: Any) -> bool:
        signature = block.signature if isinstance(block, ThinkingBlock) else ""
        return not signature or verify(key, sampled.tokens, signature)

    return [
        sampled if sampled and all(ours(sampled, block) for block in answer) else None
        for sampled, answer in zip(recalled, answers(request.messages), strict=True)
    ]


def report(serving: Serving, normalized: Normalized) -> None:
    """Count what the rules did, and log once what they could not read."""
    for odd in normalized.unparsed:
        serving.metrics.unparsed.inc()
        warn_once(odd, serving.reported)
    for applied in normalized.applied:
        serving.metrics.normalized.labels(applied.rule).inc()


def warn_once(odd: Unparsed, reported: set[str]) -> None:
    """Log what a rule could not read, unless its shape is among those `reported`."""
    shape = re.sub(r"=[^;\s]*", "=", odd.text)[:80]  # values may be fresh in every request
    if shape not in reported and len(reported) < 1000:
        reported.add(shape)
        log.warning("%s begins like a billing header but does not parse, and stays: %.120r", odd.where, odd.text)


def answer(serving: Serving, prepared: Prepared, phases: Phases) -> AsyncGenerator[Event, None]:
    """The answer as the API's events, in their order: pings while the prompt is computed, then the message."""
    return followed(
        generated(serving, prepared, phases),
        prepared.id,
        phases,
        serving.outcomes,
        first=serving.metrics.ttft.observe,
        done=lambda usage: asyncio.get_running_loop().run_in_executor(
            None, note_savings, serving, prepared, usage.cache_read_input_tokens
        ),
        ended=serving.metrics.count_phases,
    )


async def generated(serving: Serving, prepared: Prepared, phases: Phases) -> AsyncGenerator[Event, None]:
    """The events of an answer; `message_start` comes with the first token, when the counts of its usage are known."""
    message, pieces = prepared.message, answer_stream(serving, prepared)
    one_call = message.tool_choice is not None and message.tool_choice.disable_parallel_tool_use
    ids = prepared.prompt.begun.tolist()
    content = BlockStream(shown(message), lambda: sign(serving.signing_key, ids))
    usage, sampled = Usage(0), 0
    silent_since = started_at = sampled_at = time.perf_counter()
    reason: StopReason = "end_turn"
    stop: str | None = None
    by_tier: dict[str, int] = {}
    traced = False
    async with aclosing(eng.generate(serving.engine, prepared.generation, PING_SECONDS)) as events:
        async for event in events:
            new = []
            match event:
                case eng.Waiting():
                    silent_since = -inf
                case eng.Failed(problem):
                    yield Error(ErrorDetail("api_error", problem))
                    return
                case eng.Started(prompt_tokens, reused) as started:
                    # The last prompt token runs through the model for its logits; its KV is stored with the others.
                    by_tier = {"device": reused - sum(started.restored.values()), **started.restored}
                    usage = Usage(0, prompt_tokens - reused, reused, 0, by_tier)
                    phases.seconds.update(queue=started.queued_s, prefill=started.prefill_s)
                    diagnostics: Diagnostics | UnsetType | None = UNSET
                    if isinstance(message.diagnostics, DiagnosticsRequest):
                        diagnostics, traced = await traced_in(phases, serving, prepared, by_tier), True
                    started_at = time.perf_counter()
                    yield MessageStart(
                        Message(id=prepared.id, model=message.model, usage=usage, diagnostics=diagnostics)
                    )
                case eng.Sampled(token):
                    now = time.perf_counter()
                    if sampled:
                        serving.metrics.itl.observe(now - sampled_at)
                    sampled_at = now
                    sampled += 1
                    ids.append(token)
                    new = pieces.feed(token)
                case eng.Finished(why):
                    sampled += why == "stop"
                    if why != "stop":
                        reason = "model_context_window_exceeded" if prepared.clamped else "max_tokens"
                    new = pieces.finish()
            for piece in new:
                if isinstance(piece, Stopped):
                    reason, stop = "stop_sequence", piece.sequence
                for block_event in content.add(piece):
                    yield block_event
                    silent_since = time.perf_counter()
                if isinstance(piece, Call):
                    if serving.dispatch:
                        yield dispatched(piece, content.calls - 1)
                    if one_call:
                        # The model does not get to close it: the history has it closed all the same.
                        closing = behind_call(pieces.format).removeprefix(pieces.source.text[pieces.sent :])
                        ids += serving.tokenizer.follow(closing).tolist()
                        break
            if stop is not None or (content.calls and one_call):
                break
            # Thinking that is not shown and a call that is not complete may take long, too.
            if time.perf_counter() - silent_since > PING_SECONDS:
                yield Ping()
                silent_since = time.perf_counter()
            if sampled and not traced:  # nobody has asked for the report, so the first token need not wait for it
                await traced_in(phases, serving, prepared, by_tier)
                traced, started_at = True, started_at + phases.seconds["trace"]
    if not traced:
        await traced_in(phases, serving, prepared, by_tier)
    for block_event in content.close():
        yield block_event
    if content.calls and reason == "end_turn":
        reason = "tool_use"
    serving.divergences.answered(prepared.id, ids[len(prepared.prompt.begun) :])
    # What a stop sequence cut off was sampled, but is no part of the answer.
    if stop is None and prepared.prompt.opening is not None and not serving.template_history:
        turn = Sampled(prepared.prompt.opening, np.asarray(ids, np.int32))
        await run_in_threadpool(serving.replay.put, prepared.scope, message.messages, content.blocks, turn)
    phases.seconds["generate"] = time.perf_counter() - started_at
    yield MessageDelta(Stop(reason, stop), msgspec.structs.replace(usage, output_tokens=sampled))
    yield MessageStop()


async def traced_in(
    phases: Phases, serving: Serving, prepared: Prepared, by_tier: dict[str, int]
) -> Diagnostics | UnsetType | None:
    """What `trace` returns, from a thread, as a phase of the request."""
    with phases.timed("trace"):
        return await run_in_threadpool(trace, serving, prepared, by_tier)


def trace(serving: Serving, prepared: Prepared, by_tier: dict[str, int]) -> Diagnostics | UnsetType | None:
    """Report what a request found in the cache and what kept it from more; answers the request's own question."""
    request, rendered, salt = prepared.message, prepared.prompt, prepared.generation.salt
    new = Seen(prepared.id, request, rendered, rendered.tokens, serving.engine.fingerprint.hex(), salt)
    asked = request.diagnostics
    diagnostics: Diagnostics | UnsetType | None = UNSET
    try:
        if isinstance(asked, DiagnosticsRequest):
            diagnostics = serving.divergences.diagnose(new, asked.previous_message_id, sum(by_tier.values()))
        made = serving.divergences.started(new, by_tier, prepared.applied)
        if made.cause:
            serving.metrics.divergences.labels(made.cause).inc()
            serving.metrics.lost.labels(made.cause).inc(made.lost_tokens)
        serving.metrics.volatile.inc(len(serving.volatility.observe(prepared.caller.agent, request)))
    except Exception:  # a report is not worth an answer
        log.exception("no report on %s", prepared.id)
    return diagnostics


def note_savings(serving: Serving, prepared: Prepared, reused: int) -> None:
    """Count what each rule saved a request."""
    caller, length = prepared.caller, len(prepared.prompt.tokens)
    try:
        saved = serving.savings.observe(prepared.original, caller.rules, reused, length, caller.salt)
    except Exception:  # nor is this
        log.exception("nothing is known of what the rules saved %s", prepared.id)
        return
    serving.outcomes.note(prepared.id, saved_tokens=saved)
    for rule, tokens in saved.items():
        seconds = serving.engine.cost.prefill_s(reused - tokens, reused)
        serving.metrics.saved_tokens.labels(rule).inc(tokens)
        serving.metrics.saved_seconds.labels(rule).inc(seconds if isfinite(seconds) else 0)


def answer_stream(serving: Serving, prepared: Prepared) -> AnswerStream:
    """What reads the answer to a request."""
    message, form = prepared.message, serving.tokenizer.template.format
    choice, config = message.tool_choice, message.output_config
    offered = () if choice and choice.type == "none" else message.tools or ()
    return AnswerStream(
        serving.tokenizer.hf.backend_tokenizer,
        of_json(form) if config and config.format else form,
        message.stop_sequences or (),
        {tool.name: tool.input_schema for tool in offered},
        prepared.prompt.thinking,
        prepared.prompt.begun.tolist(),
    )


def dispatched(call: Call, index: int) -> ToolCallDispatch:
    """A call that may be run now."""
    return ToolCallDispatch(DispatchedCall(index, call.id, FunctionCall(call.name, call.arguments)))


async def collect(first: Event, rest: AsyncGenerator[Event, None]) -> Message | Error:
    """The whole answer as one message, or the error that ended it."""
    start: Message | None = None
    content: list[OutputBlock] = []
    parts: list[str] = []
    signature = ""
    async with aclosing(rest):
        events = [first]
        while events:
            match event := events.pop():
                case Error():
                    return event
                case MessageStart(begun):
                    start = begun
                case ContentBlockStart(_, block):
                    content.append(block)
                    parts, signature = [], ""
                case ContentBlockDelta(_, SignatureDelta(made)):
                    signature = made
                case ContentBlockDelta(_, TextDelta(more) | ThinkingDelta(more) | InputJsonDelta(more)):
                    parts.append(more)
                case ContentBlockStop():
                    content[-1] = filled(content[-1], "".join(parts), signature)
                case MessageDelta(ended, usage):
                    assert start is not None
                    return msgspec.structs.replace(
                        start,
                        content=tuple(content),
                        stop_reason=ended.stop_reason,
                        stop_sequence=ended.stop_sequence,
                        usage=usage,
                    )
            events.append(await anext(rest))
    raise AssertionError("an answer ends with message_delta or error")


def filled(block: OutputBlock, text: str, signature: str) -> OutputBlock:
    """An empty block with what its deltas brought."""
    match block:
        case TextBlock():
            return TextBlock(text)
        case ThinkingBlock():
            return ThinkingBlock(text, signature)
        case ToolUseBlock(id, name):
            return ToolUseBlock(id, name, msgspec.json.decode(text))
