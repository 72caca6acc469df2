"""Whether conversations replay with a chat template: small ones are rendered as requests would be, once at start-up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from serve.api.messages import (
    CountTokensRequest,
    InputMessage,
    InvalidRequest,
    TextBlock,
    Thinking,
    ToolResultBlock,
    ToolUseBlock,
)
from serve.api.tools import Tool
from serve.formats.families import BY_NAME
from serve.prompt.plan import plan_chat
from serve.prompt.probe import template_sources
from serve.prompt.render import around_answers, prompt
from serve.prompt.replay import RecordedAnswer
from serve.prompt.template import Refused, apply
from serve.prompt.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"path": {"type": "string", "description": "The file."}},
    "required": ["path"],
}
TOOL = Tool("Zq7Read", SCHEMA, "Reads a file.")
TIME_OF_DAY = re.compile(r"strftime_now\([^)]*%-?[HIMSpXcsfTR]")

RECOMPUTED = "earlier answers are computed again with every request"
REFUSED = "conversations are refused"
QUESTION = InputMessage("user", "Q")
SAYS = InputMessage("assistant", (TextBlock("A"),))
CALLS = InputMessage("assistant", (ToolUseBlock("toolu_01Ab23456", TOOL.name, {"path": "P"}),))
RESULT = InputMessage("user", (ToolResultBlock("toolu_01Ab23456", "R"),))
WORDS = (QUESTION, SAYS) * 5 + (QUESTION,)
LOOP = (QUESTION, SAYS, QUESTION, CALLS, RESULT, CALLS, RESULT, SAYS, QUESTION, CALLS, RESULT)


def check_template(tokenizer: Tokenizer) -> list[str]:
    """What does not work with a tokenizer's chat template and what follows from it, a line each; empty if all works."""
    heads = list(product((True, False), (True, False)))  # with tools, with a system text
    problems = {head: head_problems(tokenizer, *head) for head in heads}
    lines = []
    for result in dict.fromkeys(result for head in heads for result in problems[head]):
        which = [head for head in heads if result in problems[head]]
        lines.append(f"{requests_with(which)}: {result} ({problems[which[0]][result]})")
    return [*unread_calls(tokenizer), *time_of_day(tokenizer), *lines]


def requests_with(heads: Sequence[tuple[bool, bool]]) -> str:
    """The requests that have one of these forms of head, in words."""
    words = []
    for name, values in zip(("tools", "a system text"), map(set, zip(*heads, strict=True)), strict=True):
        words += [] if len(values) == 2 else [f"{'with' if values.pop() else 'without'} {name}"]
    return " ".join(["requests", " and ".join(words)]) if words else "all requests"


def head_problems(tokenizer: Tokenizer, tools: bool, system: bool) -> dict[str, str]:
    """What follows for requests with one form of head, and the first cause of each."""
    calls = tools and tokenizer.template.format.call is not None
    session, found = LOOP if calls else WORDS, dict[str, str]()
    for thinking in (False, True):
        for result, cause in replay_problems(tokenizer, session, tools, system, thinking):
            found.setdefault(result, cause)
    return found


def replay_problems(
    tokenizer: Tokenizer, messages: Sequence[InputMessage], tools: bool, system: bool, thinking: bool
) -> Iterator[tuple[str, str]]:
    """What is wrong with the requests of a session, each of which ends in a message of the user, and why."""
    samples: list[RecordedAnswer] = []
    before = np.zeros(0, np.int32)
    for end in range(1, len(messages) + 1, 2):
        request = CountTokensRequest(
            model="check",
            messages=tuple(messages[:end]),
            system="S" if system else None,
            tools=(TOOL,) if tools else None,
            thinking=Thinking("adaptive") if thinking else None,
        )
        try:
            made = around_answers(plan_chat(request, tokenizer.template), tokenizer, samples)
        except Refused as error:
            yield (RECOMPUTED if is_rendered(request, tokenizer) else REFUSED), f"{error!s:.200}"
            return
        if not np.array_equal(made.tokens[: len(before)], before):
            yield RECOMPUTED, "the template changes the text before them"
            return
        ids = tokenizer.encode("A")
        samples.append(RecordedAnswer(made.opening or "", ids))
        before = np.concatenate([made.tokens, ids])


def is_rendered(request: CountTokensRequest, tokenizer: Tokenizer) -> bool:
    """Whether the template writes the whole conversation by itself."""
    try:
        prompt(request, tokenizer, render_history_with_template=True)
    except InvalidRequest:
        return False
    return True


def unread_calls(tokenizer: Tokenizer) -> Iterator[str]:
    """A line if the template offers tools and no format reads the calls."""
    template = tokenizer.template
    if template.format.call is not None:
        return
    function = {"name": TOOL.name, "description": TOOL.description, "parameters": SCHEMA}
    try:
        leading = [{"role": "system", "content": "S"}] if template.systems != "never" else []
        text = apply(
            tokenizer.hf, [*leading, {"role": "user", "content": "Q"}], [{"type": "function", "function": function}]
        )
    except Refused:
        return
    if TOOL.name in text:
        names = ", ".join(name for name, format in BY_NAME.items() if format.call)
        yield (
            f"no known format reads its tool calls (format {template.format.name!r}), so tool calls of this model "
            f"arrive as text: --tool-parser NAME chooses a format ({names})"
        )


def time_of_day(tokenizer: Tokenizer) -> Iterator[str]:
    """A line if the template writes the time, not only the date."""
    if any(TIME_OF_DAY.search(source) for source in template_sources(tokenizer.hf)):
        yield "it writes the time of day into the prompt: what comes after it is computed again with every request"
