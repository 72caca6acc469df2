"""What the engine samples, made the answer of the Messages API, with what is told and counted along with it.

What an answer says is decided in `parse` and `blocks`. No HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from math import inf, isfinite

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from starlette.concurrency import run_in_threadpool

from serve.api.answers import (
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    Diagnostics,
    DispatchedCall,
    Error,
    ErrorDetail,
    Event,
    FunctionCall,
    InputJsonDelta,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    Ping,
    SignatureDelta,
    Stop,
    StopReason,
    TextDelta,
    ThinkingDelta,
    ToolCallDispatch,
    Usage,
)
from serve.api.messages import DiagnosticsRequest, OutputBlock, TextBlock, ThinkingBlock, ToolUseBlock
from serve.diagnosis.divergence import RememberedRequest
from serve.engine.engine import generate
from serve.engine.request import Failed, Finished, Started, TokenEvent, Waiting
from serve.formats.families import behind_call, of_json
from serve.formats.readers import Call
from serve.formats.stream import AnswerStream, Stopped
from serve.prompt.replay import RecordedAnswer
from serve.prompt.signing import sign
from serve.server.blocks import BlockStream, shown
from serve.server.context import ServerContext
from serve.server.prepare import Prepared
from serve.web.request_status import track
from serve.web.timing import Phases

log = logging.getLogger("tokenzero.serving")

PING_SECONDS = 5.0


def answer(serving: ServerContext, prepared: Prepared, phases: Phases) -> AsyncGenerator[Event, None]:
    """The answer as the API's events, in their order: pings while the prompt is computed, then the message."""
    return track(
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


async def generated(serving: ServerContext, prepared: Prepared, phases: Phases) -> AsyncGenerator[Event, None]:
    """The events of an answer; `message_start` comes with the first token, when the counts of its usage are known."""
    message, pieces = prepared.message, answer_stream(serving, prepared)
    one_call = message.tool_choice is not None and message.tool_choice.disable_parallel_tool_use
    ids = prepared.prompt.prefilled_answer_ids.tolist()
    content = BlockStream(shown(message), lambda: sign(serving.signing_key, ids))
    usage, sampled = Usage(0), 0
    silent_since = started_at = sampled_at = time.perf_counter()
    reason: StopReason = "end_turn"
    stop: str | None = None
    by_tier: dict[str, int] = {}
    traced = False
    async with aclosing(generate(serving.engine, prepared.generation, PING_SECONDS)) as events:
        async for event in events:
            new = []
            match event:
                case Waiting():
                    silent_since = -inf
                case Failed(problem):
                    yield Error(ErrorDetail("api_error", problem))
                    return
                case Started(prompt_tokens, reused) as started:
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
                case TokenEvent(token):
                    now = time.perf_counter()
                    if sampled:
                        serving.metrics.itl.observe(now - sampled_at)
                    sampled_at = now
                    sampled += 1
                    ids.append(token)
                    new = await run_in_threadpool(pieces.feed, token) if pieces.heavy else pieces.feed(token)
                case Finished(why):
                    sampled += why == "stop"
                    if why != "stop":
                        reason = "model_context_window_exceeded" if prepared.clamped else "max_tokens"
                    new = await run_in_threadpool(pieces.finish) if pieces.heavy else pieces.finish()
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
                        ids += serving.tokenizer.encode_after(closing).tolist()
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
    serving.divergences.answered(prepared.id, ids[len(prepared.prompt.prefilled_answer_ids) :])
    # What a stop sequence cut off was sampled, but is no part of the answer.
    if stop is None and prepared.prompt.opening is not None and not serving.render_history_with_template:
        turn = RecordedAnswer(prepared.prompt.opening, np.asarray(ids, np.int32))
        await run_in_threadpool(serving.replay.put, prepared.scope, message.messages, content.blocks, turn)
    phases.seconds["generate"] = time.perf_counter() - started_at
    yield MessageDelta(Stop(reason, stop), msgspec.structs.replace(usage, output_tokens=sampled))
    yield MessageStop()


async def traced_in(
    phases: Phases, serving: ServerContext, prepared: Prepared, by_tier: dict[str, int]
) -> Diagnostics | UnsetType | None:
    """What `trace` returns, from a thread, as a phase of the request."""
    with phases.timed("trace"):
        return await run_in_threadpool(trace, serving, prepared, by_tier)


def trace(serving: ServerContext, prepared: Prepared, by_tier: dict[str, int]) -> Diagnostics | UnsetType | None:
    """Report what a request found in the cache and what kept it from more; answers the request's own question."""
    request, rendered, salt = prepared.message, prepared.prompt, prepared.generation.salt
    new = RememberedRequest(prepared.id, request, rendered, rendered.tokens, serving.engine.fingerprint.hex(), salt)
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


def note_savings(serving: ServerContext, prepared: Prepared, reused: int) -> None:
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


def answer_stream(serving: ServerContext, prepared: Prepared) -> AnswerStream:
    """What reads the answer to a request."""
    message, form = prepared.message, serving.tokenizer.template.format
    choice, config = message.tool_choice, message.output_config
    offered = () if choice and choice.type == "none" else message.tools or ()
    return AnswerStream(
        serving.tokenizer.hf.backend_tokenizer,
        of_json(form) if config and config.format else form,
        prepared.stops,
        {tool.name: tool.input_schema for tool in offered},
        prepared.prompt.thinking,
        prepared.prompt.prefilled_answer_ids.tolist(),
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
