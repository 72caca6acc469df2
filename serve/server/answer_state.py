"""One answer while it is generated: the engine's events in, the Messages API's events out. No clock and no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np
from msgspec import UnsetType

from serve.api.answers import (
    Diagnostics,
    DispatchedCall,
    Event,
    FunctionCall,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    Stop,
    StopReason,
    ToolCallDispatch,
    Usage,
)
from serve.api.messages import MessagesRequest
from serve.api.retention import Asked
from serve.engine.request import Started
from serve.formats.format import text_after_call
from serve.formats.readers import Call
from serve.formats.stream import AnswerEvent, AnswerStream, Stopped
from serve.server.blocks import BlockStream, thinking_display
from serve.server.retention import cache_creation, retained


@dataclass(eq=False)
class AnswerState:
    """What has been generated of one answer.

    `on_started`, `on_token` and `on_finished` take one event of the engine and return the API's events that follow from
    it, in order. When `ended` is true, no further token is wanted. `close` and then `finish` return the last events.
    """

    id: str  # of the message
    message: MessagesRequest  # as the rules left it
    stream: AnswerStream  # parses the sampled tokens
    begun: tuple[int, ...]  # the tokens of the answer that the prompt ends with
    sign: Callable[[list[int]], str]  # the signature of thinking, given the answer's tokens so far
    encode: Callable[[str], np.ndarray]  # text that follows an added token -> [tokens] int32
    asked: tuple[Asked, ...] = ()  # what it asks to be kept
    clamped: bool = False  # the context had less room than `max_tokens`
    dispatch: bool = False  # each complete tool call is also sent as an event of its own
    usage: Usage = field(default_factory=lambda: Usage(0))
    sampled: int = 0  # tokens, the one that ended the answer included
    reason: StopReason = "end_turn"
    stop_sequence: str | None = None
    ended: bool = False  # by a stop sequence, or by the only call that the request allows

    def __post_init__(self) -> None:
        """Start with the tokens of the prompt's end and no content block."""
        self.ids = list(self.begun)  # all tokens of the answer
        self.blocks = BlockStream(thinking_display(self.message), lambda: self.sign(self.ids))
        choice = self.message.tool_choice
        self.one_call = choice is not None and bool(choice.disable_parallel_tool_use)

    @property
    def sampled_ids(self) -> list[int]:
        """The answer's tokens without those that the prompt ends with."""
        return self.ids[len(self.begun) :]

    def on_started(self, started: Started, diagnostics: Diagnostics | UnsetType | None) -> list[Event]:
        """Begin the message; the token counts of its prompt are known."""
        # The last prompt token runs through the model for its logits, whenever the same prompt comes.
        computed = started.prompt_tokens - started.reused_tokens
        self.usage = Usage(1, computed - 1, started.reused_tokens, 0, reused_by_tier(started))
        if self.asked:
            made = cache_creation(self.asked, started.kept, started.reused_tokens, computed - 1)
            told = retained(self.asked, started.kept)
            self.usage = msgspec.structs.replace(self.usage, cache_creation=made, retention=told)
        return [MessageStart(Message(id=self.id, model=self.message.model, usage=self.usage, diagnostics=diagnostics))]

    def on_token(self, token: int) -> list[Event]:
        """Add a sampled token."""
        self.sampled += 1
        self.ids.append(token)
        return self.add(self.stream.feed(token))

    def on_finished(self, reason: str) -> list[Event]:
        """Add what the parser held back; `reason` is the engine's, `stop` or `length`."""
        if reason == "stop":
            self.sampled += 1  # the stop id, which comes without a TokenEvent
        else:
            self.reason = "model_context_window_exceeded" if self.clamped else "max_tokens"
        if not self.message.max_tokens:
            return []  # also where the prompt ends within thinking or an answer
        return self.add(self.stream.finish(cut=reason != "stop"))

    def add(self, parsed: Iterable[AnswerEvent]) -> list[Event]:
        """Add what the parser returned, up to what ends the answer."""
        events: list[Event] = []
        for piece in parsed:
            events += self.blocks.add(piece)
            if isinstance(piece, Stopped):
                self.reason, self.stop_sequence, self.ended = "stop_sequence", piece.sequence, True
            if isinstance(piece, Call):
                if self.dispatch:
                    events.append(dispatch_event(piece, self.blocks.calls - 1))
                if self.one_call:
                    if not self.stream.source.ended:
                        # The model cannot write the closing delimiter any more; the conversation's history has it.
                        self.ids += self.encode(unwritten_closing(self.stream)).tolist()
                    self.ended = True
                    break
        return events

    def close(self) -> list[Event]:
        """Complete the open content block, if there is one."""
        closing: list[Event] = [*self.blocks.close()]
        if self.blocks.calls and self.reason == "end_turn":
            self.reason = "tool_use"
        return closing

    def finish(self) -> list[Event]:
        """The end of the message."""
        usage = msgspec.structs.replace(self.usage, output_tokens=self.sampled)
        return [MessageDelta(Stop(self.reason, self.stop_sequence), usage), MessageStop()]


def reused_by_tier(started: Started) -> dict[str, int]:
    """The reused tokens of a prompt by the tier that held them; those that no lower tier had were on the device."""
    return {"device": started.reused_tokens - sum(started.restored.values()), **started.restored}


def unwritten_closing(stream: AnswerStream) -> str:
    """The text that the format writes after a complete call and that the model has not written yet."""
    return text_after_call(stream.format).removeprefix(stream.source.text[stream.sent :])


def dispatch_event(call: Call, index: int) -> ToolCallDispatch:
    """The event that says that a call can be run now."""
    return ToolCallDispatch(DispatchedCall(index, call.id, FunctionCall(call.name, call.arguments)))
