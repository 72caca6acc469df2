"""Tools that are loaded, added and removed on the way, results that come in another order, and system messages that
say nothing: each request's prompt extends the one before."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from serve.api.messages import CountTokensRequest, InvalidRequest, decode_count_tokens, decode_request
from serve.diagnosis.causes import tools_cause
from serve.diagnosis.sections import Sections, vocabulary_of
from serve.formats.families import BY_NAME
from serve.prompt.conversation import answers, conversation, is_prefilled, shown
from serve.prompt.grammar import Grammar, grammar_of
from serve.prompt.offered_tools import definition_text, offered_tools
from serve.prompt.render import prompt, render, render_text
from serve.prompt.replay import keys
from serve.server.prepare import least_tokens
from tests.helpers.conversations import is_extension, message, text
from tests.helpers.http import ask
from tests.helpers.model_families import FAMILIES, Family, tokenizer_of

Json = dict[str, Any]
USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
TAKES_TOOLS = pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name != "deepseek-r1"], ids=lambda family: family.name
)


def tool(name: str, **more: Any) -> Json:
    schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    return {"name": name, "description": f"The {name} tool.", "input_schema": schema, **more}


def deferred(name: str, **more: Any) -> Json:
    return tool(name, defer_loading=True, **more)


def request(*messages: Json, **fields: Any) -> CountTokensRequest:
    return decode_count_tokens(json.dumps({"model": "m", "messages": messages} | fields).encode())


def use(id: str, name: str = "Read", **input: Any) -> Json:
    return {"type": "tool_use", "id": id, "name": name, "input": input}


def result(id: str, content: Any) -> Json:
    return {"type": "tool_result", "tool_use_id": id, "content": content}


def found(*names: str) -> list[Json]:
    return [{"type": "tool_reference", "tool_name": name} for name in names]


def addition(name: str) -> Json:
    return {"type": "tool_addition", "tool": {"type": "tool_reference", "name": name}}


def inline(definition: Json) -> Json:
    return {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": definition}}


def removal(name: str) -> Json:
    return {"type": "tool_removal", "tool": {"type": "tool_reference", "name": name}}


def callable_names(asked: CountTokensRequest) -> list[str]:
    return [tool.name for _, tool in offered_tools(asked).callable]


def assert_each_extends(requests: list[CountTokensRequest], family: Family) -> None:
    """Each prompt begins with the one before, up to where the next answer is opened: in the history that may differ."""
    tokenizer = tokenizer_of(family)
    made = [prompt(asked, tokenizer) for asked in requests]
    for shorter, longer in pairwise(made):
        closed = len(shorter.tokens) - len(tokenizer.encode(shorter.opening or ""))
        assert is_extension(longer.tokens, shorter.tokens[:closed])


HOLD = deferred("Placeholder")
SEARCH = [
    USER,
    message("assistant", use("toolu_1", "ToolSearch", query="notebook")),
    message("user", result("toolu_1", found("NotebookEdit"))),
    message("assistant", use("toolu_2", "ToolSearch", query="demo"), use("toolu_3", "NotebookEdit", path="a")),
    message("user", result("toolu_2", found("demo_add", "demo_sub")), result("toolu_3", "done")),
]
# As Claude Code sends them: a tool that was found is inserted by its name, and the placeholder moves.
ARRAYS = [
    [tool("Bash"), tool("ToolSearch"), HOLD, tool("Write")],
    [tool("Bash"), deferred("NotebookEdit"), tool("ToolSearch"), HOLD, tool("Write")],
    [
        deferred("demo_add"),
        tool("Bash"),
        deferred("NotebookEdit"),
        *map(tool, ("ToolSearch", "Write")),
        HOLD,
        deferred("demo_sub"),
    ],
]


class TestDeferredTools:
    @EVERY_FAMILY
    @pytest.mark.parametrize("system", [None, "S"])
    def test_a_tool_search_appends_to_the_prompt(self, family: Family, system: str | None) -> None:
        requests = [
            request(*SEARCH[: 2 * n + 1], tools=tools, **({"system": system} if system else {}))
            for n, tools in enumerate(ARRAYS)
        ]
        assert_each_extends(requests, family)

    @TAKES_TOOLS
    def test_a_definition_stands_where_it_is_loaded_and_nowhere_else(self, family: Family) -> None:
        asked = request(*SEARCH, tools=ARRAYS[2])
        written = render_text(asked, tokenizer_of(family)).replace('\\"', '"')
        head, _, rest = written.partition("notebook")
        assert "The Bash tool." in head
        assert "The Write tool." in head
        assert "The NotebookEdit tool." not in head
        places = [rest.index(f"The {name} tool.") for name in ("NotebookEdit", "demo_add", "demo_sub")]
        assert places == sorted(places)
        assert written.count("The NotebookEdit tool.") == 1
        assert "Placeholder" not in written
        assert callable_names(asked) == ["demo_add", "Bash", "NotebookEdit", "ToolSearch", "Write", "demo_sub"]

    def test_many_references_to_a_tool_hold_its_definition_once(self) -> None:
        tools = [deferred("Late")]
        results = [result(f"c{i}", found("Late", "Late")) for i in range(100)]
        calls = message("assistant", *[use(f"c{i}", "ToolSearch") for i in range(100)])
        asked = request(USER, calls, message("user", *results), tools=tools)
        contents = [turn["content"] for turn in conversation(asked) if turn["role"] == "tool"]
        assert contents[0] == f"{definition_text(asked.tools[0])}\n\nLate"
        assert contents[1:] == ["Late\n\nLate"] * 99
        backwards = request(USER, calls, message("user", *results[::-1]), tools=tools)
        assert conversation(backwards) == conversation(asked)

    def test_a_tool_that_comes_and_goes_is_defined_a_few_times(self) -> None:
        changes = message("system", *[addition("Late"), removal("Late")] * 100)
        (_, turn) = conversation(request(USER, changes, tools=[deferred("Late")]))
        assert turn["content"].count("The Late tool.") == 8

    def test_the_definition_is_the_heads_own(self) -> None:
        tokenizer = tokenizer_of(FAMILIES[0])
        in_head = render_text(request(USER, tools=[tool("Read")]), tokenizer)
        loaded = render_text(request(*SEARCH[:2], message("user", *found("Read")), tools=[deferred("Read")]), tokenizer)
        definition = definition_text(offered_tools(request(USER, tools=[tool("Read")])).head[0][1]).partition("\n")[2]
        assert in_head.count(definition) == loaded.count(definition) == 1

    @pytest.mark.parametrize("array", [ARRAYS[1], ARRAYS[2], [tool("NotebookEdit")]])
    def test_a_definition_stays_whatever_else_the_tools_are(self, array: list[Json]) -> None:
        turns = [conversation(request(*SEARCH[:3], tools=tools)) for tools in (ARRAYS[1], array)]
        assert turns[0] == turns[1]

    @pytest.mark.parametrize("tools", [[tool("Bash")], None])
    def test_a_reference_to_a_tool_that_is_not_there_is_its_name(self, tools: Any) -> None:
        asked = request(*SEARCH[:3], **({"tools": tools} if tools else {}))
        assert conversation(asked)[-1]["content"] == "NotebookEdit"
        assert "NotebookEdit" not in callable_names(asked)

    def test_deferred_tools_alone_are_no_tools(self) -> None:
        requests = (request(USER, tools=[HOLD]), request(USER))
        assert len({render_text(asked, tokenizer_of(FAMILIES[0])) for asked in requests}) == 1

    def test_tools_that_only_the_vendors_search_would_find_stand_in_the_head(self) -> None:
        search = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}
        asked = request(USER, tools=[search, tool("Bash"), deferred("Grep")])
        assert [tool.name for _, tool in offered_tools(asked).head] == callable_names(asked) == ["Bash", "Grep"]

    def test_a_control_token_in_a_definition_is_text(self) -> None:
        tokenizer = tokenizer_of(FAMILIES[0])
        odd = deferred("NotebookEdit") | {"description": "<|im_end|>"}
        plain, marked = (
            render(request(*SEARCH[:3], tools=[tool("ToolSearch"), array]), tokenizer).tolist()
            for array in (deferred("NotebookEdit"), odd)
        )
        end = tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
        assert plain.count(end) == marked.count(end)

    def test_reports_find_head_and_definitions(self) -> None:
        tokenizer = tokenizer_of(FAMILIES[0])
        asked = request(*SEARCH[:3], tools=[HOLD, *ARRAYS[1]])
        made = prompt(asked, tokenizer)
        sections = Sections(asked, made.segments, made.counts, made.tokens, vocabulary_of(tokenizer.hf))
        texts = {name: sections.vocabulary.text(made.tokens[start:stop]) for name, start, stop in sections.ranges()}
        assert "The Bash tool." in texts["tools[1] Bash"]
        assert "The Write tool." in texts["tools[5] Write"]
        assert "The NotebookEdit tool." in texts["messages[2] tool_result"]
        assert not [name for name in texts if "Placeholder" in name or name.endswith("] NotebookEdit")]

    def test_one_more_deferred_tool_is_no_difference_and_another_definition_is(self) -> None:
        first, second, third = (request(USER, tools=tools) for tools in ARRAYS)
        assert tools_cause(second, first, "tools") is tools_cause(third, second, "tools") is None
        assert tools_cause(request(USER, tools=ARRAYS[0][1:]), first, "tools") == "tools_changed"
        other = deferred("NotebookEdit") | {"description": "Other."}
        assert tools_cause(request(USER, tools=[*ARRAYS[0], other]), second, "tools") == "tools_changed"


CHANGES = [
    USER,
    ANSWER,
    USER,
    message("system", text("Careful."), addition("Grep"), removal("Read")),
    ANSWER,
    USER,
    message("system", inline(tool("Made") | {"description": "Once."}), removal("Grep")),
    ANSWER,
    USER,
    message("system", inline(tool("Made") | {"description": "Twice."}), addition("Read")),
    ANSWER,
    USER,
    message("system", removal("Made")),
    ANSWER,
    USER,
    message("system", addition("Made"), addition("Unknown")),
]
OFFERED = {
    1: ["Read", "Edit"],
    4: ["Edit", "Grep"],
    7: ["Edit", "Made"],
    10: ["Read", "Edit", "Made"],
    13: ["Read", "Edit"],
    16: ["Read", "Edit", "Made"],
}


class TestToolChanges:
    TOOLS = (tool("Read"), tool("Edit"), deferred("Grep"), HOLD)

    @EVERY_FAMILY
    def test_a_change_appends_to_the_prompt(self, family: Family) -> None:
        assert_each_extends([request(*CHANGES[:n], tools=self.TOOLS) for n in OFFERED], family)

    @pytest.mark.parametrize("length", OFFERED)
    def test_what_may_be_called_follows_the_changes(self, length: int) -> None:
        assert callable_names(request(*CHANGES[:length], tools=self.TOOLS)) == OFFERED[length]

    def test_a_tool_that_the_client_runs_for_the_vendor_can_be_added(self) -> None:
        unread, bash = {"type": "video"}, {"type": "bash_20250124", "name": "bash"}
        asked = request(USER, message("system", unread, inline(bash), inline(tool("Made"))))
        assert callable_names(asked) == ["bash", "Made"]
        only_vendors = inline({"type": "web_search_20250305", "name": "web_search"})
        assert callable_names(request(USER, message("system", only_vendors, inline(tool("Made"))))) == ["Made"]

    def test_a_change_is_written_where_it_stands(self) -> None:
        turns = conversation(request(*CHANGES, tools=self.TOOLS))
        grep, made, again, gone, last = (turns[i]["content"] for i in (3, 6, 9, 12, 15))
        assert grep.startswith(
            'Careful.\n\nTool available from here on:\n{"type": "function", "function": {"name": "Grep",'
        )
        assert grep.endswith("\n\nTool no longer available: Read")
        assert '"description": "Once."' in made
        assert '"description": "Twice."' in again
        assert gone == "Tool no longer available: Made"
        assert '"description": "Twice."' in last
        assert last.endswith("\n\nTool available from here on: Unknown")

    @pytest.mark.parametrize(
        ("reference", "written"),
        [
            ({"type": "mcp_tool_reference", "server_name": "demo", "name": "add"}, "add of demo"),
            ({"type": "mcp_toolset_reference", "server_name": "demo"}, "all of demo"),
        ],
    )
    def test_tools_of_servers_that_the_vendor_connects_to_are_named(self, reference: Json, written: str) -> None:
        blocks = [{"type": f"tool_{kind}", "tool": reference} for kind in ("addition", "removal")]
        assert conversation(request(USER, message("system", *blocks)))[1]["content"] == (
            f"Tool available from here on: {written}\n\nTool no longer available: {written}"
        )


def demanded(choice: Json, *messages: Json, format: str = "hermes", **fields: Any) -> Grammar | None:
    body = ask("", messages=messages, tool_choice=choice, **fields)
    return grammar_of(decode_request(json.dumps(body).encode()), BY_NAME[format], False, {})


class TestForcedCalls:
    @pytest.mark.parametrize("format", ["hermes", "qwen3_coder", "llama3", "mistral"])
    def test_a_loaded_tool_is_constrained_by_its_schema(self, format: str) -> None:
        tools = [tool("ToolSearch"), deferred("NotebookEdit"), HOLD]
        one = demanded({"type": "tool", "name": "NotebookEdit"}, *SEARCH[:3], format=format, tools=tools)
        assert one is not None
        assert [field for field, _ in one.schemas] == ["tools[1].input_schema"]
        any_tool = demanded({"type": "any"}, *SEARCH[:3], format=format, tools=tools)
        assert any_tool is not None
        assert "NotebookEdit" in any_tool.text
        assert "Placeholder" not in any_tool.text

    def test_a_tool_that_is_defined_in_a_message_is_constrained_by_its_schema(self) -> None:
        for choice in ({"type": "any"}, {"type": "tool", "name": "Made"}):
            grammar = demanded(choice, USER, message("system", text("S"), inline(tool("Made"))))
            assert grammar is not None
            assert [field for field, _ in grammar.schemas] == [
                "messages[1].content[1].tool.definition.input_schema",
            ]

    @pytest.mark.parametrize(
        ("messages", "name"),
        [([USER], "Grep"), ([USER, message("system", removal("Read"))], "Read"), (SEARCH[:3], "Grep")],
    )
    def test_a_tool_that_is_not_loaded_or_was_removed_is_refused(self, messages: list[Json], name: str) -> None:
        tools = [tool("Read"), deferred("Grep"), deferred("NotebookEdit")]
        with pytest.raises(InvalidRequest, match=rf"tool_choice: expected .* got '{name}', which is not loaded or was"):
            demanded({"type": "tool", "name": name}, *messages, tools=tools)

    def test_any_of_no_tools_is_refused(self) -> None:
        with pytest.raises(InvalidRequest, match=r"tool_choice: expected .* got none that is loaded"):
            demanded({"type": "any"}, USER, tools=[HOLD])
        with pytest.raises(InvalidRequest, match=r"tool_choice\.name: expected the name of one of tools, got 'Other'"):
            demanded({"type": "tool", "name": "Other"}, USER, message("system", inline(tool("Made"))))


def order_of(*messages: Json) -> list[str]:
    """The contents of the results and of the texts after the first answer."""
    return [turn["content"] for turn in conversation(request(USER, *messages))[2:]]


class TestOrderOfResults:
    CALLS = message("assistant", use("a"), use("b"), use("c"))

    @pytest.mark.parametrize(
        ("parts", "order"),
        [
            ([result("a", "A"), result("b", "B"), result("c", "C")], "A B C"),
            ([result("c", "C"), result("a", "A"), result("b", "B")], "A B C"),
            ([result("c", "C"), result("b", "B")], "B C"),
            ([result("b", "B"), text("T"), result("a", "A"), text("U")], "A T B U"),
            ([result("zz", "Z"), result("b", "B"), result("a", "A")], "A B Z"),
            ([result("zz", "Z"), result("yy", "Y")], "Z Y"),
            ([result("b", "B1"), result("b", "B2"), result("a", "A")], "A B1 B2"),
        ],
    )
    def test_results_stand_in_the_order_of_their_calls(self, parts: list[Json], order: str) -> None:
        assert order_of(self.CALLS, message("user", *parts)) == order.split()
        assert order_of(self.CALLS, *(message("user", part) for part in parts)) == order.split()

    def test_calls_that_share_an_id_are_matched_one_by_one(self) -> None:
        calls = message("assistant", use("a"), use("b"), use("a"))
        results = [result("b", "B"), result("a", "A1"), result("a", "A2")]
        assert order_of(calls, message("user", *results)) == ["A1", "B", "A2"]

    def test_calls_of_an_answer_in_parts_are_one_answers(self) -> None:
        parts = [message("assistant", use("a")), {"role": "system", "content": []}, message("assistant", use("b"))]
        assert order_of(*parts, message("user", result("b", "B"), result("a", "A"))) == ["A", "B"]

    @EVERY_FAMILY
    def test_the_order_of_arrival_changes_no_token_and_no_key(self, family: Family) -> None:
        results = [result("a", "A"), result("b", "B"), result("c", "C")]
        one = request(USER, self.CALLS, message("user", *results), ANSWER, USER)
        other = request(USER, self.CALLS, message("user", *results[::-1]), ANSWER, USER)
        assert render(one, tokenizer_of(family)).tolist() == render(other, tokenizer_of(family)).tolist()
        assert keys(b"", one.messages) == keys(b"", other.messages)


EFFORT = {"output_config": {"effort": "low"}}
NOTE = {"role": "system", "content": "Note.", "clear_at": "next_user_message"}
SILENT: list[Json] = [{}, {"content": []}, {"content": ""}, {"content": None}, {"content": [text("")]}]


class TestSystemMessages:
    @EVERY_FAMILY
    @pytest.mark.parametrize("content", SILENT)
    def test_one_without_text_adds_nothing(self, content: Json, family: Family) -> None:
        silent = {"role": "system", **EFFORT, **content}
        with_it = request(USER, silent, ANSWER, silent, USER, ANSWER, USER, silent)
        without = request(USER, ANSWER, USER, ANSWER, USER)
        assert render(with_it, tokenizer_of(family)).tolist() == render(without, tokenizer_of(family)).tolist()
        assert keys(b"", with_it.messages) == keys(b"", without.messages)

    def test_one_without_text_leaves_a_begun_answer_the_last(self) -> None:
        assert is_prefilled(request(USER, ANSWER, {"role": "system", **EFFORT}))

    def test_a_prompt_of_silence_is_not_taken_for_a_long_one(self) -> None:
        assert least_tokens(request(USER, *[{"role": "system", **EFFORT}] * 1000), 100) < 5
        assert conversation(request({"role": "system", **EFFORT})) == [{"role": "system", "content": ""}]

    def test_other_messages_need_content(self) -> None:
        with pytest.raises(InvalidRequest, match=r"messages\[1\]\.content: field required"):
            request(USER, {"role": "assistant"})

    @EVERY_FAMILY
    def test_a_text_is_cleared_once_a_user_message_follows(self, family: Family) -> None:
        def tokens(*messages: Json) -> list[int]:
            return render(request(*messages), tokenizer_of(family)).tolist()

        kept = NOTE | {"clear_at": "never"}
        assert tokens(USER, NOTE) == tokens(USER, kept) != tokens(USER)
        assert tokens(USER, NOTE, ANSWER, USER) == tokens(USER, ANSWER, USER)
        assert tokens(USER, NOTE, ANSWER, USER, NOTE) == tokens(USER, ANSWER, USER, kept)
        assert tokens(USER, kept, ANSWER, USER) != tokens(USER, ANSWER, USER)

    def test_a_tool_that_a_cleared_message_defines_stays_known_between_two_answers(self) -> None:
        added = NOTE | {"content": [text("Note."), addition("Late")]}
        asked = request(USER, ANSWER, added, {"role": "assistant", "content": "B"}, USER, tools=[deferred("Late")])
        turns = conversation(asked)
        assert turns[2]["content"] == definition_text(asked.tools[0])
        answered = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert answered == ["A", "B"], "no answer is lost"
        assert len(answers(asked.messages)) == len(answered)

    def test_the_tool_changes_of_a_cleared_message_stay(self) -> None:
        cleared = NOTE | {"content": [text("Note."), removal("Read")]}
        asked = request(USER, cleared, ANSWER, USER, tools=[tool("Read")])
        assert conversation(asked)[1]["content"] == "Tool no longer available: Read"
        assert callable_names(asked) == []

    def test_an_answer_is_found_after_its_note_is_cleared(self) -> None:
        recorded = keys(b"", request(USER, NOTE, ANSWER).messages)
        assert recorded == keys(b"", request(USER, NOTE, ANSWER, USER).messages)

    def test_messages_keep_their_places(self) -> None:
        asked = request(USER, NOTE, ANSWER, {"role": "system", **EFFORT}, USER)
        assert len(shown(asked.messages)) == 5
