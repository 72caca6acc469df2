"""The answer to a prepared request, as events of the Messages API, with what is reported and counted along the way.

`answer_state` decides what an answer contains. No HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from math import isfinite

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from starlette.concurrency import run_in_threadpool

from cache.eviction import State
from serve.api.answers import (
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    Diagnostics,
    Error,
    ErrorDetail,
    Event,
    InputJsonDelta,
    Message,
    MessageDelta,
    MessageStart,
    Ping,
    SignatureDelta,
    StopReason,
    TextDelta,
    ThinkingDelta,
    Usage,
)
from serve.api.messages import DiagnosticsRequest, MessagesRequest, OutputBlock, TextBlock, ThinkingBlock, ToolUseBlock
from serve.diagnosis.divergence import RememberedRequest
from serve.engine.request import Event as EngineEvent
from serve.engine.request import Failed, Finished, Forecast, Started, TokenEvent, Waiting
from serve.formats.format import format_for_json
from serve.formats.readers import complete_arguments
from serve.formats.stream import AnswerStream
from serve.prompt.offered_tools import offered_tools
from serve.prompt.replay import RecordedAnswer
from serve.prompt.signing import sign
from serve.server.answer_state import AnswerState, reused_by_tier
from serve.server.context import ServerContext
from serve.server.expected import cache_forecast
from serve.server.prepare import Prepared
from serve.web.request_status import track
from serve.web.timing import Phases

log = logging.getLogger("tokenzero.server")

PING_SECONDS = 5.0


def answer(context: ServerContext, prepared: Prepared, phases: Phases) -> AsyncGenerator[Event, None]:
    """The answer as the API's events, in order: pings while the prompt is computed, then the message."""
    state = answer_state(context, prepared)

    def ended(seconds: Mapping[str, float]) -> None:
        context.statuses.update(prepared.id, generated_tokens=state.sampled)  # also of an answer that broke off
        context.metrics.count_phases(seconds)

    return track(
        generated(context, prepared, phases, state),
        prepared.id,
        phases,
        context.statuses,
        first=partial(observe_ttft, context, prepared, phases),
        done=partial(count_answer, context, prepared),
        ended=ended,
    )


def observe_ttft(context: ServerContext, prepared: Prepared, phases: Phases, seconds: float) -> None:
    """Count the time to an answer's first token, and how far off the predicted one was; learn from both."""
    context.metrics.ttft.observe(seconds)
    if forecast := context.statuses.get(prepared.id).forecast:
        context.metrics.forecast_error.observe(abs(forecast.predicted_ttft_ms / 1e3 - seconds) / seconds)
    within = phases.submitted[0] + phases.seconds["queue"] + phases.seconds["prefill"]
    context.overhead.observe(max(0.0, seconds - within))


def expect(context: ServerContext, prepared: Prepared, phases: Phases, forecast: Forecast) -> None:
    """Note what the engine expects of a request, for the header of its answer and its record."""
    found = cache_forecast(context, forecast, phases.submitted[0])
    context.statuses.update(prepared.id, forecast=found)


def count_answer(context: ServerContext, prepared: Prepared, usage: Usage) -> None:
    """Count a complete answer for its key, and in a thread what each rule saved."""
    if admission := prepared.request_context.admission:
        prompt = len(prepared.prompt.tokens)
        admission.count(prompt, usage.cache_read_input_tokens, usage.output_tokens)
    loop = asyncio.get_running_loop()
    loop.run_in_executor(None, count_savings, context, prepared, usage.cache_read_input_tokens)


async def generated(
    context: ServerContext, prepared: Prepared, phases: Phases, state: AnswerState
) -> AsyncGenerator[Event, None]:
    """The events of an answer; `message_start` comes with the first token, when its usage is known."""
    silent_since = started_at = time.perf_counter()
    engine_events = context.engine.generate(prepared.generation, PING_SECONDS)
    phases.submitted.append(phases.elapsed())
    expected = False
    async with aclosing(with_itl(engine_events, context.metrics.itl.observe)) as coming:
        async for event in coming:
            if not expected and isinstance(event, Started | Waiting) and event.forecast:
                expect(context, prepared, phases, event.forecast)
                expected = True
            if isinstance(event, Failed):
                kind = "overloaded_error" if event.temporary else "api_error"
                yield Error(ErrorDetail(kind, event.message), prepared.request_context.request_id)
                return
            if isinstance(event, Started):
                events = await on_started(context, prepared, phases, state, event)
                started_at = time.perf_counter() - phases.seconds.get("trace", 0.0)
            else:
                events = await on_progress(state, event)
            # Thinking that is not shown, and a call that is not complete, may take long.
            if not events and not state.ended and time.perf_counter() - silent_since > PING_SECONDS:
                events = [Ping()]
            for sent in events:
                yield sent
                silent_since = time.perf_counter()
            if state.ended:
                break
            if state.sampled:  # the first token does not wait for the report
                await report_once(context, prepared, phases, state.usage.cache_read_by_tier)
    await report_once(context, prepared, phases, state.usage.cache_read_by_tier)
    for sent in state.close():
        yield sent
    await remember(context, prepared, state)
    report_end(context, prepared, state.reason)
    phases.seconds["generate"] = time.perf_counter() - started_at - phases.seconds["trace"]
    for sent in state.finish():
        yield sent


async def on_started(
    context: ServerContext, prepared: Prepared, phases: Phases, state: AnswerState, started: Started
) -> list[Event]:
    """Begin the message, with the report on its prompt if the request asked for it."""
    phases.seconds.update(queue=started.queued_s, prefill=started.prefill_s)
    diagnostics: Diagnostics | UnsetType | None = UNSET
    if isinstance(prepared.message.diagnostics, DiagnosticsRequest):
        diagnostics = await report_once(context, prepared, phases, reused_by_tier(started))
    return state.on_started(started, diagnostics)


async def on_progress(state: AnswerState, event: EngineEvent) -> list[Event]:
    """The events that follow from a token, the end, or a wait; where the parser may take long, it runs in a thread."""
    match event:
        case TokenEvent(token):
            step = partial(state.on_token, token)
        case Finished(reason):
            step = partial(state.on_finished, reason)
        case _:
            return [Ping()]
    return await run_in_threadpool(step) if state.stream.heavy else step()


def answer_state(context: ServerContext, prepared: Prepared) -> AnswerState:
    """The state of an answer of which nothing is generated yet."""
    return AnswerState(
        id=prepared.id,
        message=prepared.message,
        stream=answer_stream(context, prepared),
        begun=tuple(prepared.prompt.prefilled_answer_ids.tolist()),
        sign=lambda ids: sign(context.signing_key, ids),
        encode=context.tokenizer.encode_after,
        asked=prepared.request_context.wishes.asked,
        clamped=prepared.clamped,
        dispatch=context.config.enable_streaming_tool_dispatch,
    )


async def with_itl(
    events: AsyncGenerator[EngineEvent, None], observe: Callable[[float], object]
) -> AsyncGenerator[EngineEvent, None]:
    """The same events; `observe` is called with the seconds between two tokens."""
    sampled_at: float | None = None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, TokenEvent):
                now = time.perf_counter()
                if sampled_at is not None:
                    observe(now - sampled_at)
                sampled_at = now
            yield event


async def remember(context: ServerContext, prepared: Prepared, state: AnswerState) -> None:
    """Keep the answer's tokens for the conversation's next request, and for the reports on later requests."""
    context.divergences.answered(prepared.id, state.sampled_ids)
    opening = prepared.prompt.opening
    if not prepared.message.max_tokens:
        return  # there is no answer
    # Tokens that a stop sequence cut off were sampled, but the answer does not contain them.
    if state.stop_sequence is not None or opening is None or context.config.render_history_with_template:
        return
    recorded = RecordedAnswer(opening, np.asarray(state.ids, np.int32))
    await run_in_threadpool(
        context.replay.put, prepared.scope, prepared.message.messages, state.blocks.blocks, recorded
    )


def report_end(context: ServerContext, prepared: Prepared, reason: StopReason) -> None:
    """Tell the engine what the agent does now that it has its answer."""
    request, sent = prepared.request_context, prepared.generation
    state = State.ENDED if request.final else agent_state(reason, prepared.message, bool(sent.parent))
    context.statuses.update(prepared.id, agent_state=state.value)
    context.engine.answered(prepared.id, state, sent.session if request.final else "")


def agent_state(reason: StopReason, message: MessagesRequest, has_parent: bool) -> State:
    """What an agent does after an answer that ended so; one that has a parent reports to it and ends."""
    if reason == "tool_use":
        return State.TOOL
    if not message.max_tokens or reason not in ("end_turn", "stop_sequence"):
        return State.UNKNOWN  # the answer was cut, or there is none
    return State.ENDED if has_parent else State.PERSON


async def report_once(
    context: ServerContext, prepared: Prepared, phases: Phases, by_tier: dict[str, int]
) -> Diagnostics | UnsetType | None:
    """Run `report_divergence` in a thread, as the request's phase `trace`, unless that was done; return its result."""
    if "trace" in phases.seconds:
        return UNSET
    with phases.timed("trace"):
        return await run_in_threadpool(report_divergence, context, prepared, by_tier)


def report_divergence(
    context: ServerContext, prepared: Prepared, by_tier: dict[str, int]
) -> Diagnostics | UnsetType | None:
    """Report what a request found in the cache and why it did not find more; return the `diagnostics` it asked for."""
    request, rendered, salt = prepared.message, prepared.prompt, prepared.generation.salt
    model, key = context.engine.fingerprint.hex(), prepared.request_context.owner
    head = prepared.generation.head
    new = RememberedRequest(prepared.id, request, rendered, rendered.tokens, model, salt, key, head)
    asked = request.diagnostics
    diagnostics: Diagnostics | UnsetType | None = UNSET
    try:
        if isinstance(asked, DiagnosticsRequest):
            diagnostics = context.divergences.diagnose(new, asked.previous_message_id, sum(by_tier.values()))
        report = context.divergences.started(new, by_tier, prepared.applied)
        if report.cause:
            context.metrics.cache_misses.labels(report.cause).inc()
            context.metrics.cache_miss_tokens.labels(report.cause).inc(report.lost_tokens)
        context.metrics.volatile.inc(len(context.volatility.observe(prepared.request_context.agent, request, key)))
    except Exception:  # a failed report must not fail the answer
        log.exception("%s: the report on its prompt failed", prepared.id)
    return diagnostics


def count_savings(context: ServerContext, prepared: Prepared, reused: int) -> None:
    """Count the tokens and seconds that each rule saved a request of which `reused` tokens came from the cache."""
    request, length = prepared.request_context, len(prepared.prompt.tokens)
    try:
        saved = context.savings.observe(prepared.original, request.rules, reused, length, request.salt)
    except Exception:  # a failed estimate must not fail the answer
        log.exception("%s: the estimate of what the rules saved failed", prepared.id)
        return
    context.statuses.update(prepared.id, saved_tokens=saved)
    for rule, tokens in saved.items():
        seconds = context.engine.cost.prefill_s(reused - tokens, reused)
        context.metrics.saved_tokens.labels(rule).inc(tokens)
        context.metrics.saved_seconds.labels(rule).inc(seconds if isfinite(seconds) else 0)


def answer_stream(context: ServerContext, prepared: Prepared) -> AnswerStream:
    """The parser of the answer to a request."""
    message, form = prepared.message, context.tokenizer.template.format
    choice = message.tool_choice
    offered = () if choice and choice.type == "none" else offered_tools(message).callable
    return AnswerStream(
        context.tokenizer.hf.backend_tokenizer,
        format_for_json(form) if message.answer_format else form,
        prepared.stops,
        {tool.name: tool.input_schema for _, tool in offered},
        prepared.prompt.thinking,
        prepared.prompt.prefilled_answer_ids.tolist(),
    )


async def collect(first: Event, rest: AsyncGenerator[Event, None]) -> Message | Error:
    """The whole answer as one message, or the error that ended it; `first` is its first event, `rest` the others."""
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
    """An empty block, filled with what its deltas contained."""
    match block:
        case TextBlock():
            return TextBlock(text)
        case ThinkingBlock():
            return ThinkingBlock(text, signature)
        case ToolUseBlock(id, name):
            return ToolUseBlock(id, name, complete_arguments(text))
