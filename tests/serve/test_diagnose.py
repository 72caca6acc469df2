"""Where clients' prompts diverge, with and without each rule: the field's cases rebuilt from synthetic requests.

The cases and what is known of them are those measured on real clients: a fresh header in each request, one per session,
another task, another folder, the next turn, a sub-agent, a tool that is loaded midway.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import sessions
from experiments.sessions import Session
from serve.__main__ import main
from serve.diagnose import Outcome, characters, compare, rule_sets
from serve.messages import CountTokensRequest, decode_count_tokens
from serve.normalize import DEFAULT_RULES, RULES
from serve.render import Tokenizer, prompt
from serve.sections import CHARACTERS, vocabulary_of

Json = dict[str, Any]
NOTHING: frozenset[str] = frozenset()
TOOLS_FIRST = DEFAULT_RULES | {"tools-first"}
REORDERED = "tools reordered"
FRESH, FIXED = "2.1.179", "2.1.331"  # releases with a hash in the header that is new each time, and without one


def session(release: str, **more: Any) -> Session:
    return Session(release=release, kin="kin", **more)


def decoded(body: Json) -> CountTokensRequest:
    return decode_count_tokens(json.dumps(body).encode())


def outcome(old: Json, new: Json, rules: frozenset[str]) -> Outcome:
    """In characters; asserts that the position is the first difference, found the slow way."""
    found = compare(decoded(old), decoded(new), rules, characters, CHARACTERS)
    if not rules:
        texts = ["".join(map(chr, characters(decoded(body), False).tokens)) for body in (old, new)]
        first = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
        assert found.position == first
    return found


def sent(of: Session, turn: int = 0, number: int = 0, suffix_of: Session | None = None) -> Json:
    """A body with the header of the session's request `number`."""
    header = sessions.session_header(suffix_of or of, number)
    return sessions.request(of, turn, header=header)


def other_task(body: Json) -> Json:
    """The same with another first message."""
    first, *rest = body["messages"]
    blocks = first["content"] if isinstance(first["content"], list) else [sessions.text_block(first["content"])]
    blocks = [*blocks[:-1], blocks[-1] | {"text": "Something else. " + blocks[-1]["text"]}]
    return body | {"messages": [first | {"content": blocks}, *rest]}


def turned(tool: Json) -> Json:
    """The tool with the keys of its schema in another order."""
    return tool | {"input_schema": dict(reversed(tool["input_schema"].items()))}


def share(found: Outcome) -> float:
    return found.position / found.length


class TestDivergenceTable:
    def test_a_fresh_session_in_the_same_folder_with_the_same_prompt(self) -> None:
        for release, cause in ((FRESH, "preamble"), (FIXED, None)):
            old, new = (sent(session(release), number=number) for number in (0, 1))
            kept, stripped = outcome(old, new, NOTHING), outcome(old, new, DEFAULT_RULES)
            assert kept.cause == cause
            assert stripped.cause is None
            assert stripped.position == stripped.length
            if cause:
                assert kept.section == "system[0]"
                assert 70 < kept.position < 95, "the hash is at the header's end"

    @pytest.mark.parametrize("release", [FRESH, FIXED])
    def test_the_same_folder_with_another_prompt(self, release: str) -> None:
        old = sent(session(release))
        new = other_task(sent(session(release), suffix_of=session(release, seed=1)))
        kept, stripped = outcome(old, new, NOTHING), outcome(old, new, DEFAULT_RULES)
        assert (kept.cause, kept.section) == ("preamble", "system[0]")
        assert 40 < kept.position < 60, "the version's suffix is the session's"
        assert (stripped.section, stripped.cause) == ("messages[0] user", "first sight")
        assert share(stripped) > 0.75

    @pytest.mark.parametrize("release", [FRESH, FIXED])
    def test_another_folder_with_the_same_prompt(self, release: str) -> None:
        old, new = (sent(session(release, folder=folder)) for folder in ("/home/a/project", "/home/b/project"))
        kept, stripped = outcome(old, new, NOTHING), outcome(old, new, DEFAULT_RULES)
        assert kept.cause == "preamble"
        # The folder's name, a few thousand characters into the system text and ahead of all tools.
        assert (stripped.section, stripped.cause) == ("system[1]", "system changed")
        assert share(stripped) < 0.1
        repaired = outcome(old, new, TOOLS_FIRST)
        assert (repaired.section, repaired.cause) == ("system[1]", "system changed")
        assert share(repaired) > 0.65
        assert stripped.here.startswith("b/project")

    @pytest.mark.parametrize(("release", "kept_cause"), [(FRESH, "preamble"), (FIXED, None)])
    def test_the_next_turn_of_a_session(self, release: str, kept_cause: str | None) -> None:
        old, new = (sent(session(release), turn=number, number=number) for number in (2, 3))
        assert outcome(old, new, NOTHING).cause == kept_cause
        stripped = outcome(old, new, DEFAULT_RULES)
        assert stripped.cause is None
        assert share(stripped) > 0.9

    def test_a_main_agent_and_then_its_sub_agent(self) -> None:
        main_agent, sub_agent = session(FIXED), session(FIXED, subagent=True, seed=1)
        old, new = sent(main_agent), sent(sub_agent)
        new["system"][2] = new["system"][2] | {"text": f"You are a helper. {new['system'][2]['text']}"}
        kept, stripped = outcome(old, new, NOTHING), outcome(old, new, DEFAULT_RULES)
        assert (kept.cause, kept.section) == ("preamble", "system[0]")
        assert 40 < kept.position < 60
        assert (stripped.cause, stripped.section) == ("system changed", "system[1]")

    def test_a_tool_that_is_loaded_midway(self) -> None:
        old = sent(session(FIXED), turn=2)
        loaded = sessions.tools(replace(session(FIXED), num_tools=13))[-1]
        new = old | {"tools": [*old["tools"][:6], loaded, *old["tools"][6:]]}
        found = outcome(old, new, NOTHING)
        assert (found.cause, found.section) == ("tools changed", f"tools[6] {loaded['name']}")
        assert outcome(old, new, DEFAULT_RULES).section == found.section


class TestEachRule:
    """One cause that each rule is for: what broke before it, and that nothing does with it."""

    BASE = sent(session(FIXED))

    @pytest.mark.parametrize(
        ("rule", "change", "cause"),
        [
            ("strip-preamble", lambda b, n: sessions.with_header(b, f"{sessions.HEADER} cch={n};"), "preamble"),
            (
                "fold-reminders",
                lambda b, n: b | {"system": [sessions.text_block(f"Token usage: {n}/9\nYou are."), *b["system"]]},
                "system changed",
            ),
            ("sort-schema-keys", lambda b, n: b | {"tools": [turned(t) if n else t for t in b["tools"]]}, REORDERED),
            ("sort-tools", lambda b, n: b | {"tools": b["tools"][:: 1 - 2 * n]}, REORDERED),
        ],
    )  # fmt: skip
    def test_it_makes_two_requests_one(self, rule: str, change: Callable[[Json, int], Json], cause: str) -> None:
        old, new = (change(self.BASE, number) for number in (0, 1))
        assert outcome(old, new, NOTHING).cause == cause
        others = frozenset(RULES) - {rule, "tools-first"}
        assert outcome(old, new, others).cause is not None, "no other rule repairs it"
        assert outcome(old, new, frozenset({rule})) == Outcome(*2 * (outcome(old, old, frozenset({rule})).length,))

    def test_volatile_last_moves_the_date_behind_the_tools(self) -> None:
        old, new = (
            self.BASE | {"system": [sessions.text_block(f"You are.\nToday's date: 2026-11-2{n}\nBe brief.")]}
            for n in (1, 2)
        )
        before, after = (outcome(old, new, rules) for rules in (NOTHING, frozenset({"volatile-last"})))
        assert (before.section, before.cause) == ("system[0]", "system changed")
        assert after.section == "messages[1] system"
        assert before.position < 40
        assert share(after) > 0.7

    def test_tools_first_leaves_the_tools_in_front_of_a_changed_system_text(self, tokenizer: Tokenizer) -> None:
        small = [sent(session(FIXED, folder=folder, scale=0.05)) for folder in ("/home/a", "/home/b")]
        old, new = map(decoded, small)
        vocabulary = vocabulary_of(tokenizer.hf)
        before, after = (
            compare(old, new, rules, lambda asked, first: prompt(asked, tokenizer, tools_first=first), vocabulary)
            for rules in (DEFAULT_RULES, TOOLS_FIRST)
        )
        assert (before.section, after.section) == ("system[1]", "system[1]")
        assert share(before) < 0.25
        assert share(after) > 2 * share(before)


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path: Path) -> list[str]:
        paths = []
        for turn in range(3):
            body = sent(session(FRESH, scale=0.05), turn, number=turn)
            path = tmp_path / f"{turn}.json"
            # As a body, and as a capture that holds it.
            path.write_text(json.dumps(body if turn != 1 else {"path": "/v1/messages", "body": body}))
            paths.append(str(path))
        return paths

    @pytest.fixture(autouse=True)
    def _wide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")

    def test_two_files_give_a_row_for_each_set_of_rules(
        self, files: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        main(["explain", *files[:2]])
        shown = capsys.readouterr().out
        assert "0.json -> 1.json, in characters" in shown
        rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.startswith("│")}
        assert set(rows) == set(rule_sets())
        assert "preamble" in rows["none"]
        assert "system[0]" in rows["none"]
        assert "goes on" in rows["strip-preamble"]
        assert "preamble: a billing header" in shown

    def test_a_folder_is_compared_file_by_file(self, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        main(["explain", str(Path(files[0]).parent), "--normalize", "none"])
        shown = capsys.readouterr().out
        assert "0.json -> 1.json" in shown
        assert "1.json -> 2.json" in shown
        assert shown.count("system[0]") == 2

    def test_with_a_model_positions_are_tokens(
        self, files: list[str], model_folder: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main(["explain", *files[:2], "--model", str(model_folder), "--normalize", "strip-preamble"])
        shown = capsys.readouterr().out
        assert "in tokens" in shown
        assert "goes on" in shown

    @pytest.mark.parametrize(
        ("content", "problem"), [("{", "a.json: expected the body"), ('{"model": "m"}', "messages: field required")]
    )
    def test_a_file_that_is_no_request_is_named(self, content: str, problem: str, tmp_path: Path) -> None:
        for name in ("a.json", "b.json"):
            (tmp_path / name).write_text(content)
        for paths in ([str(tmp_path)], [str(tmp_path / "a.json"), str(tmp_path / "b.json")]):
            with pytest.raises(SystemExit, match=problem):
                main(["explain", *paths])

    def test_one_file_an_empty_folder_and_no_file_are_refused(self, files: list[str], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for paths, problem in (
            ([files[0]], "expected two files or one folder"),
            ([str(tmp_path / "empty")], "expected two .json files or more, found 0"),
            ([files[0], str(tmp_path / "none.json")], "none.json: expected the body"),
            ([*files[:2], "--normalize", "all"], "expected some of strip-preamble"),
        ):
            with pytest.raises(SystemExit, match=problem):
                main(["explain", *paths])
