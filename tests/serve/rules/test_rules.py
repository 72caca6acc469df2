"""The rules beside the preamble's: what they change, what they leave alone, and that a template can be led by tools."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest

from serve.__main__ import main
from serve.api.messages import (
    CountTokensRequest,
    InputMessage,
    InvalidRequest,
    TextBlock,
    ToolResultBlock,
    decode_count_tokens,
)
from serve.api.tools import Tool
from serve.prompt.probe import common_start
from serve.prompt.render import prompt, render_text
from serve.rules.normalize import DEFAULT_RULES, RULES, Applied, cut_volatile, fold_reminders, normalize, parse_rules
from serve.server.config import parse_config
from serve.server.context import unrendered
from tests.helpers.model_families import FAMILIES, tokenizer_of

USER = InputMessage("user", "Hello")
GIT = "gitStatus: at the start.\nCurrent branch: main\n\nStatus:\nM a.py\n\nRecent commits:\nab1 Fix"
# The environments in agents' system texts, in their shapes, and the lines that are moved.
ENVIRONMENTS = {
    "Cline": (
        "You edit.\nYou run in:\n<env>\n1. Platform: linux\n2. Date: 11/28/2026\n3. IDE: Terminal Shell\n"
        "4. Working Directory: /home/a/project\n</env>\nRules follow.",
        ["2. Date: 11/28/2026", "4. Working Directory: /home/a/project"],
    ),
    "opencode": (
        "You code.\n<env>\n  Working directory: /home/a/project\n  Workspace root folder: /home/a/project\n"
        "  Is directory a git repo: yes\n  Platform: linux\n  Today's date: Sat Nov 28 2026\n</env>\nMore.",
        [
            "  Working directory: /home/a/project",
            "  Workspace root folder: /home/a/project",
            "  Is directory a git repo: yes",
            "  Today's date: Sat Nov 28 2026",
        ],
    ),
    "pi": (
        "You help.\nCurrent date: 2026-11-28\nCurrent working directory: /home/a/project",
        ["Current date: 2026-11-28", "Current working directory: /home/a/project"],
    ),
    "Codex": (
        "<environment>\n  <current_date>2026-11-28</current_date>\n  <shell>bash</shell>\n</environment>",
        ["  <current_date>2026-11-28</current_date>"],
    ),
}
BY_NAME = {family.name: family for family in FAMILIES}


def request(system: object = None, *messages: InputMessage, tools: tuple[Tool, ...] = ()) -> CountTokensRequest:
    messages = messages or (USER,)
    return CountTokensRequest(model="m", system=system, messages=messages, tools=tools or None)  # type: ignore[arg-type]


def tool(name: str, schema: str = '{"type": "object"}') -> Tool:
    return Tool(name, json.loads(schema))


class TestReminders:
    @pytest.mark.parametrize(
        "countdown",
        [
            "<total_tokens>183,201 tokens left</total_tokens>\n",
            "Token usage: 2500/200000\n",
            "Token usage: 2500/200000; 197500 remaining\n",
            "  <system_warning>Token usage: 2500/200000; 197500 remaining</system_warning>\r\n",
        ],
    )
    def test_a_countdown_goes_and_its_neighbours_stay(self, countdown: str) -> None:
        assert fold_reminders(f"One.\n{countdown}Two.") == ("One.\nTwo.", countdown, "")

    @pytest.mark.parametrize(
        "text",
        ["", "Watch the token usage: it is 3 of 4.", "Token usage: low", "`Token usage: 1/2`", "<total_tokens>"],
    )
    def test_other_texts_are_returned_as_the_same_object(self, text: str) -> None:
        assert fold_reminders(text).kept is text

    def test_a_message_that_is_nothing_else_goes_and_users_words_stay(self) -> None:
        said = InputMessage("user", (ToolResultBlock("t", "Token usage: 1/2"), TextBlock("Token usage: 1/2")))
        done = normalize(request(None, said, InputMessage("system", "Token usage: 1/2")), {"fold-reminders"})
        assert done.request.messages == (said,)
        assert done.applied == (Applied("fold-reminders", "messages[1].content", "Token usage: 1/2"),)


class TestVolatile:
    @pytest.mark.parametrize(
        "line", ["Today's date: 2026-11-25\n", "- Date: 2026-11-25\n", "Today's date is 2026-11-25.\n", GIT]
    )
    def test_dates_and_git_status_are_cut(self, line: str) -> None:
        assert cut_volatile(f"Stable.\n{line}") == ("Stable.\n", line, "")

    @pytest.mark.parametrize("shape", ENVIRONMENTS)
    def test_the_date_and_the_folder_of_an_agents_environment_are_cut(self, shape: str) -> None:
        text, moved = ENVIRONMENTS[shape]
        kept, removed, unparsed = cut_volatile(text)
        assert (sorted(removed.splitlines()), unparsed) == (sorted(moved), "")
        assert kept.splitlines() == [line for line in text.splitlines() if line not in moved]

    @pytest.mark.parametrize("shape", ENVIRONMENTS)
    def test_two_days_in_two_folders_share_the_whole_system_text(self, shape: str) -> None:
        text, _ = ENVIRONMENTS[shape]
        other = text.replace("/home/a/project", "/srv/b").replace("2026", "2027").replace("Sat", "Sun")
        assert other != text
        assert cut_volatile(other).kept == cut_volatile(text).kept

    @pytest.mark.parametrize(
        "text",
        [
            "2. Date: use the format MM/DD/YYYY, such as 11/28/2026\n",
            "Working directory: where 12 commands run\n",
            "Current working directory: see below\n",
            "<env>\nWorking directory: /a\nis not closed\n",
            "Write <env> and </env> around it.\nWorking directory: /a\n",
        ],
    )
    def test_lines_that_only_look_like_an_environment_stay(self, text: str) -> None:
        assert cut_volatile(text).kept is text

    def test_many_openings_of_an_environment_take_linear_time(self) -> None:
        for text in ("<env>\n" * 200_000, "x <env>\n" * 200_000, "<env>\n" + "a\n" * 400_000):
            started = time.process_time()
            assert cut_volatile(text).kept is text
            assert time.process_time() - started < 2

    def test_git_status_ends_at_a_heading_or_tag(self) -> None:
        assert cut_volatile(f"{GIT}\n# Next\nStays").kept == "# Next\nStays"

    @pytest.mark.parametrize("text", ["Date handling is hard in 2026.", "Run git status first.", "Date: unknown"])
    def test_other_texts_are_returned_as_the_same_object(self, text: str) -> None:
        assert cut_volatile(text).kept is text

    def test_what_is_cut_stands_after_the_first_message_in_every_turn(self) -> None:
        system = (TextBlock("You are."), TextBlock(f"Stable.\n- Date: 2026-11-25\nMore.\n{GIT}"))
        later = (USER, InputMessage("assistant", "Hi"), InputMessage("user", "Go on"))
        turns = [normalize(request(system, *messages), {"volatile-last"}) for messages in ((USER,), later)]
        short, longer = (done.request for done in turns)
        moved = InputMessage("system", f"- Date: 2026-11-25\n{GIT}")
        assert short.system == longer.system == (TextBlock("You are."), TextBlock("Stable.\nMore.\n"))
        assert short.messages == (USER, moved)
        assert longer.messages == (USER, moved, *later[1:])
        assert [(note.rule, note.where) for note in turns[0].applied] == [("volatile-last", "system[1]")]

    def test_system_messages_stay_where_they_are(self) -> None:
        same = request("Stable.", USER, InputMessage("system", "- Date: 2026-11-25"))
        assert normalize(same, {"volatile-last"}).request is same


class TestRemindersLast:
    """A client's reminder stands in the user's last message only: it leaves the message before when it moves on."""

    REMINDER = TextBlock("<system-reminder>\nKeep the list up to date.\n</system-reminder>\n")
    RESULTS = tuple(ToolResultBlock(f"toolu_{n}", "one line of a file\n" * 40) for n in range(3))

    def session(self, turn: int) -> tuple[InputMessage, ...]:
        """The conversation up to the user's message number `turn`, with the reminder in that message alone."""
        messages: list[InputMessage] = [InputMessage("user", (self.REMINDER, TextBlock("Fix it.")))]
        for n in range(turn + 1):
            said = (self.RESULTS[n], TextBlock(f"Go on with {n}."))
            messages += [InputMessage("assistant", f"Step {n}."), InputMessage("user", said)]
        blocks = messages[-1].content
        return (*messages[:-1], InputMessage("user", (blocks[0], self.REMINDER, blocks[1])))  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["qwen3", "llama3.1", "mistral-v3"])
    def test_what_stands_beside_a_reminder_that_moves_stays_in_the_prefix(self, name: str) -> None:
        def texts(rules: set[str]) -> list[str]:
            asked = (normalize(request("S", *self.session(turn)), rules).request for turn in range(3))
            return [render_text(made, tokenizer_of(BY_NAME[name])) for made in asked]

        for rules, kept in (({"reminders-last"}, True), (set[str](), False)):
            for shorter, longer in pairwise(texts(rules)):
                after = shorter.removeprefix(common_start(shorter, longer))
                assert "Keep the list" in after
                assert ("Go on" not in after) == kept

    def test_a_message_is_the_same_with_any_reminders_place_in_it(self) -> None:
        said = (*self.RESULTS, TextBlock("Go."))
        answered = (USER, InputMessage("assistant", "A"))
        made = [
            normalize(
                request(None, *answered, InputMessage("user", (*said[:at], self.REMINDER, *said[at:]))),
                {"reminders-last"},
            )
            for at in range(5)
        ]
        assert {done.request.messages[-1].content for done in made} == {(*said, self.REMINDER)}
        assert [bool(done.applied) for done in made] == [True] * 4 + [False]
        assert made[0].applied == (Applied("reminders-last", "messages[2].content", ""),)

    def test_the_first_messages_and_other_texts_keep_their_order(self) -> None:
        """Projects share what stands before the first answer; a reminder beside words in a text stays with them."""
        first = InputMessage("user", (self.REMINDER, TextBlock("Q")))
        mixed = InputMessage("user", (TextBlock(f"{self.REMINDER.text}Now this."), TextBlock("Q")))
        plain = InputMessage("user", f"{self.REMINDER.text}Q")
        same = request(None, first, InputMessage("assistant", "A"), mixed, plain)
        assert normalize(same, {"reminders-last"}).request is same


class TestTools:
    def test_keys_of_schemas_are_sorted_at_every_depth_and_lists_are_not(self) -> None:
        schema = '{"type":"object","required":["b","a"],"properties":{"b":{"type":"string","enum":[2,1.0]},"a":{}}}'
        done = normalize(request(tools=(tool("Bash", schema),)), {"sort-schema-keys"})
        assert done.request.tools is not None
        assert json.dumps(done.request.tools[0].input_schema) == json.dumps(
            {
                "properties": {"a": {}, "b": {"enum": [2, 1.0], "type": "string"}},
                "required": ["b", "a"],
                "type": "object",
            }
        )
        assert done.applied == (Applied("sort-schema-keys", "tools", ""),)

    def test_sorted_tools_and_keys_are_left_alone(self) -> None:
        same = request(tools=(tool("A", '{"a": 1, "b": {"c": 2}}'), tool("B")))
        assert normalize(same, {"sort-schema-keys", "sort-tools"}).request is same

    def test_tools_are_sorted_by_name(self) -> None:
        done = normalize(request(tools=(tool("B"), tool("A"))), {"sort-tools"})
        assert done.request.tools == (tool("A"), tool("B"))
        assert done.applied == (Applied("sort-tools", "tools", ""),)

    def test_a_schema_that_nests_too_deeply_to_be_sorted_stays(self) -> None:
        deep: dict = {}
        for _ in range(100_000):
            deep = {"b": deep}
        same = request(tools=(Tool("A", deep),))
        assert normalize(same, {"sort-schema-keys"}).request is same


class TestToolsFirst:
    REQUEST = request("You are <s> an agent.", tools=(tool("Read"), tool("Edit")))

    @pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
    @pytest.mark.parametrize("render_history_with_template", [False, True])
    def test_the_same_words_stand_in_another_order(self, name: str, render_history_with_template: bool) -> None:
        tokenizer = tokenizer_of(BY_NAME[name])
        before, after = (
            "".join(prompt(self.REQUEST, tokenizer, None, render_history_with_template, first).segments)  # type: ignore[arg-type]
            for first in (False, True)
        )
        assert before.index("You are <s> an agent.") < before.index('"Read"') < before.index('"Edit"')
        assert after.index('"Read"') < after.index('"Edit"') < after.index("You are <s> an agent.")
        assert sorted(before) == sorted(after)
        assert before.partition("<|im_end|>")[2] == after.partition("<|im_end|>")[2]

    @pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "mistral-v3"])
    def test_another_system_text_leaves_the_tools_cached(self, name: str) -> None:
        tokenizer = tokenizer_of(BY_NAME[name])
        texts = ["You are an agent.", "I know you: an agent."]
        one, other = (
            prompt(request(text, tools=(tool("Read"), tool("Edit"))), tokenizer, tools_first=True) for text in texts
        )
        shared = int((one.tokens[: len(other.tokens)] == other.tokens[: len(one.tokens)]).argmin())
        assert "Edit" in tokenizer.hf.decode(one.tokens[:shared])

    def test_a_template_that_writes_them_elsewhere_is_not_asked_to(self) -> None:
        tokenizer = tokenizer_of(BY_NAME["llama3.1"])
        assert not tokenizer.template.tools_can_lead
        assert "leave it out" in (unrendered(tokenizer, {"tools-first", "sort-tools"}) or "")
        assert unrendered(tokenizer, {"sort-tools"}) is None
        with pytest.raises(InvalidRequest, match="expected the tools right after the system text"):
            prompt(self.REQUEST, tokenizer, tools_first=True)

    def test_it_is_reported_where_there_is_something_to_move(self) -> None:
        assert [note.rule for note in normalize(self.REQUEST, {"tools-first"}).applied] == ["tools-first"]
        for same in (request("You are."), request(tools=(tool("Read"),))):
            assert normalize(same, {"tools-first"}).request is same

    def test_without_tools_or_system_text_nothing_changes(self) -> None:
        tokenizer = tokenizer_of(BY_NAME["qwen2.5"])
        for asked in (request("You are."), request(tools=(tool("Read"),))):
            plain = render_text(asked, tokenizer)
            assert "".join(prompt(asked, tokenizer, tools_first=True).segments) == plain  # type: ignore[arg-type]


class TestChoice:
    def test_only_the_preamble_goes_by_default(self) -> None:
        assert parse_config(["--model", "m"]).rules == DEFAULT_RULES == {"strip-preamble"}

    @pytest.mark.parametrize(
        ("flags", "rules"),
        [
            (["--no-strip-anthropic-preamble"], set()),
            (["--normalize", "none"], set()),
            (["--normalize", "strip-preamble, sort-tools"], {"strip-preamble", "sort-tools"}),
            (["--normalize", "sort-tools"], {"sort-tools"}),
            (["--normalize", "strip-preamble,sort-tools", "--no-strip-anthropic-preamble"], {"sort-tools"}),
        ],
    )
    def test_flags_choose(self, flags: list[str], rules: set[str]) -> None:
        assert parse_config(["--model", "m", *flags]).rules == rules

    def test_an_unknown_rule_is_refused_by_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--model", "nowhere", "--normalize", "sort-tools,strip-all"])
        assert "--normalize: expected some of strip-preamble," in capsys.readouterr().err
        with pytest.raises(ValueError, match="got strip-all"):
            parse_rules("strip-all")

    def test_list_explains_every_rule_and_needs_no_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        for flags in (["--normalize", "list"], ["--model", "nowhere", "--normalize=list"]):
            with pytest.raises(SystemExit) as ended:
                main(flags)
            assert ended.value.code == 0
            shown = capsys.readouterr().out
            assert all(name in shown for name in RULES)
            assert all(rule.description and rule.reads for rule in RULES.values())


def test_rules_read_json_as_it_comes() -> None:
    body = {
        "model": "m",
        "system": [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": GIT}],
        "tools": [{"name": "b", "input_schema": {"type": "object", "a": 1}}, {"name": "a", "input_schema": {}}],
        "messages": [{"role": "user", "content": "Hi"}],
    }
    done = normalize(decode_count_tokens(json.dumps(body).encode()), RULES)
    assert [(note.rule, note.where) for note in done.applied] == [
        ("strip-preamble", "system[0]"),
        ("volatile-last", "system[1]"),
        ("sort-schema-keys", "tools"),
        ("sort-tools", "tools"),
    ]
    assert done.request.system is None
