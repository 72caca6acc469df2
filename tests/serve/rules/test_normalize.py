import re
import re._parser as regex_parser
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.api.messages import CountTokensRequest, InputMessage, MessagesRequest, TextBlock, ToolResultBlock
from serve.api.tools import Tool
from serve.rules import normalize as module
from serve.rules.normalize import RULES, Applied, Unparsed, normalize, strip_preamble

NAME = "x-anthropic-billing-header"
PROMPT = "You are Claude Code, an interactive CLI tool.\nMODE=strict; be brief"
HEADER = f"{NAME}: cc_version=2.1.179.471; cc_entrypoint=sdk-cli; cch=5d157;"
USER = InputMessage("user", "Hello")

FIELDS_IN_THE_FIELD = [
    "cc_version=2.1.331.471; cc_entrypoint=sdk-cli;",
    "cc_version=2.1.197.a0f; cc_entrypoint=cli;",
    "cc_version=2.1.179.471; cc_entrypoint=sdk-cli; cch=5d157;",
    "cc_version=2.1.114.471; cc_entrypoint=cli; cch=a5145;",
    "cc_version=2.1.80.471; cc_entrypoint=sdk-cli; cch=00000;",
    "cc_version=2.1.179.3fe; cc_entrypoint=cli; cch=0b0b0; cc_is_subagent=true;",
    "cc_version=2.1.331.3fe; cc_entrypoint=sdk-ts; cc_is_subagent=true;",
    "cc_version=2.1.331.471; cc_entrypoint=cli; cc_workload=cron; cc_prompt_id=9f1c-22; cc_prev_req=req_011C/x+y.z;",
    "cc_version=2.1.331.471; cc_workload=; cch=5d157;",
    "cc_version=0.2.93; cch=abc123def456==;",
    "cc_version=0.2.93; cch=abc123def456;",
    "cch=1",
    "cc_version=2.1.331.471; cch=5d157",
    "cc_version=2.1.331.471;  cc_entrypoint=cli;\tcch=5d157;",
]
NAMES = [NAME, NAME.upper(), "X-Anthropic-Billing-Header", f" \n\t{NAME}"]


def request(system: object = None, *messages: InputMessage) -> MessagesRequest:
    return MessagesRequest(model="m", max_tokens=1, system=system, messages=messages or (USER,))  # type: ignore[arg-type]


def blocks(*texts: str) -> tuple[TextBlock, ...]:
    return tuple(TextBlock(text) for text in texts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fields", FIELDS_IN_THE_FIELD)
@pytest.mark.parametrize("rest", ["\n" + PROMPT, "\r\n" + PROMPT, " \n" + PROMPT, "\n\n  " + PROMPT, "", "\n", "  "])
def test_every_variant_seen_in_the_field_is_stripped_and_the_prompt_stays(name: str, fields: str, rest: str) -> None:
    header = f"{name}: {fields}"
    kept = re.sub(r"^[ \t]*(\r?\n)?", "", rest)
    assert strip_preamble(header + rest) == (kept, (header + rest).removesuffix(kept), "")


@pytest.mark.parametrize("fields", [fields for fields in FIELDS_IN_THE_FIELD if fields.endswith(";")])
@pytest.mark.parametrize("space", ["", " ", "\t", "   "])
@pytest.mark.parametrize(
    "prompt", [PROMPT, "You are x=1; ok", "let a=b; c=d;", "# x=1;", "=1;", "日本語=1;", "; x", "1=2;"]
)
def test_a_prompt_on_the_line_of_the_header_stays_whole(fields: str, space: str, prompt: str) -> None:
    assert strip_preamble(f"{NAME}: {fields}{space}{prompt}") == (prompt, f"{NAME}: {fields}{space}", "")


@pytest.mark.parametrize("colon", [":", ": ", ":\t"])
def test_whitespace_between_name_and_fields_may_be_missing(colon: str) -> None:
    assert strip_preamble(f"{NAME}{colon}cch=1;\n{PROMPT}").kept == PROMPT


def test_a_prompt_on_the_next_line_may_look_like_a_field() -> None:
    assert strip_preamble(f"{NAME}: cch=1;\ncch=2; x").kept == "cch=2; x"


def test_headers_in_sequence_go_together() -> None:
    twice = f"{HEADER}\n{NAME}: cch=2;{NAME}: cch=3; cch=4\n\n{HEADER}\n"
    assert strip_preamble(twice + PROMPT) == (PROMPT, twice, "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        PROMPT,
        f"A line first\n{HEADER}\n{PROMPT}",
        f"> {HEADER}",
        f"`{HEADER}`",
        "x-anthropic-billing-header-v2: cch=1;\n",
        "x-anthropic-billing-headers: cch=1;\n",
        "x-anthropic-billing: cch=1;\n",
        "anthropic-billing-header: cch=1;\n",
        "x-openai-billing-header: cch=1;\n",
        "x-anthropic-b\u0131ll\u0131ng-header: cch=1;\n",
        "cc_version=2.1; cch=1;\n",
    ],
)
def test_other_texts_are_returned_as_the_same_object(text: str) -> None:
    edit = strip_preamble(text)
    assert edit == (text, "", "")
    assert edit.kept is text


@pytest.mark.parametrize(
    "rest",
    [
        "",
        ":",
        ":\n",
        ": \ncch=1;",
        ": cch",
        ": cch;",
        ": =1;",
        ": 1=1;",
        ": cch =1;",
        ": cch= 1;",
        ": cch=1 You",
        ": cch=a b;",
        ": cch=a b; cch=2;\nYou",
        ": cch=1, cch=2;",
        ": ; cch=1;",
        ": {json: 1}",
        " : cch=1;",
        "=1;",
        # A later field that is none: what follows may be the header's or the prompt's, so nothing is cut.
        ": cch=1; note=a b; cch=2;\nYou",
        ": cch=1;cch=2;\nYou",
        ": cch=1; PATH=/bin is set",
    ],
)
def test_a_header_of_another_shape_stays_and_is_reported(rest: str) -> None:
    text = f"{NAME}{rest}"
    edit = strip_preamble(text)
    assert edit == (text, "", text.split("\n")[0].strip())
    assert edit.kept is text


def test_what_is_reported_of_a_long_line_is_short() -> None:
    assert len(strip_preamble(f"{NAME}: {'a' * 10_000}").unparsed) <= 300


def test_a_broken_header_after_a_good_one_is_reported() -> None:
    assert strip_preamble(f"{HEADER}\n{NAME}: new\nYou") == (f"{NAME}: new\nYou", f"{HEADER}\n", f"{NAME}: new")


keys = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,8}", fullmatch=True)
values = st.from_regex(r"[A-Za-z0-9=/+._-]{0,12}", fullmatch=True)
fields = st.lists(st.builds("{}={}".format, keys, values), min_size=1, max_size=6).map("; ".join)
names = st.sampled_from(NAMES)
headers = st.builds("{}: {}{}".format, names, fields, st.sampled_from([";", ""]))
like_headers = st.builds("{}{}".format, names, st.text(alphabet="abc=; :\n\r\t1" + NAME))
texts = st.text() | like_headers | st.builds("{}{}".format, headers, st.text(alphabet="ab=; \n\r") | st.text())


def is_like_header(text: str) -> bool:
    return text.lstrip().lower().startswith(NAME)


@given(headers, st.sampled_from(["\n", "\r\n"]), st.text().filter(lambda text: not is_like_header(text)))
def test_stripping_a_header_line_gives_exactly_the_prompt(header: str, line_break: str, prompt: str) -> None:
    assert strip_preamble(header + line_break + prompt) == (prompt, header + line_break, "")


@given(
    headers, st.text(alphabet=st.characters(min_codepoint=33)).filter(lambda text: not re.match(r"\s|[\w-]+=", text))
)
def test_stripping_a_header_on_the_line_of_the_prompt_gives_exactly_the_prompt(header: str, prompt: str) -> None:
    header = header.removesuffix(";") + ";"
    assert is_like_header(prompt) or strip_preamble(header + prompt).kept == prompt


@given(texts)
def test_stripping_is_idempotent_and_loses_nothing(text: str) -> None:
    edit = strip_preamble(text)
    assert edit.removed + edit.kept == text
    assert strip_preamble(edit.kept) == (edit.kept, "", edit.unparsed)


@given(st.text())
def test_texts_without_the_name_in_front_are_identical(text: str) -> None:
    assert is_like_header(text) or strip_preamble(text).kept is text


@given(st.lists(keys, min_size=1, max_size=5), st.data(), st.text())
def test_requests_that_differ_only_in_header_values_become_equal(
    keys: list[str], data: st.DataObject, rest: str
) -> None:
    def draw() -> MessagesRequest:
        header = f"{NAME}: " + "".join(f"{key}={data.draw(values)}; " for key in keys) + "\n"
        return request(blocks(header, rest), USER, InputMessage("system", header + rest))

    first, second = (normalize(draw(), RULES.keys()) for _ in range(2))
    assert first.request == second.request


def repeats(pattern: object) -> Iterator[tuple[object, int]]:
    """Every repeat of a parsed pattern, wherever it is nested: its kind and its greatest count."""
    if isinstance(pattern, regex_parser.SubPattern | list | tuple):
        match tuple(pattern):
            case (regex_parser.MAX_REPEAT | regex_parser.MIN_REPEAT | regex_parser.POSSESSIVE_REPEAT) as kind, (
                _,
                n,
                _,
            ):
                yield kind, n
        for part in pattern:
            yield from repeats(part)


@pytest.mark.parametrize("pattern", [module._HEADER, module._LIKE_HEADER])
def test_no_repeat_of_the_patterns_can_be_taken_back(pattern: re.Pattern[str]) -> None:
    kinds = {kind for kind, _ in repeats(regex_parser.parse(pattern.pattern))}
    assert kinds == {regex_parser.POSSESSIVE_REPEAT}


@pytest.mark.parametrize(
    "text",
    [
        " " * 1_000_000,
        f"{NAME}:" + " " * 1_000_000,
        f"{NAME}: " + "a" * 1_000_000,
        f"{NAME}: cch=" + "=" * 1_000_000 + " x",
        f"{NAME}: " + "a=1; " * 200_000 + "a=1 x",
        f"{NAME}: " + "a=1;" * 250_000,
        f"{NAME}: a=1;" + "b-" * 500_000,
        f"{NAME}: a=1" + " " * 1_000_000 + "x",
    ],
)
def test_a_megabyte_of_bad_luck_is_read_once(text: str) -> None:
    edit = strip_preamble(text)
    assert edit.removed + edit.kept == text


def test_a_megabyte_of_headers_is_stripped() -> None:
    assert strip_preamble(f"{HEADER}\n" * 12_000 + PROMPT).kept == PROMPT


def test_rules_name_and_describe_what_they_do() -> None:
    assert "strip-preamble" in RULES
    assert all(rule.description for rule in RULES.values())


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected some of strip-preamble, .* or none, got strip-everything"):
        normalize(request(), ("strip-everything",))


def test_no_rules_change_nothing() -> None:
    same = request(HEADER)
    assert normalize(same, ()).request is same


@pytest.mark.parametrize(
    ("system", "kept", "where"),
    [
        (f"{HEADER}\n{PROMPT}", PROMPT, "system"),
        (HEADER, None, "system"),
        (blocks(HEADER), None, "system[0]"),
        (blocks(HEADER, "You are", PROMPT), blocks("You are", PROMPT), "system[0]"),
        (blocks(HEADER + PROMPT, "more"), blocks(PROMPT, "more"), "system[0]"),
        (blocks("You are", HEADER), blocks("You are"), "system[1]"),
        (blocks("", HEADER), blocks(""), "system[1]"),
    ],
)
def test_system_is_stripped_in_all_its_forms(system: object, kept: object, where: str) -> None:
    done = normalize(request(system), {"strip-preamble"})
    assert done.request == request(kept)
    assert [(note.rule, note.where) for note in done.applied] == [("strip-preamble", where)]
    assert done.unparsed == ()


def test_system_messages_are_stripped_where_they_stand() -> None:
    messages = (
        USER,
        InputMessage("system", f"{HEADER}\nOne"),
        InputMessage("system", HEADER),
        InputMessage("system", blocks(HEADER)),
        InputMessage("system", blocks("Two", HEADER, f"{HEADER} Three")),
    )
    done = normalize(request(None, *messages), {"strip-preamble"})
    assert done.request.messages == (
        USER,
        InputMessage("system", "One"),
        InputMessage("system", blocks("Two", "Three")),
    )
    assert done.applied == (
        Applied("strip-preamble", "messages[1].content", f"{HEADER}\n"),
        Applied("strip-preamble", "messages[2].content", HEADER),
        Applied("strip-preamble", "messages[3].content[0]", HEADER),
        Applied("strip-preamble", "messages[4].content[1]", HEADER),
        Applied("strip-preamble", "messages[4].content[2]", f"{HEADER} "),
    )


@pytest.mark.parametrize("content", [HEADER, blocks(HEADER)])
def test_one_message_always_stays(content: str) -> None:
    done = normalize(request(None, InputMessage("system", content)), {"strip-preamble"})
    assert done.request.messages == (InputMessage("system", ""),)


def test_only_system_texts_are_touched() -> None:
    same = MessagesRequest(
        model="m",
        max_tokens=1,
        system=f"The server strips {HEADER}",
        messages=(
            InputMessage("user", HEADER),
            InputMessage("assistant", blocks(HEADER)),
            InputMessage("user", (ToolResultBlock("toolu_1", HEADER), TextBlock(HEADER))),
            InputMessage("system", (ToolResultBlock("toolu_1", HEADER),)),
            InputMessage("system", ""),
        ),
        tools=(Tool(name="t", description=HEADER, input_schema={"description": HEADER}),),
    )
    done = normalize(same, {"strip-preamble"})
    assert done.request is same
    assert (done.applied, done.unparsed) == ((), ())


def test_unchanged_parts_of_a_changed_request_are_shared() -> None:
    stable = TextBlock(PROMPT)
    before = request((TextBlock(HEADER), stable), USER, InputMessage("system", PROMPT))
    after = normalize(before, {"strip-preamble"}).request
    assert after.system[0] is stable
    assert all(new is old for new, old in zip(after.messages, before.messages, strict=True))


def test_an_unparsed_header_leaves_the_request_and_says_where_it_was() -> None:
    same = request(blocks(PROMPT, f"{NAME}: v2\n{PROMPT}"))
    done = normalize(same, {"strip-preamble"})
    assert done.request is same
    assert done.unparsed == (Unparsed("strip-preamble", "system[1]", f"{NAME}: v2"),)


def test_requests_to_count_tokens_are_normalized_alike() -> None:
    counted = CountTokensRequest(model="m", messages=(USER,), system=f"{HEADER}\n{PROMPT}")
    stripped = CountTokensRequest(model="m", messages=(USER,), system=PROMPT)
    assert normalize(counted, {"strip-preamble"}).request == stripped
