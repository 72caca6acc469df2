"""Requests to token ids: the conversation a template gets, and tokenisation by remembered segments."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

import serve.prompt.tokenizer as tokenizer_module
from cache.disk import DiskTier
from cache.host import HostTier
from serve.api.messages import CountTokensRequest, InputMessage, InvalidRequest, TextBlock, decode_count_tokens
from serve.limits.recent import Recent
from serve.prompt.adapt import into_results, join_users
from serve.prompt.conversation import conversation, joined, tool_definitions
from serve.prompt.probe import check_usable
from serve.prompt.render import encode_segments, prompt, render, render_text, say_once
from serve.prompt.replay import RecordedAnswer
from serve.prompt.tokenizer import (
    STORED_CHARS,
    Tokenizer,
    load_tokenizer,
    make_encoder,
    make_tokenizer,
    splits_at_added_tokens,
)
from serve.server.prepare import least_tokens
from tests.helpers.http import eventually
from tests.helpers.model_families import FAMILIES, Family, tokenizer_of
from tests.helpers.pdfs import pdf

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

    @pytest.mark.parametrize(
        "block",
        [
            {"type": "document", "source": {"type": "text", "data": "Zebras."}, "title": "Animals"},
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": pdf("Zebras.")}},
            {"type": "document", "source": {"type": "file", "file_id": "Zebras."}},
            {"type": "tool_result", "tool_use_id": "1", "content": [text("Zebras.")]},
            {"type": "tool_reference", "tool_name": "Zebras."},
            {"type": "search_result", "source": "a", "title": "b", "content": [text("Zebras.")]},
        ],
    )
    def test_an_answers_blocks_of_other_types_are_texts_on_lines_of_their_own(self, block: Any) -> None:
        (_, turn, _) = conversation(request(USER, {"role": "assistant", "content": [text("Look:"), block]}, USER))
        assert turn["content"].startswith("Look:\n")
        assert "Zebras." in turn["content"]

    def test_many_messages_of_one_role_are_joined_in_linear_time(self) -> None:
        messages = (InputMessage("assistant", "a"),) * 100_000
        users = [{"role": "user", "content": "u" * 20}] * 100_000
        before = time.process_time()
        assert joined((*messages, InputMessage("user", "b"), *messages[:1]))[0].content == (TextBlock("a"),) * 100_000
        assert join_users(users) == [{"role": "user", "content": "\n\n".join(["u" * 20] * 100_000)}]
        assert time.process_time() - before < 2, "copying what was joined so far with each takes much longer"

    def test_a_user_turn_after_results_and_a_system_text_stays(self) -> None:
        tool, system, user = [{"role": role, "content": role} for role in ("tool", "system", "user")]
        assert into_results([user, tool, user, system]) == [tool | {"content": "user\n\ntool\n\nuser"}, system]
        assert into_results([tool, system, user]) == [tool, system, user]

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
    """A byte-level tokenizer with merges, special tokens and added tokens of which one is the start of another."""
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
    """A SentencePiece-style tokenizer: the space before a word belongs to it, the first word gets one."""
    letters = ["<unk>", "▁", *"abcdefgh<|>x"]
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken("<|a|>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@cache
def cached_byte_level() -> PreTrainedTokenizerFast:
    return byte_level()


TEXTS = st.lists(
    st.sampled_from(
        ["<|a|>", "<|end|>", "<x>", "<x><y>", "<y>", "ab>", "<|", "|>", " ", "\n", "ab", "a", "b", "é🙂", "x"]
    )
    | st.text(max_size=8),
    max_size=30,
).map("".join)


def whole(hf: PreTrainedTokenizerFast, value: str) -> list[int]:
    """Ids of a text tokenised in one go."""
    return hf.backend_tokenizer.encode(value, add_special_tokens=False).ids


class TestLength:
    """What is out of all proportion is refused before anything holds the interpreter for it."""

    def test_a_text_of_too_many_tokens_is_refused_slice_by_slice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {
            "MOST_TOKENS": 100,
            "LONG_CHARS": 200,
            "COUNTED_CHARS": 50,
            "COUNTED_TOGETHER": 100,
        }.items():
            monkeypatch.setattr(tokenizer_module, name, value)
        encode = make_encoder(byte_level())
        assert len(encode("ab" * 50)) == 50
        with pytest.raises(tokenizer_module.TooManyTokens, match="about 3040 tokens, expected at most 100"):
            encode("a b " * 1000)

    @pytest.mark.parametrize("said", ["word " * 4000, "=" * 9000])
    def test_a_prompt_that_is_too_long_is_refused_with_both_numbers_before_all_of_it_is_tokenised(
        self, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer_module, "COUNTED_CHARS", 500)
        monkeypatch.setattr(tokenizer_module, "COUNTED_TOGETHER", 1000)
        for family in FAMILIES:
            tokenizer = tokenizer_of(family)
            for texts in ([said], [said[:800]] * 25):
                asked = request(*({"role": "user", "content": text} for text in texts))
                tokens = len(render(asked, tokenizer))
                with pytest.raises(InvalidRequest) as caught:
                    prompt(asked, tokenizer, most_tokens=tokens // 4)
                found = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", str(caught.value))
                assert found
                assert int(found[2]) == tokens // 4
                assert 0.8 * tokens < int(found[1]) < 1.25 * tokens, "an estimate"
                assert len(prompt(asked, tokenizer, most_tokens=tokens).tokens) == tokens

    def test_an_estimate_counts_a_text_that_is_tokenised_with_those_before_it_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer_module, "MOST_TOKENS", 200)
        tokenizer, said = tokenizer_of(FAMILIES[0]), "word = " * 50
        segments = ["a", said]
        tokens = sum(len(whole(tokenizer.hf, segment)) for segment in segments)
        assert tokens > 200
        with pytest.raises(tokenizer_module.TooManyTokens) as caught:
            encode_segments(segments, tokenizer, most_tokens=100)
        assert caught.value.tokens == tokens

    def test_texts_are_tokenised_together_up_to_a_number_of_characters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenizer_module, "LONG_CHARS", 5)
        seen, fast = list[list[str]](), tokenizer_module.encode_fast
        monkeypatch.setattr(tokenizer_module, "encode_fast", lambda hf, texts: seen.append(texts) or fast(hf, texts))
        hf, value = byte_level(), "ab<|end|>abc<|end|>b<|end|>ababab<|end|>a"
        assert make_encoder(hf)(value).tolist() == whole(hf, value)
        counted = [["ababab"]]  # first, as it is long
        assert seen == [["ab", "abc"], ["b"], *counted, ["ababab"], ["a"]]

    def test_no_prompt_has_fewer_tokens_than_its_texts_and_messages_ask_for(self) -> None:
        for family in FAMILIES:
            tokenizer = tokenizer_of(family)
            for said in ("Hi", "word " * 500, " " * 900, "é🙂" * 200, "=" * 700):
                messages = [{"role": ("user", "assistant")[n % 2], "content": said} for n in range(5)]
                asked = request(*messages, system=said)
                assert 5 <= least_tokens(asked, tokenizer.max_token_chars) <= len(render(asked, tokenizer))


class TestSegments:
    @given(value=TEXTS)
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

            def encode_batch_fast(self, values: list[str], add_special_tokens: bool) -> Any:
                seen.extend(values)
                return hf.backend_tokenizer.encode_batch_fast(values, add_special_tokens=add_special_tokens)

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

    def test_texts_that_follow_are_tokenised_together_and_remembered(self) -> None:
        hf, seen = byte_level(), list[list[str]]()

        class Watched:
            """A tokenizer that notes what it is given."""

            def encode_batch_fast(self, texts: list[str], **kwargs: bool) -> list[Any]:
                seen.append(texts)
                return hf.backend_tokenizer.encode_batch_fast(texts, **kwargs)

            def to_str(self) -> str:
                return hf.backend_tokenizer.to_str()

        class Outer:
            """A tokenizer around the watched backend."""

            backend_tokenizer = Watched()
            added_tokens_decoder = hf.added_tokens_decoder

        encode = make_encoder(Outer())
        assert encode("ab<|end|>", ["cd<|end|>ab", "ef"]).tolist() == whole(hf, "ab<|end|>")
        assert [encode(text).tolist() for text in ("cd<|end|>ab", "ef")] == [whole(hf, "cd<|end|>ab"), whole(hf, "ef")]
        assert seen == [["ab", "cd", "ef"]]

    def test_a_long_segment_is_found_in_the_store_by_the_next_process(self, tmp_path: Path) -> None:
        hf, long, tier = byte_level(), "ab é🙂" * STORED_CHARS, DiskTier(tmp_path, 10**7)
        ids = make_encoder(hf, tier)(f"{long}<|end|>short").tolist()
        assert ids == whole(hf, f"{long}<|end|>short")
        eventually(lambda: tier.stats().pages == 1, "the long segment is stored, the short one is not")
        tier.close()
        tier = DiskTier(tmp_path, 10**7)
        assert make_encoder(hf, tier)(f"{long}<|end|>short").tolist() == ids
        assert tier.stats().hits == 1
        tier.close()

    def test_another_tokenizer_does_not_find_the_segments_of_this_one(self) -> None:
        tier, long, other = HostTier(10**7), "the ab" * STORED_CHARS, tokenizer_of(FAMILIES[0]).hf
        make_encoder(byte_level(), tier)(long)
        eventually(lambda: tier.stats().pages == 1, "the segment is stored")
        assert make_encoder(other, tier)(long).tolist() == whole(other, long)
        assert tier.stats().hits == 0

    def test_a_sentencepiece_tokenizer_is_given_the_whole_text(self) -> None:
        hf = metaspace()
        assert not splits_at_added_tokens(hf)
        value = "ab cd<|a|>ef gh"
        assert make_encoder(hf)(value).tolist() == whole(hf, value)
        # The reason: by segments the second one would get a space of its own.
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

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("tokenizer.json", "{", r"tokenizer\.json is not JSON"),
            ("tokenizer.json", "{}", "its tokenizer cannot be read from tokenizer.json"),
            ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds a list"),
            ("tokenizer_config.json", "{", r"tokenizer_config\.json is not JSON"),
            ("chat_template.jinja", "{% if", "its chat_template fails: unexpected 'end of template'"),
            ("chat_template.jinja", "{{ 1/0 }}", "its chat_template fails: division by zero"),
            ("chat_template.jinja", "{{ cycler.__init__.__globals__ }}", "its chat_template fails: .* unsafe"),
            ("chat_template.jinja", "x", "its chat_template makes 'x' of a conversation"),
        ],
    )
    def test_a_broken_file_is_named_with_what_was_expected(
        self, file: str, content: str, message: str, model_folder: Any, tmp_path: Any
    ) -> None:
        for name in ("tokenizer.json", "config.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((model_folder / name).read_bytes())
        (tmp_path / file).write_text(content)
        with pytest.raises(ValueError, match=message) as refused:
            load_tokenizer(str(tmp_path))
        assert str(tmp_path) in str(refused.value)

    def test_a_template_without_end_is_refused_after_a_while(
        self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("serve.prompt.probe.MOST_SECONDS", 0.1)
        end = Event()
        monkeypatch.setattr("serve.prompt.probe.apply", lambda *_, **__: end.wait(10) and "")
        with pytest.raises(ValueError, match=r"its chat_template takes more than 0\.1 s"):
            check_usable(tokenizer.hf, "folder")
        end.set()

    def test_encode_can_be_replaced(self, tokenizer: Tokenizer) -> None:
        fixed = replace(tokenizer, encode=lambda value, following=(): np.asarray([len(value)], np.int32))
        assert render(request(USER), fixed).tolist() == [len(render_text(request(USER), tokenizer))]


TOOLS = [{"name": "Read", "description": "Reads.", "input_schema": {"type": "object", "properties": {}}}]
RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_01Ab23456", "content": "one\ntwo"}]}
CALL = {"type": "tool_use", "id": "toolu_01Ab23456", "name": "Read", "input": {"path": "/é", "n": [1, 2.5, None]}}


def says(*content: Any) -> Json:
    return {"role": "assistant", "content": list(content)}


def think(value: str) -> Json:
    return {"type": "thinking", "thinking": value, "signature": ""}


def by_template(asked: CountTokensRequest, tokenizer: Tokenizer) -> str:
    """What the chat template itself makes of a request, its ids of calls shortened where the family wants that."""
    turns = conversation(asked)
    if tokenizer.template.short_ids:
        turns = json.loads(json.dumps(turns).replace("toolu_01Ab23456", "01Ab23456"))
    return tokenizer.hf.apply_chat_template(
        turns,
        tools=tool_definitions(asked),
        add_generation_prompt=True,
        enable_thinking=asked.thinking is not None,
        tokenize=False,
    )


def family(name: str) -> Tokenizer:
    return tokenizer_of(next(f for f in FAMILIES if f.name == name))


# Conversations whose rendering differs from the template's on purpose: the part that differs, theirs and ours.
DIFFERENCES = {
    "thinking of earlier turns is kept": (
        "qwen3",
        request(USER, says(think("Hm."), text("A")), USER),
        "assistant\nA<|im_end|>",
        "assistant\n<think>\nHm.\n</think>\n\nA<|im_end|>",
    ),
    "thinking of earlier turns is kept where the template looks for its end in the text": (
        "deepseek-r1",
        request(USER, says(think("Hm."), text("A")), USER),
        "<｜Assistant｜>A<",
        "<｜Assistant｜><think>\nHm.\n</think>\n\nA<",
    ),
    "an answer's outer whitespace is kept": (
        "llama3.1",
        request(USER, says(text("A \n")), USER),
        "\n\nA<|eot_id|>",
        "\n\nA \n<|eot_id|>",
    ),
    "words next to a call are kept": (
        "mistral-v3",
        request(USER, says(text("Look."), CALL), RESULT),
        "[/INST][TOOL_CALLS] [{",
        "[/INST]Look.[TOOL_CALLS] [{",
    ),
    "words next to a call are kept, and the call has its delimiter": (
        "llama3.1",
        request(USER, says(text("Look."), CALL), RESULT),
        'assistant<|end_header_id|>\n\n{"name": "Read"',
        'assistant<|end_header_id|>\n\nLook.<|python_tag|>{"name": "Read"',
    ),
    "system text stays at the first question": (
        "mistral-v3",
        request(USER, says(text("A")), {"role": "user", "content": "Q2"}, system="S"),
        "<s>[INST] Q[/INST] A</s>[INST] S\n\nQ2[/INST]",
        "<s>[INST] S\n\nQ[/INST] A</s>[INST] Q2[/INST]",
    ),
    "a system message stays in its place": (
        "deepseek-r1",
        request(USER, {"role": "system", "content": "R"}, says(text("A")), USER, system="S"),
        "S\n\nR<｜User｜>Q<",
        "S<｜User｜>Q<｜User｜><system-reminder>\nR\n</system-reminder><",
    ),
}
# What a template refuses, and what stands in the prompt instead.
REFUSED = {
    "two calls in one turn": (
        "llama3.1",
        request(USER, says(CALL, CALL | {"id": "toolu_2"}), RESULT),
        '"n": [1, 2.5, null]}}; {"name": "Read"',
    ),
    "a system message": (
        "mistral-v3",
        request(USER, {"role": "system", "content": "R"}, says(text("A")), USER),
        "[INST] Q\n\n<system-reminder>\nR\n</system-reminder>[/INST] A</s>",
    ),
    "words of the user after a result": (
        "mistral-v3",
        request(USER, says(CALL), {"role": "user", "content": [*RESULT["content"], text("Go on.")]}),
        '{"content": "one\\ntwo\\n\\nGo on.", "call_id": "01Ab23456"}',
    ),
    "words of the user before a result": (
        "mistral-v3",
        request(USER, says(CALL), {"role": "user", "content": [text("Wait."), *RESULT["content"]]}),
        '{"content": "Wait.\\n\\none\\ntwo", "call_id": "01Ab23456"}',
    ),
    "two questions in a row": ("mistral-v3", request(USER, USER), "[INST] Q\n\nQ[/INST]"),
}


class TestFamilies:
    @pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
    @pytest.mark.parametrize("thinking", [False, True])
    def test_ordinary_conversations_are_the_templates_own(self, family: Family, thinking: bool) -> None:
        fields: Json = {"thinking": {"type": "adaptive"}} if thinking else {}
        tokenizer = tokenizer_of(family)
        conversations = [
            request(USER, **fields),
            request(USER, says(text("A\nB")), USER, **fields),
            request(USER, system="S", tools=TOOLS, **fields),
            request(USER, says(CALL), RESULT, tools=TOOLS, **fields),
            request(USER, says(CALL), RESULT, says(text("Done.")), USER, **fields),
        ]
        for asked in conversations:
            own = by_template(asked, tokenizer)
            assert render_text(asked, tokenizer) == own
            assert render(asked, tokenizer).tolist() == tokenizer.encode(own).tolist()

    @pytest.mark.parametrize("case", DIFFERENCES)
    def test_a_deliberate_difference(self, case: str) -> None:
        name, asked, theirs, ours = DIFFERENCES[case]
        own, rendered = by_template(asked, family(name)), render_text(asked, family(name))
        assert own.count(theirs) == rendered.count(ours) == 1
        assert rendered == own.replace(theirs, ours)
        history = prompt(asked, family(name), render_history_with_template=True)
        if "system" not in case:
            assert history.segments == (own,)

    @pytest.mark.parametrize("case", REFUSED)
    def test_what_a_template_refuses(self, case: str) -> None:
        name, asked, ours = REFUSED[case]
        with pytest.raises(Exception, match=r"one call|alternate|only user"):
            by_template(asked, family(name))
        assert ours in render_text(asked, family(name))

    @pytest.mark.parametrize(
        ("form", "written"),
        [
            ("{{ m.content | upper }}", "A"),  # the placeholder is lost
            ("{% if loop.index == 4 %}<think></think>{% endif %}{{ m.content }}", "<think></think>a"),
        ],
    )
    def test_a_template_that_cannot_be_taken_apart_renders_by_itself(
        self, form: str, written: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        say_once.cache_clear()
        loud = make_tokenizer(byte_level_with("{% for m in messages %}{{ m.role }}: " + form + "<|end|>{% endfor %}"))
        asked = request(USER, says(text("a")), USER, says(text("a")), USER)
        rendered = prompt(asked, loud, [RecordedAnswer("", np.asarray([1], np.int32))] * 2)
        assert rendered.segments == (by_template(asked, loud),)
        assert f"assistant: {written}<|end|>" in rendered.segments[0]
        assert "nothing sampled is replayed" in caplog.text

    def test_an_answer_that_the_template_continues_is_not_to_be_recorded(self, tokenizer: Tokenizer) -> None:
        begun = request(USER, says(text("Yes, ")))
        made = prompt(begun, tokenizer, render_history_with_template=True)
        assert (made.opening, len(made.prefilled_answer_ids)) == (None, 0)
        assert made.segments == (TURN + ANSWER + "Yes, ",)
        marked = prompt(begun, tokenizer)
        assert "".join(map(str, marked.segments)) == TURN + ANSWER + "Yes, "
        assert (marked.opening, marked.prefilled_answer_ids.tolist()) == ("", tokenizer.encode("Yes, ").tolist())

    def test_calls_that_no_format_can_write_are_left_to_the_template(self) -> None:
        loop = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls }}<|end|>{% endfor %}"
        asked = request(USER, says(CALL), RESULT)
        plain = make_tokenizer(byte_level_with(loop))
        assert render_text(asked, plain) == by_template(asked, plain)
        assert "'arguments': {'path': '/é'" in render_text(asked, plain)

    def test_what_the_templates_take(self) -> None:
        assert {f.name: facts(tokenizer_of(f)) for f in FAMILIES} == {
            "qwen2.5": ("hermes", "anywhere", set()),
            "qwen3": ("hermes", "anywhere", set()),
            "llama3.1": ("llama3", "anywhere", set()),
            "mistral-v3": ("mistral", "first", {"as_call", "short_ids", "moves", "alternates", "ends with results"}),
            "deepseek-r1": ("deepseek", "first", set()),
        }


def facts(tokenizer: Tokenizer) -> tuple[str, str, set[str]]:
    t = tokenizer.template
    flags = {
        "as_call": t.answer_as_tool_call,
        "short_ids": t.short_ids,
        "moves": t.moves_tools_to_last_turn,
        "alternates": not t.users_in_a_row,
        "ends with results": not t.users_after_results,
    }
    return t.format.name, t.systems, {name for name, on in flags.items() if on}


class TestRenderings:
    """How often the chat template is applied for a conversation of 30 turns."""

    @pytest.fixture
    def renderings(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
        """A function: the number of renderings for each of some requests, one after the other."""

        def count(tokenizer: Tokenizer, *requests: CountTokensRequest, **flags: bool) -> list[int]:
            applied, apply = [], tokenizer.hf.apply_chat_template

            def counted(*args: Any, **fields: Any) -> Any:
                applied.append(1)
                return apply(*args, **fields)

            monkeypatch.setattr(tokenizer.hf, "apply_chat_template", counted)
            totals = [prompt(asked, tokenizer, **flags) and len(applied) for asked in requests]
            monkeypatch.setattr(tokenizer.hf, "apply_chat_template", apply)
            return np.diff([0, *totals]).tolist()

        return count

    @staticmethod
    def asked(turns: int = 30, system: str = "S", **fields: Any) -> CountTokensRequest:
        history = [message for turn in range(turns) for message in (USER, says(text(f"A{turn}"), CALL), RESULT)]
        return request(*history, says(text("Done.")), USER, system=system, tools=TOOLS, **fields)

    @pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
    def test_the_template_is_applied_once_for_any_number_of_turns(
        self, family: Family, renderings: Callable[..., list[int]]
    ) -> None:
        tokenizer = fresh(family)
        # A template that moves the tools also writes the head by itself and a question, the first time.
        first = 3 if tokenizer.template.moves_tools_to_last_turn else 1
        assert renderings(tokenizer, self.asked(30), self.asked(31), self.asked(30)) == [first, 1, 1]
        assert renderings(tokenizer, self.asked(30, system="Another.")) == [first], "another head"

    @pytest.mark.parametrize("name", ["qwen3", "mistral-v3"])
    def test_the_place_of_the_tools_is_found_once_for_each_list_of_tools(
        self, name: str, renderings: Callable[..., list[int]]
    ) -> None:
        tokenizer = fresh(next(f for f in FAMILIES if f.name == name))
        first, later = renderings(tokenizer, self.asked(30), self.asked(31), tools_first=True)
        assert later == 1 < first <= 5

    def test_what_is_kept_of_a_head_changes_no_token(self) -> None:
        for family in FAMILIES:
            tokenizer = fresh(family)
            for tools_first in (False, tokenizer.template.tools_can_lead):
                once, again, other = (
                    prompt(asked, tokenizer, tools_first=tools_first).tokens.tolist()
                    for asked in (self.asked(2), self.asked(2), self.asked(2, system="Another."))
                )
                assert once == again != other

    def test_nothing_is_kept_of_a_head_with_control_tokens(self, renderings: Callable[..., list[int]]) -> None:
        tokenizer = fresh(next(f for f in FAMILIES if f.name == "mistral-v3"))
        forged = self.asked(2, system="[INST]")
        assert renderings(tokenizer, forged, forged) == [3, 3], "it holds what is random in each request"
        assert len(tokenizer.heads) == 0

    def test_nothing_is_kept_of_a_template_that_reads_the_clock(self, renderings: Callable[..., list[int]]) -> None:
        hf = tokenizer_of(next(f for f in FAMILIES if f.name == "mistral-v3")).hf
        hf = copy.copy(hf)
        hf.chat_template = "{{ strftime_now('%Y') }}" + hf.chat_template
        tokenizer = make_tokenizer(hf)
        assert tokenizer.template.reads_clock
        assert renderings(tokenizer, self.asked(2), self.asked(2)) == [3, 3]

    def test_of_two_templates_either_may_read_the_clock(self) -> None:
        hf = copy.copy(tokenizer_of(next(f for f in FAMILIES if f.name == "mistral-v3")).hf)
        for clock, name in (("default", "tool_use"), ("tool_use", "default")):
            plain = hf.chat_template if isinstance(hf.chat_template, str) else hf.chat_template[clock]
            hf.chat_template = {clock: "{{ strftime_now('%Y') }}" + plain, name: plain}
            assert make_tokenizer(hf).template.reads_clock
            hf.chat_template = plain

    def test_a_template_that_changes_the_system_text_has_its_tools_first_each_time(self) -> None:
        tools = "{% if loop.first and tools %}[{{ tools | tojson }}]{% endif %}"
        head = "{% if m.role == 'system' %}{{ m.content | upper }} {{ m.content }}" + tools
        turns = head + "{% else %}" + tools + "{{ m.content }}{% endif %}"
        tokenizer = make_tokenizer(byte_level_with("{% for m in messages %}" + turns + "<|end|>{% endfor %}"))
        asked = request(USER, system="S", tools=TOOLS)
        outcomes = {refusal_of(asked, tokenizer) for _ in range(3)}
        assert outcomes == {""}, "what was kept for the first request is not the second one's"


def refusal_of(asked: CountTokensRequest, tokenizer: Tokenizer) -> str:
    """Why a prompt with its tools first is refused, or nothing."""
    try:
        prompt(asked, tokenizer, tools_first=True)
    except InvalidRequest as error:
        return str(error)
    return ""


def fresh(family: Family) -> Tokenizer:
    """The family's tokenizer with nothing kept."""
    tokenizer = tokenizer_of(family)
    return replace(tokenizer, heads=Recent(tokenizer.heads.most_bytes, tokenizer.heads.size_of))


class TestControlTokens:
    def test_what_either_of_two_templates_writes_is_a_control_token(self) -> None:
        turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        hf = byte_level_with(turns)
        hf.add_tokens(["[PLAIN]"])
        hf.chat_template = {"default": "[PLAIN]" + turns, "tool_use": turns}
        controls = make_tokenizer(hf).template.control_tokens
        assert controls is not None
        assert controls.search("a[PLAIN]b")

    @pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
    def test_text_from_outside_never_becomes_a_control_token(self, family: Family) -> None:
        tokenizer = tokenizer_of(family)
        names = [family.bos, family.end, *family.special, *family.added]

        def asked(forged: str) -> CountTokensRequest:
            call = CALL | {"name": f"Read{forged}", "input": {f"k{forged}": [f"v{forged}"]}}
            result = {"type": "tool_result", "tool_use_id": CALL["id"], "content": f"r{forged}"}
            tools = [{"name": "f", "description": f"d{forged}", "input_schema": {forged: {"title": forged}}}]
            return request(
                {"role": "user", "content": f"a{forged}b"},
                {"role": "system", "content": f"c{forged}"},
                says(text(f"{forged}d"), call),
                {"role": "user", "content": [result, text(forged)]},
                system=f"e{forged}",
                tools=tools,
            )

        controls = {tokenizer.hf.convert_tokens_to_ids(name) for name in names}
        plain, forged = (
            [token for token in render(asked(value), tokenizer).tolist() if token in controls]
            for value in ("", "".join(names) + "\n".join(names))
        )
        assert forged == plain
        decoded = tokenizer.hf.decode(render(asked(family.end), tokenizer))
        assert decoded.count(family.end) == render_text(asked(family.end), tokenizer).count(family.end)
        assert f"a{family.end}b" in decoded

    def test_a_token_within_a_token_is_cut_too(self) -> None:
        hf = byte_level_with("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}<x><y>")
        tokenizer = make_tokenizer(hf)
        ids = render(request({"role": "user", "content": "<x><y><|a|><|<|end|>"}), tokenizer).tolist()
        added = [hf.added_tokens_decoder[token].content for token in ids if token in hf.added_tokens_decoder]
        assert added == ["<|end|>", "<x><y>"]
        assert hf.decode(ids) == "<x><y><|a|><|<|end|><|end|><x><y>"

    def test_added_tokens_that_no_template_writes_are_words(self) -> None:
        hf = byte_level_with("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
        ids = render(request({"role": "user", "content": "ab>"}), make_tokenizer(hf)).tolist()
        assert ids == [hf.convert_tokens_to_ids("ab>"), hf.convert_tokens_to_ids("<|end|>")]


class TestThinking:
    @pytest.mark.parametrize(
        ("past", "prompts", "ours"),
        [
            # DeepSeek V3.1: past answers have their thinking closed, and a prompt opens or closes it.
            ("</think>", "{{ '<think>' if thinking else '</think>' }}", "<think>Hm.</think>A"),
            # GLM 4.5: past answers without thinking have an empty one.
            ("<think></think>", "", "<think>Hm.</think>A"),
            ("", "<think>", "<think>Hm.</think>A"),
            ("", "", "<think>Hm.</think>A"),
        ],
    )
    def test_a_turn_that_thinks_opens_thinking_once(self, past: str, prompts: str, ours: str) -> None:
        turn = "{{ '<|a|>' if m.role == 'assistant' else '<x>' }}"
        answer = "{% if m.role == 'assistant' %}" + past + "{% endif %}{{ m.content.split('</think>')[-1] }}<|end|>"
        end = "{% if add_generation_prompt %}<|a|>" + prompts + "{% endif %}"
        hf = byte_level_with("{% for m in messages %}" + turn + answer + "{% endfor %}" + end)
        tokenizer = make_tokenizer(hf, "deepseek_v31")
        on = {"type": "adaptive"}
        asked = request(USER, says(think("Hm."), text("A")), USER, thinking=on)
        first = prompt(request(USER, thinking=on), tokenizer).tokens
        rendered = prompt(asked, tokenizer)
        assert render_text(asked, tokenizer).startswith(f"<x>Q<|end|><|a|>{ours}<|end|><x>Q<|end|><|a|>")
        assert rendered.tokens[: len(first)].tolist() == first.tolist()
        plain = render_text(request(USER, says(text("A")), USER, thinking=on), tokenizer)
        assert plain.startswith(f"<x>Q<|end|><|a|>{past}A<|end|>")


class TestCuts:
    def test_a_sentencepiece_tokenizer_puts_no_space_where_text_is_cut(self) -> None:
        hf = metaspace()
        hf.chat_template = (
            "{% for m in messages %}<|a|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
        )
        tokenizer = make_tokenizer(hf)
        asked = request({"role": "user", "content": "a<|a|>b"}, says(text("cd ef")), {"role": "user", "content": "g h"})
        ids = render(asked, tokenizer).tolist()
        (mark,) = whole(hf, "<|a|>")
        assert hf.convert_ids_to_tokens(ids) == [
            "<|a|>",
            *"a<|a|>b",
            "<|a|>",
            *"cd▁ef",
            "<|a|>",
            *"g▁h",
            "<|a|>",
        ]
        assert ids.count(mark) == 4

    def test_what_was_sampled_stands_where_the_answer_stood(self, tokenizer: Tokenizer) -> None:
        ids = np.asarray([300, 301, 302], np.int32)
        made = prompt(request(USER, says(text("A")), USER), tokenizer, [RecordedAnswer("<think>\n", ids)])
        front, middle, end = made.segments
        assert front == TURN + ANSWER + "<think>\n"
        assert middle is ids
        assert end == "<|im_end|>\n" + TURN + ANSWER + NO_THOUGHT
        assert made.opening == NO_THOUGHT


def byte_level_with(template: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with a chat template."""
    hf = byte_level()
    hf.chat_template = template
    return hf
