"""Where clients' prompts diverge, with and without each rule: the field's cases rebuilt from synthetic requests."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from experiments.stability import Case, cases, compare_case, sent
from experiments.workloads.sessions import Session
from serve.__main__ import main
from serve.api.messages import CountTokensRequest, decode_count_tokens
from serve.diagnosis.compare import Comparison, characters, compare, rule_sets
from serve.diagnosis.sections import vocabulary_of
from serve.prompt.render import prompt
from serve.prompt.tokenizer import Tokenizer
from serve.rules.normalize import DEFAULT_RULES, RULES

NOTHING: frozenset[str] = frozenset()
FRESH, FIXED = "2.1.179", "2.1.331"  # releases with a hash in the header that is new each time, and without one
CASES = {release: cases(release) for release in (FRESH, FIXED)}


def decoded(body: dict) -> CountTokensRequest:
    return decode_count_tokens(json.dumps(body).encode())


def share(found: Comparison) -> float:
    return found.position / found.length


def kept_and_stripped(case: Case) -> tuple[Comparison, Comparison]:
    """As sent and by default; asserts that the position is the first difference, found the slow way."""
    kept = compare_case(case, NOTHING)
    texts = ["".join(map(chr, characters(decoded(body), False).tokens)) for body in (case.old, case.new)]
    first = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    assert kept.position == first
    return kept, compare_case(case, DEFAULT_RULES)


class TestDivergenceTable:
    """What was measured on the real clients of these releases, in the same order and with the same causes."""

    @pytest.mark.parametrize(("release", "cause"), [(FRESH, "preamble"), (FIXED, None)])
    def test_a_fresh_session_in_the_same_folder_with_the_same_prompt(self, release: str, cause: str | None) -> None:
        kept, stripped = kept_and_stripped(CASES[release]["fresh session, same prompt"])
        assert kept.cause == cause
        assert (stripped.cause, stripped.position) == (None, stripped.length)
        if cause:
            assert kept.section == "system[0]"
            assert 70 < kept.position < 90, "the hash is at the header's end"

    @pytest.mark.parametrize("release", [FRESH, FIXED])
    def test_the_same_folder_with_another_prompt(self, release: str) -> None:
        kept, stripped = kept_and_stripped(CASES[release]["same folder, other prompt"])
        assert (kept.cause, kept.section) == ("preamble", "system[0]")
        assert 40 < kept.position < 55, "the version's suffix is the session's"
        assert (stripped.section, stripped.cause) == ("messages[0] user", "new_content")
        assert share(stripped) == pytest.approx({FRESH: 0.93, FIXED: 0.81}[release], abs=0.03)

    @pytest.mark.parametrize("release", [FRESH, FIXED])
    def test_another_folder_with_the_same_prompt(self, release: str) -> None:
        case = CASES[release]["other folder, same prompt"]
        kept, stripped = kept_and_stripped(case)
        assert kept.cause == "preamble"
        # The folder's name, a few thousand characters into the system text and ahead of all tools.
        assert (stripped.section, stripped.cause) == ("system[1]", "system_changed")
        assert share(stripped) == pytest.approx({FRESH: 0.027, FIXED: 0.08}[release], abs=0.04)
        repaired = compare_case(case, DEFAULT_RULES | {"tools-first"})
        assert (repaired.section, repaired.cause) == ("system[1]", "system_changed")
        assert share(repaired) == pytest.approx({FRESH: 0.88, FIXED: 0.73}[release], abs=0.03)

    @pytest.mark.parametrize(("release", "cause"), [(FRESH, "preamble"), (FIXED, None)])
    def test_the_next_turn_of_a_session(self, release: str, cause: str | None) -> None:
        kept, stripped = kept_and_stripped(CASES[release]["next turn"])
        assert kept.cause == cause
        assert stripped.cause is None
        assert share(stripped) > 0.9

    def test_a_main_agent_and_then_its_sub_agent(self) -> None:
        kept, stripped = kept_and_stripped(CASES[FIXED]["main agent, then sub-agent"])
        assert (kept.cause, kept.section) == ("preamble", "system[0]")
        assert 40 < kept.position < 55
        assert (stripped.cause, stripped.section) == ("system_changed", "system[1]")
        assert 60 < stripped.position < 80

    def test_a_tool_that_is_loaded_midway(self) -> None:
        case = CASES[FIXED]["a tool is loaded midway"]
        loaded = case.new["tools"][6]["name"]
        for found in kept_and_stripped(case):
            assert (found.cause, found.section) == ("tools_changed", f"tools[6] {loaded}")
            assert 0.3 < share(found) < 0.7


class TestEachRule:
    @pytest.mark.parametrize(
        ("name", "rule", "cause"),
        [
            ("fresh session, same prompt", "strip-preamble", "preamble"),
            ("token countdown", "fold-reminders", "system_changed"),
            ("keys of schemas", "sort-schema-keys", "tools_reordered"),
            ("order of tools", "sort-tools", "tools_reordered"),
        ],
    )
    def test_it_makes_two_requests_one_and_no_other_rule_does(self, name: str, rule: str, cause: str) -> None:
        case = CASES[FRESH][name]
        assert compare_case(case, NOTHING).cause == cause
        assert compare_case(case, frozenset(RULES) - {rule}).cause is not None
        repaired = compare_case(case, frozenset({rule}))
        assert (repaired.cause, repaired.position) == (None, repaired.length)

    @pytest.mark.parametrize("release", [FRESH, FIXED])
    def test_volatile_last_moves_the_date_after_the_tools(self, release: str) -> None:
        case = CASES[release]["another day"]
        before, after = (compare_case(case, rules) for rules in (DEFAULT_RULES, DEFAULT_RULES | {"volatile-last"}))
        assert (before.section, before.cause) == ("system[1]", "system_changed")
        assert after.section == "messages[1] system"
        assert share(before) < 0.01
        assert share(after) > 0.8

    def test_tools_first_leaves_the_tools_before_a_changed_system_text(self, tokenizer: Tokenizer) -> None:
        old, new = (
            decoded(sent(Session(release=FIXED, group="kin", folder=f, scale=0.05))) for f in ("/home/a", "/home/b")
        )
        before, after = (
            compare(
                old,
                new,
                rules,
                lambda asked, first: prompt(asked, tokenizer, tools_first=first),
                vocabulary_of(tokenizer.hf),
            )
            for rules in (DEFAULT_RULES, DEFAULT_RULES | {"tools-first"})
        )
        assert (before.section, after.section) == ("system[1]", "system[1]")
        assert share(before) < 0.25
        assert share(after) > 2 * share(before)


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path: Path) -> list[str]:
        paths = []
        for turn in range(3):
            body = sent(Session(release=FRESH, scale=0.05), turn, number=turn)
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

    def test_a_picture_shows_the_same(self, files: list[str], tmp_path: Path) -> None:
        main(["explain", *files[:2], "--svg", str(tmp_path / "why.svg")])
        drawn = ElementTree.parse(tmp_path / "why.svg").getroot()
        assert drawn.tag.endswith("svg")
        assert "preamble" in "".join(drawn.itertext())

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
