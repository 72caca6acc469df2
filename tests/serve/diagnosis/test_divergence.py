"""The divergence report: the position, section and cause of every way in which a prompt is known to miss the cache."""

from __future__ import annotations

import copy
import json
import logging
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from serve.api.answers import Diagnostics, MessagesChanged, PreviousMessageNotFound, SystemChanged, ToolsChanged
from serve.api.messages import decode_count_tokens
from serve.diagnosis.causes import CAUSES
from serve.diagnosis.divergence import (
    MAX_LISTED_RULES,
    MAX_SECTION_CHARS,
    REMEMBERED,
    Divergences,
    EncodedRequest,
    RememberedRequest,
    Report,
    nearest,
    report_line,
)
from serve.diagnosis.sections import vocabulary_of
from serve.prompt.render import prompt
from serve.prompt.replay import RecordedAnswer
from serve.prompt.tokenizer import Tokenizer, make_tokenizer
from serve.rules.normalize import normalize
from tests.helpers.http import BILLING, text_block
from tests.helpers.model_families import FAMILIES, tokenizer_of

Json = dict[str, Any]
PAGE = 32
QWEN3 = tokenizer_of(next(family for family in FAMILIES if family.name == "qwen3"))
VOCABULARY = vocabulary_of(QWEN3.hf)
TOOLS = [
    {"name": name, "description": f"{name}s.", "input_schema": {"type": "object", "properties": {"path": {}}}}
    for name in ("Read", "Edit", "Bash")
]
OTHER_KEYS = TOOLS[1] | {"input_schema": {"properties": {"path": {}}, "type": "object"}}
SYSTEM = [text_block("You are an agent that works from a terminal."), text_block("Work in /home/a.\nBe brief.")]


def body(*said: str, system: Any = SYSTEM, tools: Any = TOOLS, **more: Any) -> Json:
    """A conversation: the user first, then the model, and so on."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said or ("Hi",))]
    return {"model": "m", "system": system, "tools": tools, "messages": messages} | more


class Server:
    """A cache that never forgets, unless it is told so, and the reports on what is asked of it."""

    def __init__(self, rules: Sequence[str] = (), tokenizer: Tokenizer = QWEN3, **options: Any) -> None:
        self.rules, self.tokenizer = rules, tokenizer
        self.divergences = Divergences(VOCABULARY, PAGE, lambda start, stop: (stop - start) / 1000, **options)
        self.number = 0

    def seen(
        self, asked: Json, recalled: Any = None, model: str = "weights", salt: bytes = b"", key: str = ""
    ) -> RememberedRequest:
        request = normalize(decode_count_tokens(json.dumps(asked).encode()), self.rules).request
        made = prompt(request, self.tokenizer, recalled, tools_first="tools-first" in self.rules)
        self.number += 1
        return RememberedRequest(f"msg_{self.number}", request, made, made.tokens, model, salt, key)

    def ask(self, asked: Json, answer: str | None = None, reused: int | None = None, **how: Any) -> Report:
        new = self.seen(asked, **how)
        if reused is None:
            own = [
                seen
                for seen in self.divergences.remembered.values()
                if (seen.model, seen.scope) == (new.model, new.scope)
            ]
            reused = min(nearest(new.tokens, own)[1], len(new.tokens) - 1)
        report = self.divergences.started(new, {"device": reused})
        if answer is not None:
            self.divergences.answered(new.id, self.tokenizer.encode(answer))
        return report


class TestCauses:
    @pytest.mark.parametrize(
        ("before", "after", "cause", "section"),
        [
            (
                body(system=[text_block(BILLING.format(1)), *SYSTEM]),
                body(system=[text_block(BILLING.format(2)), *SYSTEM]),
                "preamble",
                "system[0]",
            ),
            (
                body(system=f"{BILLING.format(1)}\nYou are."),
                body(system=f"{BILLING.format(2)}\nYou are."),
                "preamble",
                "system",
            ),
            (body(system=[text_block(BILLING.format(1)), *SYSTEM]), body(), "preamble", "system[0]"),
            (
                body(system=f"{BILLING.format(1)}\nYou are."),
                body(system=f"{BILLING.format(1)}\nYou were."),
                "system_changed",
                "system",
            ),
            (
                body(),
                body(system=[SYSTEM[0], text_block("Work in /home/b.\nBe brief.")]),
                "system_changed",
                "system[1]",
            ),
            (body(), body(system=[*SYSTEM, text_block("Git: dirty")]), "system_changed", "system[2]"),
            (body(), body(tools=[TOOLS[0], TOOLS[2], TOOLS[1]]), "tools_reordered", "tools[1] Bash"),
            (
                body(),
                body(
                    tools=[
                        TOOLS[0],
                        {**TOOLS[1], "input_schema": {"properties": {"path": {}}, "type": "object"}},
                        TOOLS[2],
                    ]
                ),
                "tools_reordered",
                "tools[1] Edit",
            ),
            (body(), body(tools=[TOOLS[0], TOOLS[0] | {"name": "New"}, *TOOLS[1:]]), "tools_changed", "tools[1] New"),
            (body(), body(tools=[*TOOLS, TOOLS[0] | {"name": "New"}]), "tools_changed", "tools[3] New"),
            (body(), body(tools=None), "tools_changed", "tools"),
            (body("A", "B", "C"), body("A", "B", "C?", "D", "E"), "history_edited", "messages[2] user"),
            (
                body("A", "B", "C", "D", "E"),
                body("A2", "B", "C", "D", "E", "F", "G"),
                "history_edited",
                "messages[0] user",
            ),
            (body("A", "B", "C"), body("A", "Other", "C"), "history_edited", "messages[1] assistant"),
            (body("Hello, you"), body("Hello, there"), "new_content", "messages[0] user"),
            (body("Hello, you"), body("Good day", "Hi", "What now?"), "new_content", "messages[0] user"),
            (body("A", "B", "C"), body("A", "B", "D"), "new_content", "messages[2] user"),
        ],
    )
    def test_the_report_names_cause_and_section(self, before: Json, after: Json, cause: str, section: str) -> None:
        server = Server()
        assert server.ask(before).cause == "new_content"
        report = server.ask(after)
        assert (report.cause, report.section) == (cause, section)
        first, second = (seen.tokens for seen in server.divergences.remembered.values())
        assert report.position < min(len(first), len(second))
        assert (first[: report.position] == second[: report.position]).all()
        assert first[report.position] != second[report.position]
        assert report.prompt_text.startswith(VOCABULARY.text(second[report.position : report.position + 1]))
        assert report.nearest == "msg_1"

    def test_every_cause_has_an_explanation_and_a_test(self) -> None:
        parametrized = {
            "preamble",
            "system_changed",
            "tools_reordered",
            "tools_changed",
            "history_edited",
            "new_content",
        }
        assert parametrized | {
            "below_page_size",
            "evicted",
            "no_longer_tracked",
            "model_changed",
            "settings_changed",
        } == set(CAUSES)

    def test_evicted(self) -> None:
        server = Server()
        server.ask(body("A" * 300))
        report = server.ask(body("A" * 300), reused=5)
        assert (report.cause, report.position) == ("evicted", 5)
        assert report.lost_tokens == report.prompt_tokens - 1 - 5

    def test_a_short_head_that_was_evicted_does_not_hide_what_broke_the_rest(self) -> None:
        server = Server()
        server.ask(body(system=[text_block(BILLING.format(1)), *SYSTEM]))
        shared = server.ask(body(system=[text_block(BILLING.format(2)), *SYSTEM])).position
        report = server.ask(body(system=[text_block(BILLING.format(3)), *SYSTEM]), reused=shared - 5)
        assert (report.cause, report.position) == ("preamble", shared)
        assert report.lost_tokens == report.prompt_tokens - 1 - (shared - 5)

    @pytest.mark.parametrize(("agent", "cause"), [("Once there was.", "new_content"), ("You review code.", "preamble")])
    def test_another_agents_header_is_no_cause(self, agent: str, cause: str) -> None:
        server = Server()
        server.ask(body(system=f"{BILLING.format(1)}\nYou review code."))
        assert server.ask(body(system=f"{BILLING.format(2)}\n{agent}")).cause == cause

    @pytest.mark.parametrize(("owner", "other"), [({"salt": b"a"}, {"salt": b"b"}), ({"key": "a"}, {"key": "b"})])
    def test_a_sequence_of_another_salt_or_key_is_as_if_it_were_not_there(
        self, owner: dict[str, Any], other: dict[str, Any]
    ) -> None:
        server, alone = Server(), Server()
        server.ask(body("A" * 300), **owner)
        for text in ("A" * 300, "A" * 299 + "B", "A" * 10, "C"):
            report, unaware = (each.ask(body(text), **other) for each in (server, alone))
            assert report.nearest != "msg_1"
            same = {"id": "", "time": 0.0, "nearest": None}
            assert msgspec.structs.replace(report, **same) == msgspec.structs.replace(unaware, **same), text
        assert server.ask(body("A" * 300), **owner).cause is None

    def test_a_message_of_another_key_is_unknown_to_diagnostics(self) -> None:
        server = Server()
        server.ask(body("A" * 300), key="a")
        for key, found in (("a", False), ("b", True)):
            diagnostics = server.divergences.diagnose(server.seen(body("A" * 300), key=key), "msg_1", 0)
            assert isinstance(diagnostics and diagnostics.cache_miss_reason, PreviousMessageNotFound) is found

    def test_a_key_is_shown_its_own_requests_and_no_others(self) -> None:
        server = Server()
        mine, other = server.ask(body("mine"), key="a"), server.ask(body("other"), key="b")
        divergences = server.divergences
        assert [report.id for report in divergences.latest("a")] == [mine.id]
        assert [report.key for report in divergences.latest()] == ["b", "a"]
        assert divergences.find_report(other.id, "a") is None
        assert divergences.find_report(mine.id, "a")
        assert divergences.find_report(other.id)

    def test_another_model(self) -> None:
        server = Server()
        server.ask(body(), model="a")
        assert server.ask(body(), model="b").cause == "model_changed"

    def test_too_short(self) -> None:
        report = Server().ask({"model": "m", "messages": [{"role": "user", "content": "Hi"}]})
        assert report.prompt_tokens <= PAGE
        assert (report.cause, report.lost_tokens) == ("below_page_size", 0)

    def test_the_same_words_rendered_for_thinking(self) -> None:
        hf = copy.deepcopy(QWEN3.hf)
        hf.chat_template = "{{- 'Reasoning: ' ~ enable_thinking ~ '\\n' -}}" + hf.chat_template
        server = Server(tokenizer=make_tokenizer(hf))
        server.ask(body("A", "B", "C"))
        report = server.ask(body("A", "B", "C", thinking={"type": "adaptive"}))
        assert (report.cause, report.section, report.prompt_text[:4]) == ("settings_changed", "template", "True")

    def test_a_conversation_that_is_taken_up_earlier_has_lost_nothing(self) -> None:
        server = Server()
        server.ask(body("A", "B", "C"))
        assert server.ask(body("A")).cause == "new_content"

    def test_a_conversation_that_goes_on_misses_nothing(self) -> None:
        server = Server()
        assert server.ask(body("A"), answer="B").cause == "new_content"
        thought = "<think>\n\n</think>\n\n"
        recalled = [RecordedAnswer(thought, QWEN3.encode("B"))]
        report = server.ask(body("A", "B", "C"), recalled=recalled)
        assert (report.cause, report.section, report.lost_tokens) == (None, None, 0)
        assert report.position == len(server.divergences.remembered.values()[0].tokens) == report.reused_tokens

    def test_an_answer_that_comes_back_in_other_tokens_is_an_edit(self) -> None:
        server = Server()
        server.ask(body("A"), answer="a b  c")
        report = server.ask(body("A", "a b c", "C"))
        assert (report.cause, report.section) == ("history_edited", "messages[1] assistant")

    def test_asking_the_same_again_misses_nothing(self) -> None:
        server = Server()
        server.ask(body())
        report = server.ask(body())
        assert (report.cause, report.position) == (None, report.prompt_tokens)

    def test_a_hoisted_system_message_breaks_at_the_head(self) -> None:
        server = Server()
        server.ask(body("A", "B", "C"))
        hoisted = body("A", "B", "C", "D", "E", system=[*SYSTEM, text_block("Token usage: 5000/200000")])
        assert server.ask(hoisted).cause == "system_changed"

    def test_a_store_that_knows_more_than_the_report_remembers(self) -> None:
        report = Server().ask(body("A" * 200), reused=40)
        assert (report.cause, report.position, report.lost_tokens) == ("no_longer_tracked", 40, 0)


class TestReport:
    def test_what_was_lost_is_what_the_nearest_sequence_held(self) -> None:
        server = Server()
        server.ask(body(system=[text_block(BILLING.format(1)), *SYSTEM]))
        report = server.ask(body(system=[text_block(BILLING.format(2)), *SYSTEM]))
        assert report.lost_tokens == report.prompt_tokens - 1 - report.position
        assert report.recomputed_tokens == report.prompt_tokens - report.reused_tokens
        assert report.lost_ms == report.lost_tokens  # a millisecond each, see `Server`

    def test_no_milliseconds_where_nothing_was_measured(self) -> None:
        divergences = Divergences(VOCABULARY, PAGE)
        for text in ("One", "Two"):
            report = divergences.started(Server().seen(body(system=text)), {"device": 0})
        assert report.lost_ms is None

    def test_text_can_be_hidden_from_reports_and_is_in_no_log(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        for show in (True, False):
            caplog.clear()
            server = Server(show_prompt_text=show)
            server.ask(body(system="A secret: swordfish"))
            report = server.ask(body(system="A secret: kingfisher"))
            assert "fish" not in caplog.text
            shown = msgspec.json.encode(server.divergences.latest()).decode()
            assert ("fisher" in shown) is ("swordfish"[:4] in shown) is show
            assert report.cause == "system_changed"
            line = report_line(report)
            assert "system_changed" in line
            assert "fish" not in line
            assert "\n" not in line

    def test_memory_is_bounded(self) -> None:
        server = Server()
        for number in range(REMEMBERED + 5):
            server.ask(body(f"{number}"))
        assert len(server.divergences.remembered) == REMEMBERED
        forgotten, sections = server.divergences.find_report("msg_1")  # type: ignore[misc]
        assert (forgotten.id, sections) == ("msg_1", None)
        assert server.divergences.find_report("msg_x") is None
        assert [report.id for report in server.divergences.latest()][:2] == [
            f"msg_{REMEMBERED + 5}",
            f"msg_{REMEMBERED + 4}",
        ]

    def test_memory_is_bounded_in_bytes_and_not_by_what_reading_a_request_takes(self) -> None:
        most = 200_000
        server = Server(most_bytes=most)
        tracemalloc.start()
        try:
            for number in range(12):
                server.ask(body(f"{number}", tools=[{"name": "t", "input_schema": {"a": [[]] * 2000}}]))
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert 2 <= len(server.divergences.remembered) < 12
        assert server.divergences.remembered.bytes <= most
        assert held < 3 * most, "read, each of them takes 112 kB more"

    def test_a_report_is_small_whatever_the_request(self) -> None:
        server = Server()
        server.ask(body(tools=[TOOLS[0] | {"name": "N" * 10_000}, *TOOLS]))
        new = server.seen(body(tools=[TOOLS[0] | {"name": "N" * 10_000 + "O"}, *TOOLS]))
        made = server.divergences.started(new, {"device": 0}, tuple(f"strip-preamble {n}" for n in range(1000)))
        assert len(made.section or "") <= MAX_SECTION_CHARS
        assert len(made.rules) == MAX_LISTED_RULES
        assert server.divergences.reports.bytes < 10_000

    def test_sections_of_a_remembered_request(self) -> None:
        server = Server()
        report = server.ask(body())
        _, ranges = server.divergences.find_report(report.id)  # type: ignore[misc]
        assert [name for name, _, _ in ranges or ()] == [
            "template", "system[0]", "system[1]", "tools[0] Read", "tools[1] Edit", "tools[2] Bash", "messages[0] user",
        ]  # fmt: skip

    def test_the_nearest_is_the_latest_of_the_longest_matches(self) -> None:
        server = Server()
        kept = EncodedRequest.encode(server.seen(body()))
        seen = [replace(kept, tokens=np.asarray(t, np.int32)) for t in ([1, 2], [1, 2, 3], [1, 2, 3], [9])]
        assert nearest(np.asarray([1, 2, 3, 4], np.int32), seen) == (seen[2], 3)
        assert nearest(np.asarray([5], np.int32), seen) == (None, 0)
        assert nearest(np.asarray([], np.int32), seen) == (None, 0)


class TestDiagnostics:
    @pytest.mark.parametrize(
        ("after", "reason"),
        [
            (body(system="You were."), SystemChanged),
            (body(tools=TOOLS[::-1]), ToolsChanged),
            (body("A", "B2", "C", "D", "E"), MessagesChanged),
        ],
    )
    def test_the_part_that_changed(self, after: Json, reason: type) -> None:
        server = Server()
        before = server.ask(body("A", "B", "C"))
        new = server.seen(after)
        shared = nearest(new.tokens, server.divergences.remembered.values())[1]
        missed = min(before.prompt_tokens, len(new.tokens) - 1) - shared
        assert server.divergences.diagnose(new, before.id, shared) == Diagnostics(reason(missed))

    def test_nothing_missed_is_null_and_an_unknown_message_is_reported(self) -> None:
        server = Server()
        before = server.ask(body("A"))
        new = server.seen(body("A", "B", "C"))
        assert server.divergences.diagnose(new, None, 0) is None
        assert server.divergences.diagnose(server.seen(body("A")), before.id, before.prompt_tokens - 1) is None
        assert server.divergences.diagnose(new, "msg_x", 0) == Diagnostics(PreviousMessageNotFound())
