"""Requests to token ids: the conversation a template gets, and tokenisation by remembered segments."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from serve.messages import CountTokensRequest, InvalidRequest, decode_count_tokens
from serve.render import (
    Tokenizer,
    conversation,
    load_tokenizer,
    make_encoder,
    render,
    render_text,
    splits_at_added_tokens,
)

Json = dict[str, Any]
USER = {"role": "user", "content": "Q"}
TURN = "<|im_start|>user\nQ<|im_end|>\n"
ANSWER = "<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"


def request(*messages: Json, **fields: Any) -> CountTokensRequest:
    return decode_count_tokens(json.dumps({"model": "m", "messages": messages} | fields).encode())


def text(value: str, **more: Any) -> Json:
    return {"type": "text", "text": value} | more


class TestConversation:
    def test_the_system_text_comes_first(self) -> None:
        assert conversation(request(USER, system="S")) == [{"role": "system", "content": "S"}, USER]
        blocks = [text("A"), text("B")]
        assert conversation(request(USER, system=blocks)) == [{"role": "system", "content": "A\n\nB"}, USER]

    @pytest.mark.parametrize("system", [None, "", [], [text("")]])
    def test_an_empty_system_text_is_no_turn(self, system: Any) -> None:
        assert conversation(request(USER, system=system)) == [USER]

    def test_a_system_message_stays_in_its_place(self) -> None:
        reminder = {"role": "system", "content": "Token usage: 1"}
        assert conversation(request(USER, reminder, USER)) == [USER, reminder, USER]

    def test_a_tool_call_keeps_its_input_and_its_id(self) -> None:
        arguments = {"z": [1, 2.5, None], "a": {"é": "<"}}
        use = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": arguments}
        (_, turn) = conversation(request(USER, {"role": "assistant", "content": [text("Look."), use]}))
        (call,) = turn["tool_calls"]
        assert turn["content"] == "Look."
        assert call == {"id": "toolu_1", "type": "function", "function": {"name": "Read", "arguments": arguments}}
        assert list(call["function"]["arguments"]) == ["z", "a"], "key order is the model's own"

    def test_tool_results_become_turns_of_the_tool_in_their_order(self) -> None:
        results = [
            {"type": "tool_result", "tool_use_id": "1", "content": "one"},
            {"type": "tool_result", "tool_use_id": "2", "content": [text("two"), text("lines")]},
            {"type": "tool_result", "tool_use_id": "3"},
            {"type": "tool_result", "tool_use_id": "4", "content": "no such file", "is_error": True},
        ]
        turns = conversation(request({"role": "user", "content": [*results, text("Go on.")]}))
        assert turns == [
            {"role": "tool", "tool_call_id": "1", "content": "one"},
            {"role": "tool", "tool_call_id": "2", "content": "two\n\nlines"},
            {"role": "tool", "tool_call_id": "3", "content": ""},
            {"role": "tool", "tool_call_id": "4", "content": "Error: no such file"},
            {"role": "user", "content": "Go on."},
        ]

    def test_text_between_tool_results_stays_between_them(self) -> None:
        result = {"type": "tool_result", "tool_use_id": "1", "content": "r"}
        turns = conversation(request({"role": "user", "content": [text("a"), result, text("b"), result]}))
        assert [(t["role"], t["content"]) for t in turns] == [
            ("user", "a"),
            ("tool", "r"),
            ("user", "b"),
            ("tool", "r"),
        ]

    def test_thinking_is_kept_apart_and_its_signature_left_out(self) -> None:
        thought = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
        secret = {"type": "redacted_thinking", "data": "abc"}
        content = [thought, secret, text("Yes.")]
        (_, turn, _) = conversation(request(USER, {"role": "assistant", "content": content}, USER))
        assert turn == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}

    def test_documents_and_tool_references_are_text(self) -> None:
        document = {"type": "document", "source": {"type": "text", "data": "D"}, "title": "T", "context": "C"}
        reference = {"type": "tool_reference", "tool_name": "Grep"}
        result = {"type": "tool_result", "tool_use_id": "1", "content": [reference]}
        tool, user = conversation(request({"role": "user", "content": [result, document]}))
        assert (tool["content"], user["content"]) == ("Grep", "T\nC\nD")


class TestPrompt:
    def test_a_question_is_followed_by_the_start_of_the_answer(self, tokenizer: Tokenizer) -> None:
        assert render_text(request(USER), tokenizer) == TURN + ANSWER + NO_THOUGHT
        assert render_text(request(USER, thinking={"type": "adaptive"}), tokenizer) == TURN + ANSWER
        off = request(USER, thinking={"type": "disabled"})
        assert render_text(off, tokenizer) == TURN + ANSWER + NO_THOUGHT

    @pytest.mark.parametrize(
        "begun", ["{", "<", "im", "im_end", "|", "a ", "\n", " ", "", "Q", "assistant", "two\nlines\n"]
    )
    def test_an_assistants_last_turn_is_left_open_at_its_end(self, begun: str, tokenizer: Tokenizer) -> None:
        prefilled = request(USER, {"role": "assistant", "content": begun})
        assert render_text(prefilled, tokenizer) == TURN + ANSWER + begun
        blocks = request(USER, {"role": "assistant", "content": [text(begun)]})
        assert render_text(blocks, tokenizer) == TURN + ANSWER + begun

    def test_a_tool_call_at_the_end_is_closed(self, tokenizer: Tokenizer) -> None:
        use = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
        prompt = render_text(request(USER, {"role": "assistant", "content": [use]}), tokenizer)
        assert prompt.endswith("</tool_call><|im_end|>\n" + ANSWER + NO_THOUGHT)

    def test_tools_are_named_with_their_schema(self, tokenizer: Tokenizer) -> None:
        schema = {"type": "object", "properties": {"path": {"type": "string"}}}
        tools = [
            {"name": "Read", "description": "Reads.", "input_schema": schema},
            {"name": "Bare", "input_schema": {}},
        ]
        prompt = render_text(request(USER, tools=tools), tokenizer)
        function = {"name": "Read", "description": "Reads.", "parameters": schema}
        assert json.dumps({"type": "function", "function": function}) in prompt
        assert '"name": "Bare", "description": "", "parameters": {}' in prompt
        assert render_text(request(USER, tools=[]), tokenizer) == render_text(request(USER), tokenizer)

    def test_a_string_and_its_list_of_one_block_are_the_same_tokens(self, tokenizer: Tokenizer) -> None:
        strings = request({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, USER, system="S")
        blocks = request(
            {"role": "user", "content": [text("Q")]},
            {"role": "assistant", "content": [text("A")]},
            {"role": "user", "content": [text("Q", cache_control={"type": "ephemeral"})]},
            system=[text("S", cache_control={"type": "ephemeral", "ttl": "1h"})],
        )
        assert np.array_equal(render(strings, tokenizer), render(blocks, tokenizer))

    def test_a_cache_marker_that_moves_changes_nothing(self, tokenizer: Tokenizer) -> None:
        mark = {"cache_control": {"type": "ephemeral"}}
        contents = ["one", "two", "three"]
        variants = [
            request(
                *(
                    {"role": "user", "content": [text(c, **(mark if i == marked else {}))]}
                    for i, c in enumerate(contents)
                )
            )
            for marked in (-1, 0, 1, 2)
        ]
        ids = [render(variant, tokenizer).tolist() for variant in variants]
        assert ids == ids[:1] * 4

    def test_a_longer_conversation_extends_the_shorter_one(self, tokenizer: Tokenizer) -> None:
        thinking = {"type": "adaptive"}
        first = render(request(USER, thinking=thinking), tokenizer)
        answer = {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, text("A")]}
        second = render(request(USER, answer, USER, thinking=thinking), tokenizer)
        assert np.array_equal(second[: len(first)], first)

    @pytest.mark.parametrize(
        "template",
        ["{{ raise_exception('roles must alternate') }}", "{{ messages[9].role }}", "{{ 1 + 'x' }}", "{{ none.x.y }}"],
    )
    def test_a_template_that_refuses_is_the_requests_fault(self, template: str, model_folder: Any) -> None:
        own = load_tokenizer(str(model_folder))
        own.hf.chat_template = template
        with pytest.raises(InvalidRequest, match="messages: the model's chat template refuses this conversation"):
            render(request(USER), own)

    def test_a_schema_that_nests_too_deeply_for_the_template_is_refused(self, tokenizer: Tokenizer) -> None:
        schema: Json = {}
        for _ in range(50_000):
            schema = {"a": schema}
        whole = request(USER, tools=[{"name": "f", "input_schema": {}}])
        tools = tuple(type(tool)(tool.name, schema) for tool in whole.tools or ())
        deep = CountTokensRequest(model="m", messages=whole.messages, tools=tools)
        with pytest.raises(InvalidRequest, match="refuses"):
            render(deep, tokenizer)


def byte_level(**added: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges, special tokens and marks of which one begins like another."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "a"), ("Ġa", "b"), ("<", "|"), ("Ċ", "Ċ"), (">", "Ċ")]
    words = [*alphabet, *(left + right for left, right in merges)]
    backend = Backend(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True, **{"normalized": False} | added) for t in ("<|a|>", "<|end|>")]
    )
    backend.add_tokens([AddedToken(t, **{"normalized": False} | added) for t in ("<x>", "<x><y>", "ab>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def metaspace() -> PreTrainedTokenizerFast:
    """A SentencePiece-style tokenizer: the blank before a word belongs to it, the first word gets one."""
    letters = ["<unk>", "▁", *"abcdefgh<|>x"]
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken("<|a|>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@cache
def cached_byte_level() -> PreTrainedTokenizerFast:
    return byte_level()


PIECES = st.lists(
    st.sampled_from(
        ["<|a|>", "<|end|>", "<x>", "<x><y>", "<y>", "ab>", "<|", "|>", " ", "\n", "ab", "a", "b", "é🙂", "x"]
    )
    | st.text(max_size=8),
    max_size=30,
).map("".join)


def whole(hf: PreTrainedTokenizerFast, value: str) -> list[int]:
    """Ids of a text tokenised in one go."""
    return hf.backend_tokenizer.encode(value, add_special_tokens=False).ids


class TestSegments:
    @given(value=PIECES)
    def test_segments_give_the_tokens_of_the_whole_text(self, value: str) -> None:
        hf = cached_byte_level()
        assert splits_at_added_tokens(hf)
        encode = make_encoder(hf)
        assert encode(value).tolist() == whole(hf, value)
        assert encode(value).tolist() == whole(hf, value), "once more, from memory"

    @settings(max_examples=50)
    @given(
        value=st.lists(
            st.sampled_from(["<|im_start|>", "<|im_end|>", "<think>", "</tool_call>", "\n"]) | st.text(max_size=9)
        ).map("".join)
    )
    def test_segments_of_the_demo_tokenizer_give_the_tokens_of_the_whole_text(
        self, value: str, tokenizer: Tokenizer
    ) -> None:
        assert splits_at_added_tokens(tokenizer.hf)
        ids = tokenizer.encode(value)
        assert ids.dtype == np.int32
        assert ids.tolist() == whole(tokenizer.hf, value)

    def test_a_segment_is_tokenised_once(self) -> None:
        hf, seen = byte_level(), []

        class Watched:
            """The backend, with a record of what it was asked for."""

            def encode(self, value: str, add_special_tokens: bool) -> Any:
                seen.append(value)
                return hf.backend_tokenizer.encode(value, add_special_tokens=add_special_tokens)

            def to_str(self) -> str:
                return hf.backend_tokenizer.to_str()

        class Outer:
            """A tokenizer around the watched backend."""

            backend_tokenizer = Watched()
            added_tokens_decoder = hf.added_tokens_decoder

        encode = make_encoder(Outer())
        encode("first<|end|>second<|end|>")
        encode("first<|end|>second<|end|>third")
        assert seen == ["first", "second", "third"]

    def test_a_sentencepiece_tokenizer_is_given_the_whole_text(self) -> None:
        hf = metaspace()
        assert not splits_at_added_tokens(hf)
        value = "ab cd<|a|>ef gh"
        assert make_encoder(hf)(value).tolist() == whole(hf, value)
        # By segments the second piece would get a blank of its own: this is why.
        assert whole(hf, "ab cd") + whole(hf, "<|a|>") + whole(hf, "ef gh") != whole(hf, value)

    @pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
    def test_a_tokenizer_whose_added_tokens_see_their_neighbours_is_given_the_whole_text(self, flag: str) -> None:
        hf = byte_level(**{flag: True})
        assert not splits_at_added_tokens(hf)
        value = "ab  <x>  ab<|end|>ab>x <x>"
        assert make_encoder(hf)(value).tolist() == whole(hf, value)

    def test_a_tokenizer_without_added_tokens_is_given_the_whole_text(self) -> None:
        backend = Backend(models.BPE({"a": 0, "b": 1}, []))
        hf = PreTrainedTokenizerFast(tokenizer_object=backend)
        assert make_encoder(hf)("abba").tolist() == [0, 1, 1, 0]

    def test_an_empty_text_is_no_token(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.encode("").shape == (0,)


class TestLoading:
    def test_a_checkpoint_without_a_chat_template_is_refused(self, model_folder: Any, tmp_path: Any) -> None:
        for name in ("tokenizer.json", "config.json"):
            (tmp_path / name).write_bytes((model_folder / name).read_bytes())
        settings = json.loads((model_folder / "tokenizer_config.json").read_text())
        del settings["chat_template"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match="no chat_template"):
            load_tokenizer(str(tmp_path))

    def test_encode_can_be_replaced(self, tokenizer: Tokenizer) -> None:
        fixed = replace(tokenizer, encode=lambda value: np.asarray([len(value)], np.int32))
        assert render(request(USER), fixed).tolist() == [len(render_text(request(USER), tokenizer))]
