"""What the official SDK makes of tools, thinking and constrained answers. The answers are forced on a random model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from model.config import ModelConfig
from model.params import Params
from serve.api.messages import MessagesRequest, ToolUseBlock
from serve.formats.format import write_turn
from serve.prompt.signing import verify
from serve.prompt.tokenizer import Tokenizer
from tests.helpers.model_families import FAMILIES, Family, tokenizer_of
from tests.helpers.scripted_server import context_over, listening, saying

Json = dict[str, Any]
Model = tuple[ModelConfig, Params]
VOCAB = 384
QWEN3 = next(family for family in FAMILIES if family.name == "qwen3")
TOKENIZER = tokenizer_of(QWEN3)
QUESTION = {"role": "user", "content": "What is in a.py?"}
READ = {
    "name": "Read",
    "description": "Reads a file.",
    "input_schema": {
        "type": "object",
        "properties": {"path": {"type": "string", "maxLength": 8}, "limit": {"type": "integer"}},
        "required": ["path"],
        "additionalProperties": False,
    },
}
CALL = '<tool_call>\n{"name": "Read", "arguments": {"path": "a.py"}}\n</tool_call>'
ASKED = {"model": "any", "max_tokens": 400, "messages": [QUESTION]}
THINKING = {"type": "adaptive"}
ONE_CALL = {"type": "auto", "disable_parallel_tool_use": True}


@pytest.fixture(scope="module")
def small(tiny_model: Callable[[int], Model]) -> Model:
    """The model of this file's engines."""
    return tiny_model(VOCAB)


@pytest.fixture
def talk(small: Model) -> Callable[..., Any]:
    """`with talk(text, ...) as sdk`: a server that answers with these texts in turn; without texts it is not forced."""

    @contextmanager
    def talking(*texts: str, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> Iterator[anthropic.Anthropic]:
        coming = iter(texts)

        def answer(request: MessagesRequest, thinking_opened: bool) -> list[int]:
            return tokenizer.encode(next(coming)).tolist()

        constrain = saying(tokenizer, VOCAB, answer) if texts else None
        _, context = context_over(small, tokenizer, constrain, **options)
        with listening(context) as url, anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as sdk:
            sdk.context = context  # type: ignore[attr-defined]
            yield sdk

    return talking


def raw_events(sdk: anthropic.Anthropic, body: Json) -> list[tuple[str, Json]]:
    """(name, data) of each event of a stream."""
    response = httpx.post(str(sdk.base_url.join("/v1/messages")), json=body | {"stream": True}, timeout=60)
    parts = [part.split("\n") for part in response.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


class TestBlocks:
    def test_thinking_text_and_calls_come_as_blocks_in_their_order(self, talk: Any) -> None:
        written = f"<think>\nFirst.\n</think>\n\nI look.\n{CALL}\n<think>\nMore.\n</think>\n\n{CALL}"
        with talk(written, written) as sdk:
            asked = ASKED | {"tools": [READ], "thinking": THINKING}
            whole = sdk.messages.create(**asked)
            assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "thinking", "tool_use"]
            thought, text, call, again, last = whole.content
            assert (thought.thinking, text.text, again.thinking) == ("First.", "I look.", "More.")
            assert (call.name, call.input, last.input) == ("Read", {"path": "a.py"}, {"path": "a.py"})
            assert call.id != last.id
            assert call.id.startswith("toolu_")
            assert whole.stop_reason == "tool_use"
            with sdk.messages.stream(**asked) as stream:
                streamed = stream.get_final_message()
            assert [b.to_dict() | {"id": 0} for b in streamed.content] == [
                b.to_dict() | {"id": 0} for b in whole.content
            ]

    def test_the_events_of_each_block_are_the_apis(self, talk: Any) -> None:
        with talk(f"<think>\nHm.\n</think>\n\nYes.\n{CALL}") as sdk:
            events = raw_events(sdk, ASKED | {"tools": [READ], "thinking": THINKING})
        assert all(name == data["type"] for name, data in events)
        blocks = [data for name, data in events if name.startswith("content_block")]
        kinds = [data.get("delta", {}).get("type", data["type"]) for data in blocks]
        text = ["content_block_start", *["text_delta"] * kinds.count("text_delta"), "content_block_stop"]
        thinking = ["thinking_delta"] * kinds.count("thinking_delta")
        assert kinds == [
            *("content_block_start", *thinking, "signature_delta", "content_block_stop"),
            *text,
            *("content_block_start", "input_json_delta", "content_block_stop"),
        ]
        assert len(thinking) > 1, "deltas come as they are sampled"
        starts = [data["content_block"] for data in blocks if data["type"] == "content_block_start"]
        assert starts[0] == {"type": "thinking", "thinking": "", "signature": ""}
        assert starts[1] == {"type": "text", "text": ""}
        assert starts[2] == {"type": "tool_use", "id": starts[2]["id"], "name": "Read", "input": {}}
        assert [data["index"] for data in blocks] == sorted(data["index"] for data in blocks)

    def test_a_malformed_call_is_text(self, talk: Any) -> None:
        written = '<tool_call>\n{"name": "Read", "arguments": {"path": \n</tool_call>'
        with talk(written) as sdk:
            answer = sdk.messages.create(**ASKED | {"tools": [READ]})
        assert ([block.type for block in answer.content], answer.stop_reason) == (["text"], "end_turn")
        assert answer.content[0].text == written

    def test_no_call_is_read_where_none_is_allowed(self, talk: Any) -> None:
        with talk(CALL, CALL) as sdk:
            answer = sdk.messages.create(**ASKED | {"tools": [READ], "tool_choice": {"type": "none"}})
            assert (answer.content[0].text, answer.stop_reason) == (CALL, "end_turn")
            answer = sdk.messages.create(**ASKED)
            assert (answer.content[0].text, answer.stop_reason) == (CALL, "end_turn")

    def test_where_calls_may_not_be_parallel_the_first_ends_the_answer(self, talk: Any) -> None:
        with talk(f"{CALL}\n{CALL}") as sdk:
            answer = sdk.messages.create(**ASKED | {"tools": [READ], "tool_choice": ONE_CALL})
            assert ([block.type for block in answer.content], answer.stop_reason) == (["tool_use"], "tool_use")

    @pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
    def test_a_call_that_ends_the_answer_is_closed_in_the_history(self, talk: Any, family: Family) -> None:
        tokenizer = tokenizer_of(family)
        call = ToolUseBlock("toolu_1", "Read", {"path": "a.py"})
        written = [write_turn(tokenizer.template.format, [call] * n) for n in (1, 2)]
        opened = "</think>\n\n" if family.name == "deepseek-r1" else ""
        with talk(opened + written[1], opened + "Yes.", tokenizer=tokenizer) as sdk:
            body = ASKED | {"tools": [READ], "tool_choice": ONE_CALL}
            (called,) = sdk.messages.create(**body).content
            first = sdk.context.engine.asked[-1].tokens
            result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": called.id, "content": "x"}]}
            said = {"role": "assistant", "content": [called.to_dict()]}
            sdk.messages.create(**body | {"messages": [QUESTION, said, result]})
            second = sdk.context.engine.asked[-1].tokens
        assert second[: len(first)].tolist() == first.tolist()
        history = tokenizer.hf.decode(second[len(first) :])
        once = re.escape(written[0]).replace("000toolu1", "[A-Za-z0-9]{9}")  # the id that Mistral's models write
        assert re.match(f"{opened}{once}{re.escape(family.end)}", history), history

    @pytest.mark.parametrize("tokens", [4, 20, 30])
    def test_an_answer_cut_in_a_call_gives_back_what_is_known_of_it(self, talk: Any, tokens: int) -> None:
        with talk(CALL) as sdk:
            answer = sdk.messages.create(**ASKED | {"tools": [READ], "max_tokens": tokens})
        assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", tokens)
        named = '"Read"' in TOKENIZER.hf.decode(TOKENIZER.encode(CALL)[:tokens])
        assert [(block.name, block.input) for block in answer.content] == [("Read", {})] * named


class TestThinking:
    WRITTEN = "<think>\nFirst.\n</think>\n\nYes."

    def test_who_did_not_ask_for_thinking_gets_none(self, talk: Any) -> None:
        with talk(self.WRITTEN) as sdk:
            answer = sdk.messages.create(**ASKED)
        assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": "Yes."}]

    def test_pings_bridge_what_is_not_shown(self, talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with talk(self.WRITTEN) as sdk:
            monkeypatch.setattr("serve.server.answer.PING_SECONDS", 0.0)
            names = [name for name, _ in raw_events(sdk, ASKED)]
        assert "ping" in names[names.index("message_start") : names.index("content_block_start")]

    def test_thinking_may_be_signed_and_not_shown(self, talk: Any) -> None:
        with talk(self.WRITTEN) as sdk:
            answer = sdk.messages.create(**ASKED, thinking=THINKING | {"display": "omitted"})
        thought, text = answer.content
        assert (thought.type, thought.thinking, text.text) == ("thinking", "", "Yes.")
        assert thought.signature

    def test_a_signature_is_of_the_ids_up_to_the_end_of_the_thinking(self, talk: Any) -> None:
        with talk(self.WRITTEN) as sdk:
            (thought, _) = sdk.messages.create(**ASKED, thinking=THINKING).content
            ids = TOKENIZER.encode(self.WRITTEN)
            assert verify(sdk.context.signing_key, ids, thought.signature)
            assert not verify(sdk.context.signing_key, ids[1:], thought.signature)

    @pytest.mark.parametrize(
        ("signature", "replayed"), [("kept", True), ("", True), ("c2lnbmF0dXJl", False), (None, False)]
    )
    def test_thinking_with_a_foreign_signature_is_read_as_text(
        self, talk: Any, signature: str | None, replayed: bool
    ) -> None:
        # Sampled in a way in which its text would not be tokenised, so that a replay shows.
        odd = [id for character in "Yes, the file." for id in TOKENIZER.encode(character).tolist()]
        with talk("", "") as sdk:
            body = ASKED | {"thinking": THINKING}
            coming = iter([[*TOKENIZER.encode("<think>\nFirst.\n</think>\n\n").tolist(), *odd], odd])
            force(sdk, saying(TOKENIZER, VOCAB, lambda request, opened: next(coming)))
            first = sdk.messages.create(**body)
            thought, text = (block.to_dict() for block in first.content)
            if signature is None:
                thought |= {"signature": "A" + thought["signature"][1:]}
            elif signature != "kept":
                thought |= {"signature": signature}
            messages = [QUESTION, {"role": "assistant", "content": [thought, text]}, QUESTION]
            sdk.messages.create(**body | {"messages": messages})
            tokens = sdk.context.engine.asked[-1].tokens.tolist()
        joined = ",".join(map(str, tokens))
        assert (",".join(map(str, odd)) in joined) == replayed


class TestContinued:
    """An answer that was cut off and comes back to be continued."""

    @staticmethod
    def continued(sdk: anthropic.Anthropic, max_tokens: int) -> list[list[tuple]]:
        """What came of an answer up to `max_tokens`, and what its continuation brought: (type, text) of each block."""
        body = ASKED | {"thinking": THINKING}
        cut = sdk.messages.create(**body | {"max_tokens": max_tokens})
        assert cut.stop_reason == "max_tokens"
        begun = {"role": "assistant", "content": [block.to_dict() for block in cut.content]}
        more = sdk.messages.create(**body | {"messages": [QUESTION, begun]})
        return [[(b.type, getattr(b, b.type)) for b in answer.content] for answer in (cut, more)]

    @pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
    def test_it_goes_on_where_it_was_cut(self, talk: Any, name: str) -> None:
        opened = "" if name == "deepseek-r1" else "<think>\n"  # its prompts open thinking themselves
        start, thought, said = f"{opened}Let", " me see.\n</think>\n\nIt is", " text."
        tokenizer = tokenizer_of(next(family for family in FAMILIES if family.name == name))
        with talk(start + thought, thought.strip(), tokenizer=tokenizer) as sdk:
            came, more = self.continued(sdk, len(tokenizer.encode(start)))
        assert (came, more) == ([("thinking", "Let")], [("thinking", "me see."), ("text", "It is")])
        with talk(start + thought + said, said, tokenizer=tokenizer) as sdk:
            came, more = self.continued(sdk, len(tokenizer.encode(start + thought)))
        assert (came, more) == ([("thinking", "Let me see."), ("text", "It is")], [("text", " text.")])


class TestDispatch:
    def test_a_complete_call_is_told_at_once_where_that_is_switched_on(self, talk: Any) -> None:
        with talk(f"{CALL}\n{CALL}", "unused", enable_streaming_tool_dispatch=True) as sdk:
            events = raw_events(sdk, ASKED | {"tools": [READ]})
        sent = [data for name, data in events if name == "tool_call_dispatch"]
        ids = [data["content_block"]["id"] for name, data in events if name == "content_block_start"]
        function = {"name": "Read", "arguments": '{"path":"a.py"}'}
        assert [(d["choice_index"], d["tool_call"]) for d in sent] == [
            (0, {"index": n, "id": ids[n], "type": "function", "function": function}) for n in range(2)
        ]
        names = [name for name, _ in events]
        assert names.index("tool_call_dispatch") < names.index("message_delta") - 3

    def test_an_sdk_that_does_not_know_the_event_survives_it(self, talk: Any) -> None:
        with talk(CALL, CALL, enable_streaming_tool_dispatch=True) as sdk:
            with sdk.messages.stream(**ASKED, tools=[READ]) as stream:
                final = stream.get_final_message()
            assert final.content[0].input == {"path": "a.py"}
            with sdk.beta.messages.stream(**ASKED, tools=[READ]) as stream:
                assert stream.get_final_message().content[0].input == {"path": "a.py"}

    def test_it_is_off_by_default(self, talk: Any) -> None:
        with talk(CALL) as sdk:
            assert "tool_call_dispatch" not in dict(raw_events(sdk, ASKED | {"tools": [READ]}))


@pytest.mark.parametrize("temperature", [0, 1])
class TestConstraints:
    """The weights are random, so every valid answer is due to the constraint."""

    @pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "Read"}])
    def test_a_forced_call_is_valid(self, talk: Any, choice: Json, temperature: int) -> None:
        one = choice | {"disable_parallel_tool_use": True}
        with talk() as sdk:
            body = ASKED | {"tools": [READ], "tool_choice": one, "extra_body": {"temperature": temperature}}
            with sdk.messages.stream(**body) as stream:
                answer = stream.get_final_message()
        (call,) = answer.content
        assert (call.name, answer.stop_reason) == ("Read", "tool_use")
        assert isinstance(call.input["path"], str)
        assert set(call.input) <= {"path", "limit"}

    def test_a_prompt_that_opens_thinking_does_not_keep_a_call_from_coming(self, talk: Any, temperature: int) -> None:
        tokenizer = tokenizer_of(next(family for family in FAMILIES if family.name == "deepseek-r1"))
        choice = {"type": "any", "disable_parallel_tool_use": True}
        with talk(tokenizer=tokenizer) as sdk:
            answer = sdk.messages.create(
                **ASKED, tools=[READ], tool_choice=choice, extra_body={"temperature": temperature}
            )
        assert ([block.type for block in answer.content], answer.stop_reason) == (["tool_use"], "tool_use")

    def test_an_answer_obeys_its_schema(self, talk: Any, temperature: int) -> None:
        schema = {
            "type": "object",
            "properties": {"title": {"type": "string", "maxLength": 12}, "ok": {"type": "boolean"}},
            "required": ["title", "ok"],
            "additionalProperties": False,
        }
        config = {"format": {"type": "json_schema", "schema": schema}}
        with talk() as sdk:
            answer = sdk.messages.create(**ASKED, output_config=config, extra_body={"temperature": temperature})
        value = json.loads(answer.content[0].text)
        assert set(value) == {"title", "ok"}
        assert (type(value["title"]), type(value["ok"])) == (str, bool)
        assert answer.stop_reason == "end_turn"


def test_marks_inside_of_a_json_answer_are_text(talk: Any) -> None:
    value = {"title": f"How to write <think> and {CALL}"}
    schema = {"type": "object", "properties": {"title": {"type": "string"}}}
    config = {"format": {"type": "json_schema", "schema": schema}}
    with talk(json.dumps(value)) as sdk:
        answer = sdk.messages.create(**ASKED, tools=[READ], output_config=config)
    assert json.loads(answer.content[0].text) == value
    assert (len(answer.content), answer.stop_reason) == (1, "end_turn")


class TestConstraintErrors:
    def test_a_schema_that_would_make_too_large_a_grammar_is_the_clients_fault(self, talk: Any) -> None:
        config = {"format": {"type": "json_schema", "schema": {"multipleOf": 10_000_019}}}
        with talk() as sdk, pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema"):
            sdk.messages.create(**ASKED, output_config=config)

    def test_a_constraint_that_breaks_ends_its_request_alone(self, talk: Any, small: Model) -> None:
        class Broken:
            def mask(self) -> Any:
                raise RuntimeError("a fault of the test")

        with talk() as sdk:
            constrain = sdk.context.constrain
            force(sdk, lambda request, opened: Broken())
            with pytest.raises(anthropic.InternalServerError, match="a fault of the test"):
                sdk.messages.create(**ASKED)
            force(sdk, constrain)
            greedy = {"temperature": 0}  # drawn by chance, an answer may end at once
            assert sdk.messages.create(**ASKED | {"max_tokens": 3}, extra_body=greedy).usage.output_tokens == 3


class TestHistory:
    @staticmethod
    def second_turn(sdk: anthropic.Anthropic) -> Any:
        """The usage of a second turn after a first one with thinking."""
        body = ASKED | {"thinking": THINKING}
        first = sdk.messages.create(**body)
        answered = {"role": "assistant", "content": [block.to_dict() for block in first.content]}
        return sdk.messages.create(**body | {"messages": [QUESTION, answered, QUESTION]}).usage

    def test_thinking_stays_unless_the_template_is_to_decide(self, talk: Any) -> None:
        written = "<think>\nA long thought about what is in the file.\n</think>\n\nYes."
        with talk(written, written) as sdk:
            kept = self.second_turn(sdk)
        with talk(written, written, render_history_with_template=True) as sdk:
            dropped = self.second_turn(sdk)
        totals = [u.cache_read_input_tokens + u.cache_creation_input_tokens + u.input_tokens for u in (kept, dropped)]
        assert totals[0] > totals[1]
        assert kept.cache_read_input_tokens > dropped.cache_read_input_tokens

    def test_sampled_turns_outlive_the_server(self, talk: Any, tmp_path: Path) -> None:
        odd = "Yes, the file."
        with talk(odd, "x", store=str(tmp_path)) as sdk:
            first = sdk.messages.create(**ASKED)
            key = sdk.context.signing_key
        answered = {"role": "assistant", "content": first.content[0].text + "\n"}
        with talk("y", store=str(tmp_path)) as sdk:
            assert sdk.context.signing_key == key
            sdk.messages.create(**ASKED | {"messages": [QUESTION, answered, QUESTION]})
            assert sdk.context.replay.memory.currsize > 512, "the turn was read from the disk"

    def test_salts_share_nothing(self, talk: Any) -> None:
        with talk("a", "b", "c", "d") as sdk:
            mine, other = {"x-tokenzero-cache-salt": "mine"}, {"x-tokenzero-cache-salt": "other"}
            assert sdk.messages.create(**ASKED, extra_headers=mine).usage.cache_read_input_tokens == 0
            assert sdk.messages.create(**ASKED, extra_headers=mine).usage.cache_read_input_tokens > 0
            assert sdk.messages.create(**ASKED, extra_headers=other).usage.cache_read_input_tokens == 0
            assert sdk.messages.create(**ASKED).usage.cache_read_input_tokens == 0

    def test_callers_with_different_keys_share_pages_and_no_sampled_turns(self, talk: Any) -> None:
        odd = [id for character in "Yes, the file." for id in TOKENIZER.encode(character).tolist()]
        with talk("") as sdk:
            coming = iter([odd, odd, odd])
            force(sdk, saying(TOKENIZER, VOCAB, lambda request, opened: next(coming)))
            first = sdk.messages.create(**ASKED)
            answered = {"role": "assistant", "content": first.content[0].text}
            second = ASKED | {"messages": [QUESTION, answered, QUESTION]}
            for key, replayed in (("any", True), ("other", False)):
                usage = sdk.with_options(api_key=key).messages.create(**second).usage
                tokens = ",".join(map(str, sdk.context.engine.asked[-1].tokens.tolist()))
                assert (",".join(map(str, odd)) in tokens) == replayed
                assert usage.cache_read_input_tokens > 0


def force(sdk: Any, constrain: Any) -> None:
    """Give the server another constraint."""
    object.__setattr__(sdk.context, "constrain", constrain)


class TestCutCalls:
    """A call that `max_tokens` ended, on all three APIs."""

    BEGUN = 'Look:\n<tool_call>\n{"name": "Read", "arguments": {"limit": 3, "path": "a.'
    WHOLE = BEGUN + 'py"}}\n</tool_call>'
    LIMIT = len(TOKENIZER.encode(BEGUN))

    def test_clients_of_the_messages_api_see_the_call_and_may_send_it_back(self, talk: Callable[..., Any]) -> None:
        asked = ASKED | {"max_tokens": self.LIMIT, "tools": [READ]}
        with talk(self.WHOLE, self.WHOLE, "I see.") as sdk:
            with sdk.messages.stream(**asked) as stream:
                streamed = stream.get_final_message()
            whole = sdk.messages.create(**asked)
            for answer in (streamed, whole):
                text, call = answer.content
                assert text.text == "Look:"
                assert (call.type, call.name, call.input) == ("tool_use", "Read", {"limit": 3})
                assert answer.stop_reason == "max_tokens"
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "cut off, try again", "is_error": True}
            history = [QUESTION, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
            after = sdk.messages.create(**asked | {"messages": history})
            assert after.content[0].text == "I see."
            assert after.usage.cache_read_input_tokens > whole.usage.cache_read_input_tokens, "the cut answer is reused"

    def test_openais_clients_see_the_beginning_of_the_arguments(self, talk: Callable[..., Any]) -> None:
        function = {"name": "Read", "parameters": READ["input_schema"]}
        chat = {"messages": [QUESTION], "max_tokens": self.LIMIT, "tools": [{"type": "function", "function": function}]}
        responses = {"input": "What is in a.py?", "max_output_tokens": self.LIMIT}
        responses["tools"] = [{"type": "function", **function}]
        with talk(*[self.WHOLE] * 4) as sdk:
            chat_url = str(sdk.base_url.join("/v1/chat/completions"))
            answer = httpx.post(chat_url, json=chat | {"model": "any"}, timeout=60).json()["choices"][0]
            chunks = httpx.post(
                str(sdk.base_url.join("/v1/chat/completions")),
                json=chat | {"model": "any", "stream": True},
                timeout=60,
            ).text
            pieces = [json.loads(line[6:]) for line in chunks.splitlines() if line.startswith("data: {")]
            deltas = [piece["choices"][0]["delta"] for piece in pieces if piece["choices"]]
            calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
            assert "".join(call["function"]["arguments"] for call in calls) == '{"limit":3,"path":"a.'
            assert "".join(delta.get("content") or "" for delta in deltas) == "Look:"
            assert pieces[-1]["choices"][0]["finish_reason"] == "length"
            url = str(sdk.base_url.join("/v1/responses"))
            whole = httpx.post(url, json=responses | {"model": "any"}, timeout=60).json()
            events = httpx.post(url, json=responses | {"model": "any", "stream": True}, timeout=60).text
        (call,) = answer["message"]["tool_calls"]
        assert (answer["finish_reason"], call["function"]["arguments"]) == ("length", '{"limit":3,"path":"a.')
        item = whole["output"][-1]
        assert (whole["status"], item["name"]) == ("incomplete", "Read")
        assert (item["status"], item["arguments"]) == ("incomplete", '{"limit":3,"path":"a.'), "no client runs it"
        done = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
        ends = [event for event in done if event["type"] == "response.output_item.done"]
        items = [event["item"] for event in ends if event["item"]["type"] == "function_call"]
        assert [(item["status"], item["arguments"]) for item in items] == [("incomplete", '{"limit":3,"path":"a.')]


def test_a_call_in_thinking_that_was_not_closed_is_called_and_its_answer_is_reused(talk: Callable[..., Any]) -> None:
    asked = ASKED | {"tools": [READ], "thinking": THINKING}
    with talk(f"<think>\nI need it.\n{CALL}", "Done.") as sdk:
        with sdk.messages.stream(**asked) as stream:
            answer = stream.get_final_message()
        thought, call = answer.content
        assert (thought.thinking, call.input, answer.stop_reason) == ("I need it.", {"path": "a.py"}, "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "x = 1"}
        history = [QUESTION, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        after = sdk.messages.create(**asked | {"messages": history})
    prompt = answer.usage.input_tokens + answer.usage.cache_creation_input_tokens + answer.usage.cache_read_input_tokens
    assert after.usage.cache_read_input_tokens >= prompt + answer.usage.output_tokens - 16, "all full pages"
