"""Conversations in forms that templates refuse."""

import json

import pytest

from serve.api.messages import decode_count_tokens
from serve.prompt.render import render
from tests.helpers.model_families import FAMILIES, Family, tokenizer_of


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_result_before_the_first_answer_keeps_the_conversation_going(family: Family) -> None:
    orphan = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "lost"}]}
    begun = [{"role": "user", "content": "Go on"}, orphan, {"role": "user", "content": "Well?"}]
    answered = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Good."}]
    tokenizer = tokenizer_of(family)
    first, second = (
        render(decode_count_tokens(json.dumps({"model": "any", "messages": messages}).encode()), tokenizer)
        for messages in (begun, begun + answered)
    )
    assert len(second) > len(first)
    # The start of an answer may open thinking, which an answer that was not sampled here does not have.
    same = first == second[: len(first)]
    assert same.all() or (same[:-8].all() and family.name in ("qwen3", "deepseek-r1"))
