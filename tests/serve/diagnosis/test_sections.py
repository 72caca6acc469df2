"""Sections: every token of a prompt belongs to the part of the request that it was written for, in every family."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from experiments.workloads import sessions
from experiments.workloads.sessions import Session
from serve.api.messages import CountTokensRequest, decode_count_tokens
from serve.diagnosis.sections import CHARACTERS, MISSES, Sections, find_sections, sentencepiece_bytes, vocabulary_of
from serve.prompt.render import Prompt, prompt
from serve.prompt.replay import RecordedAnswer
from serve.prompt.tokenizer import Tokenizer
from tests.helpers.conversations import OPENING, answer_of, back, generated, next_messages, sent
from tests.helpers.model_families import FAMILIES, Family, tokenizer_of

Json = dict[str, Any]


def sections_of(request: CountTokensRequest, made: Prompt, tokenizer: Tokenizer) -> Sections:
    return Sections(request, made.segments, made.counts, made.tokens, vocabulary_of(tokenizer.hf))


def texts_of(sections: Sections) -> dict[str, str]:
    """The text of each section, sections of one name joined."""
    texts: dict[str, str] = {}
    for name, start, stop in sections.ranges():
        texts[name] = texts.get(name, "") + sections.vocabulary.text(sections.tokens[start:stop])
    return texts


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_parts_of_a_conversation_are_found_in_every_family(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    messages, recalled = list(OPENING), []
    rng = random.Random(7)
    for turn in range(1, 7):
        request = sent(messages, family.thinks, turn)
        made = prompt(request, tokenizer, recalled)
        answer = answer_of(turn, rng, family.thinks)
        opened = made.thinking
        if tokenizer.template.format.call is None:
            answer = tuple(block for block in answer if block.__struct_config__.tag != "tool_use")
        recalled.append(RecordedAnswer(made.opening or "", generated(answer, opened, tokenizer)) if turn % 2 else None)
        messages += [{"role": "assistant", "content": back(answer)}, *next_messages(turn, answer)]
    sections = sections_of(request, made, tokenizer)
    texts = texts_of(sections)
    ranges = sections.ranges()
    assert ranges[0][1] == 0
    assert ranges[-1][2] == len(made.tokens)
    assert all(before[2] == after[1] for before, after in pairwise(ranges))
    assert "You are an agent." in texts["system[0]"]
    assert "Work in /tmp." in texts["system[1]"]
    assert "Fix the bug." in texts["messages[0] user"]
    assert "# Environment" in texts["messages[1] system"]
    for i, message in enumerate(request.messages[2:], 2):
        for block in message.content if not isinstance(message.content, str) else ():
            tag = block.__struct_config__.tag
            if tag == "tool_result":
                assert f"line {block.content[5]}" in texts[f"messages[{i}] tool_result"]
            elif tag == "text":
                assert block.text in texts[f"messages[{i}] {message.role}"]
            elif tag == "tool_use" and tokenizer.template.format.call:
                assert block.name in texts[f"messages[{i}] tool_use"]
    if "Edits a file." in sections.vocabulary.text(made.tokens):
        assert "Reads a file." in texts["tools[0] Read"]
        assert "Edits a file." in texts["tools[1] Edit"]


def test_each_token_starts_where_its_text_does(tokenizer: Tokenizer) -> None:
    body = sessions.request(Session(scale=0.05), turn=3)
    request = decode_count_tokens(json.dumps(body).encode())
    made = prompt(request, tokenizer)
    sections = sections_of(request, made, tokenizer)
    whole = "".join(p for p in made.segments if isinstance(p, str)).encode()
    for position in random.Random(1).sample(range(len(made.tokens)), 200):
        start = int(sections.starts[position])
        word = sections.vocabulary.data(made.tokens[position : position + 1])
        assert whole[start : start + len(word)] == word
        assert [name for name, low, high in sections.ranges() if low <= position < high] == [sections.at(position)]


def test_characters_are_tokens_where_no_tokenizer_is_known() -> None:
    request = CountTokensRequest(model="m", system="Grüße, 世界 🙂", messages=decoded_user("Hallo"))
    text = f"{request.system}\n\nHallo"
    tokens = np.asarray([ord(c) for c in text], np.int32)
    sections = Sections(request, (text,), (len(tokens),), tokens, CHARACTERS)
    assert sections.ranges() == [
        ("system", 0, text.index("Hallo")),
        ("messages[0] user", text.index("Hallo"), len(text)),
    ]
    assert CHARACTERS.text(tokens) == text
    assert sections.starts[-1] == len(text.encode()) - 1


def decoded_user(text: str) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    return decode_count_tokens(json.dumps(body).encode()).messages


def test_ids_that_the_tokenizer_does_not_know_are_no_text(tokenizer: Tokenizer) -> None:
    vocabulary = vocabulary_of(tokenizer.hf)
    assert vocabulary.text(np.asarray([10**6], np.int32)) == ""
    assert vocabulary.lengths(np.asarray([10**6], np.int32)).tolist() == [0]


def test_words_with_blanks_in_front_and_single_bytes_are_spelled_out() -> None:
    assert [sentencepiece_bytes(token) for token in ("▁the", "<0x0A>", "é")] == [b" the", b"\n", "é".encode()]


def test_parts_that_a_template_leaves_out_have_no_section() -> None:
    thinking = [{"type": "thinking", "thinking": f"Hidden thought {n}"} for n in range(MISSES - 1)]
    said = [{"role": "assistant", "content": [*thinking, {"type": "text", "text": "Shown."}]}]
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi there"}, *said]}
    request = decode_count_tokens(json.dumps(body).encode())
    assert find_sections(request, b"<user>Hi there<assistant>Shown.") == [
        (6, "messages[0] user"),
        (25, "messages[1] assistant"),
    ]


def test_it_does_not_look_forever_for_what_is_not_there() -> None:
    said = [{"role": "user", "content": f"Never rendered {n}"} for n in range(80_000)]
    # As many parts as a body may have, nearly.
    request = decode_count_tokens(json.dumps({"model": "m", "messages": said}).encode())
    assert find_sections(request, b"x" * 1_000_000) == []
