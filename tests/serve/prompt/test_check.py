"""What is reported of a chat template when a server starts."""

from __future__ import annotations

import logging

import pytest

from serve.prompt.check import check_template
from serve.server.loading import report_template
from tests.helpers.model_families import FAMILIES, Family, tokenizer_of
from tests.serve.prompt.test_head_forms import PROMPT, SHAPES, TURNS, tokenizer_with

HERMES = '{# <tool_call> {"arguments" #}'
OFFERS_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + TURNS + PROMPT


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_nothing_is_reported_of_the_main_families(family: Family) -> None:
    assert check_template(tokenizer_of(family)) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_reported_of_a_template_that_replays(shape: str) -> None:
    assert check_template(tokenizer_with(SHAPES[shape])) == []


def test_calls_that_no_format_reads_are_reported_with_the_flag_that_helps() -> None:
    (finding,) = check_template(tokenizer_with(OFFERS_TOOLS))
    assert "tool calls of this model arrive as text" in finding
    assert "--tool-parser NAME" in finding
    assert "hermes" in finding
    assert check_template(tokenizer_with(TURNS + PROMPT)) == []


def test_a_template_that_changes_its_answers_is_reported_with_what_follows() -> None:
    counts = HERMES + OFFERS_TOOLS.replace(
        "{{ m.content }}", "{{ loop.length if m.role == 'assistant' }}{{ m.content }}"
    )
    (finding,) = check_template(tokenizer_with(counts))
    assert finding.startswith("all requests: earlier answers are computed again with every request (expected ")


def test_a_template_that_changes_its_head_is_reported_with_what_follows() -> None:
    counts = HERMES + OFFERS_TOOLS.replace(
        "{{ m.content }}", "{{ m.content }}{{ loop.length if m.role != 'assistant' }}"
    )
    (finding,) = check_template(tokenizer_with(counts))
    assert finding.startswith("all requests: earlier answers are computed again with every request (expected ")


@pytest.mark.parametrize(
    ("condition", "requests"),
    [
        ("tools", "requests with tools"),
        ("not tools", "requests without tools"),
        ("tools and messages[0].role != 'system'", "requests with tools and without a system text"),
    ],
)
def test_requests_that_a_template_refuses_are_reported_by_their_head(condition: str, requests: str) -> None:
    refuses = HERMES + "{% if " + condition + " %}{{ raise_exception('No.') }}{% endif %}" + OFFERS_TOOLS
    (finding,) = check_template(tokenizer_with(refuses))
    assert finding == f"{requests}: conversations are refused (No.)"


def test_a_template_that_writes_the_time_of_day_is_reported_and_one_with_the_date_is_not() -> None:
    clock = HERMES + "{{ strftime_now('FORM') }}" + OFFERS_TOOLS
    findings = check_template(tokenizer_with(clock.replace("FORM", "%Y-%m-%d %H:%M:%S")))
    # Where a second passes between two of the conversations that are rendered, they differ, too.
    assert any("time of day" in finding for finding in findings)
    assert check_template(tokenizer_with(clock.replace("FORM", "%d %B %Y"))) == []


def test_the_log_names_the_checkpoint_once_for_each_finding(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report_template("models/mine", tokenizer_with(OFFERS_TOOLS))
    (record,) = caplog.records
    assert record.getMessage().startswith("chat template of models/mine: no known format reads its tool calls")
