"""One chat template: what it takes and writes, as `probe` has found out, and the call that applies it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from serve.formats.format import Format
from serve.prompt.conversation import ChatMessage

CALL_NAME = "call"  # of the call that stands for an answer
CALL_ID = "call00000"  # nine letters and digits: Mistral's templates take no other id


class Refused(Exception):
    """The chat template refuses a conversation, or writes it in a way that cannot be taken apart."""


@dataclass(frozen=True)
class Opening:
    """The text between a turn and the words of the answer after it: a header, then what depends on the answer's place.

    Qwen3 without thinking: `generation` is an empty think block, the others are empty. Mistral: `history` is a space.
    Qwen3.5 writes an empty think block before answers after the last question and none before earlier ones: `written`
    has both.
    """

    header: str = ""  # in every place
    generation: str = ""  # at the end of a prompt, where the model starts to generate
    prefilled: str = ""  # before an answer that the client has begun
    history: str = ""  # before an answer in the history
    history_call: str = ""  # the same where the answer is written as a tool call, up to its first argument
    written: tuple[str, ...] = ("",)  # all that the template writes before answers that it is given, longest first

    def with_name(self, name: str) -> Opening:
        """The same where the call that stands for an answer has this name."""
        named = self.history_call.replace(CALL_NAME, name)
        written = tuple(named if text == self.history_call else text for text in self.written)
        return replace(self, history_call=named, written=written)


@dataclass(frozen=True)
class Template:
    """How to write conversations for one chat template, with one form of head.

    The head is what comes before the first message: tools or none, a system text or none.
    """

    format: Format
    control_tokens: re.Pattern[str] | None = None  # finds the tokens that structure a prompt, in text from outside
    no_tools: list[dict[str, Any]] | None = None  # what a request without tools gives the template
    answer_as_tool_call: bool = False  # the answer before tool results must be a tool call
    after_call: str = ""  # what the template writes between the placeholder in that call and the end of the turn
    short_ids: bool = False  # ids of tool calls must be nine letters and digits
    systems: Literal["anywhere", "first", "never"] = "anywhere"  # where it takes system messages
    users_in_a_row: bool = True
    users_after_results: bool = True
    moves_tools_to_last_turn: bool = False  # writes tools or system text at the last question, not at the first
    tools_can_lead: bool = False  # the tools can be rendered before the system text: see `tools_first`
    reads_clock: bool = False  # its text changes with the time: nothing of it is kept
    openings: Mapping[tuple[str, bool], Opening] = field(default_factory=dict)  # by role of the turn before, thinking
    heads: Mapping[tuple[bool, bool], Template] = field(default_factory=dict)  # by form of head: tools, system text

    def for_head(self, tools: bool, system: bool) -> Template:
        """The same chat template for requests with this form of head."""
        return self.heads.get((tools, system), self)

    def opening(self, role: str, thinking: bool) -> Opening:
        """How answers begin after a turn of `role`."""
        return self.openings.get((role, thinking), Opening())


def apply(
    hf: Any,
    turns: Sequence[ChatMessage],
    tools: list[dict[str, Any]] | None = None,
    *,
    answer: bool = False,
    prefill: bool = False,
    thinking: bool = False,
) -> str:
    """The chat template's text, up to the start of an answer (`answer`) or inside the last turn (`prefill`).

    `hf` is the Hugging Face tokenizer:
    https://huggingface.co/docs/transformers/main/en/chat_templating. Raises Refused.
    """
    try:
        # Templates call the switch by either name.
        text = hf.apply_chat_template(
            list(turns),
            tools=tools,
            add_generation_prompt=answer,
            continue_final_message=prefill,
            enable_thinking=thinking,
            thinking=thinking,
            tokenize=False,
        )
    except Exception as error:  # whatever the template's expressions raise, as `1/0` and JSON that nests too deeply do
        raise Refused(str(error) or type(error).__name__) from error
    return str(text)


def answer_turn(text: str, as_tool_call: bool, call_id: str = CALL_ID, name: str = CALL_NAME) -> ChatMessage:
    """An answer that is only `text`: as its content, or as the argument of a tool call with that name."""
    if not as_tool_call:
        return {"role": "assistant", "content": text}
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": {"turn": text}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}
