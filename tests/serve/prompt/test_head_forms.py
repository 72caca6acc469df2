"""Templates whose way to write a conversation depends on its head and on what follows an answer.

Each template here has the shape of a published one, reduced to what made answers be computed again.
"""

from __future__ import annotations

import copy
import json
import random
import re
from functools import cache

import numpy as np
import pytest

from serve.api.messages import TextBlock, ToolUseBlock, decode_count_tokens
from serve.prompt.conversation import answers
from serve.prompt.render import prompt, render_text
from serve.prompt.replay import RecordedAnswer
from serve.prompt.tokenizer import Tokenizer, make_tokenizer
from tests.helpers.conversations import (
    OPENING,
    Json,
    answer_of,
    back,
    body_of,
    generated,
    is_extension,
    message,
    next_messages,
    text,
)
from tests.helpers.model_families import FAMILIES, tokenizer_of

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = '{# <tool_call> {"arguments" #}'  # what the choice of a format looks for
# Lists its tools without asking whether there are any, and wraps results only where there are.
NEEDS_TOOLS = (
    CALLS
    + "<|im_start|>system\n{% for tool in tools %}{{ tool.function | tojson }}\n{% endfor %}<|im_end|>\n"
    + "{% for m in messages %}{% if m.role == 'tool' %}"
    + "{% if loop.previtem.role != 'tool' %}<|im_start|>tool\n{% endif %}"
    + "<tool_response>{{ m.content }}</tool_response>"
    + "{% if loop.nextitem is not defined or loop.nextitem.role != 'tool' %}<|im_end|>{% endif %}"
    + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    + PROMPT
)
# Looks at the turn after a result in a list that still has the system text, in a loop that has not.
LOSES_AN_END = (
    CALLS
    + "{% set start = 1 if messages[0].role == 'system' else 0 %}"
    + "{% if start or tools %}<|im_start|>system\n{% if start %}{{ messages[0].content }}{% endif %}"
    + "{% if tools %}{{ tools | tojson }}{% endif %}<|im_end|>\n{% endif %}"
    + "{% for m in messages[start:] %}{% if m.role == 'system' %}{{ raise_exception('Only the first.') }}{% endif %}"
    + "<|im_start|>{{ m.role }}\n{{ m.content }}"
    + "{% if m.role != 'tool' or loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    + "{% endfor %}"
    + PROMPT
)
# An empty think block before answers after the last question, none before earlier ones.
TWO_FORMS = (
    CALLS
    + "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    + "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    + "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    + "{{ m.content }}<|im_end|>\n{% endfor %}"
    + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    + "{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}"
)
# Closes thinking before answers where the prompt opens it: neither stands in every place.
OPENED_OR_CLOSED = (
    CALLS
    + "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    + "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    + "{% if enable_thinking and loop.index0 > ns.last %}<think>{% endif %}</think>{% endif %}"
    + "{{ m.content }}<|im_end|>\n{% endfor %}"
    + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    + "{{ '<think>' if enable_thinking else '</think>' }}{% endif %}"
)
# Breaks off the line of its prompt, and counts its tools without asking whether there are any.
OTHER_LINE = (
    CALLS
    + "{% if tools | length %}{{ tools | tojson }}{% endif %}"
    + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# A system text of its own, but only before a prompt or tools, and never with the request's.
OWN_SYSTEM = (
    CALLS
    + "{% if messages[0].role != 'system' and (add_generation_prompt or tools) %}<|im_start|>system\nYou help."
    + "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}"
    + "{{ ' to=user' if m.role == 'assistant' }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
SHAPES = {
    "needs tools": NEEDS_TOOLS,
    "loses an end": LOSES_AN_END,
    "two forms": TWO_FORMS,
    "opened or closed": OPENED_OR_CLOSED,
    "other line": OTHER_LINE,
    "own system": OWN_SYSTEM,
}
QWEN3 = next(family for family in FAMILIES if family.name == "qwen3")


@cache
def tokenizer_with(template: str, **named: str) -> Tokenizer:
    """Qwen3's tokens with another template, or with several that have names."""
    hf = copy.deepcopy(tokenizer_of(QWEN3).hf)
    hf.chat_template = {"default": template, **named} if named else template
    return make_tokenizer(hf)


def body(messages: list[Json], turn: int, tools: bool, system: bool, thinking: bool) -> Json:
    left_out = [name for name, kept in (("tools", tools), ("system", system)) if not kept]
    return {key: value for key, value in body_of(messages, thinking, turn).items() if key not in left_out}


def breaks(tokenizer: Tokenizer, tools: bool, system: bool, thinking: bool) -> list[int]:
    """The turns of a session whose prompt does not extend the prompt before it and what was sampled for it."""
    rng, broken = random.Random("head"), []
    messages: list[Json] = OPENING if system else OPENING[:1]
    samples: list[RecordedAnswer | None] = []
    before = np.zeros(0, np.int32)
    for turn in range(10):
        request = decode_count_tokens(json.dumps(body(messages, turn, tools, system, thinking)).encode())
        made = prompt(request, tokenizer, samples[: len(answers(request.messages))])
        broken += [] if is_extension(made.tokens, before) else [turn]
        said = answer_of(turn, rng, thinking)
        answer = said if tools else tuple(b for b in said if not isinstance(b, ToolUseBlock)) or (TextBlock("Yes."),)
        ids = generated(answer, made.thinking, tokenizer)
        samples.append(None if made.opening is None else RecordedAnswer(made.opening, ids))
        before = np.concatenate([made.tokens, ids])
        messages = [*messages, message("assistant", *back(answer)), *next_messages(turn, answer)]
    return broken


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_prompt_extends_the_one_before(shape: str, tools: bool, system: bool, thinking: bool) -> None:
    assert breaks(tokenizer_with(SHAPES[shape]), tools, system, thinking) == []


def test_a_template_that_lists_tools_unasked_is_given_none_as_an_empty_list() -> None:
    asked = decode_count_tokens(json.dumps(body(OPENING[:1], 0, False, True, False)).encode())
    assert "Fix the bug." in render_text(asked, tokenizer_with(NEEDS_TOOLS))
    assert tokenizer_with(TURNS + PROMPT).template.no_tools is None


def test_of_two_templates_each_is_probed_with_the_requests_that_it_gets() -> None:
    two = tokenizer_with(CALLS + TURNS + PROMPT, tool_use=NEEDS_TOOLS)
    for tools in (False, True):
        assert breaks(two, tools, system=True, thinking=False) == []
    with_tools, without = (two.template.for_head(tools, True) for tools in (True, False))
    assert with_tools.opening("tool", False) != without.opening("tool", False) or with_tools.no_tools is None


def test_a_prompt_that_ends_inside_thinking_is_known_as_such_where_history_closes_it() -> None:
    tokenizer = tokenizer_with(OPENED_OR_CLOSED)
    for thinking in (False, True):
        for messages in (OPENING, [*OPENING, message("assistant", text("A")), message("user", text("Q"))]):
            asked = decode_count_tokens(json.dumps(body(messages, 0, True, True, thinking)).encode())
            assert prompt(asked, tokenizer).thinking == thinking


def test_thinking_that_is_written_again_is_opened_once() -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    messages = [*OPENING, message("assistant", thought, text("A")), message("user", text("Q"))]
    asked = decode_count_tokens(json.dumps(body(messages, 0, True, True, True)).encode())
    written = render_text(asked, tokenizer_with(OPENED_OR_CLOSED))
    assert re.search(r"assistant\n<think>\n?Hm\.\n</think>\n\nA<\|im_end\|>", written)


def test_a_request_pays_for_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with(TWO_FORMS)
    applied, apply = [], tokenizer.hf.apply_chat_template

    def counted(*args: object, **fields: object) -> object:
        applied.append(1)
        return apply(*args, **fields)

    monkeypatch.setattr(tokenizer.hf, "apply_chat_template", counted)
    for tools in (False, True):
        asked = decode_count_tokens(json.dumps(body(OPENING, 0, tools, True, False)).encode())
        prompt(asked, tokenizer)
    assert len(applied) == 2
