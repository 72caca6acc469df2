"""Where a client's prompts diverge, and what each rule repairs: `python -m experiments.stability`.

Two requests for each way in which coding agents are known to break their prefix, with the shape and size of real ones
and synthetic words. How far the second matches the first is counted in characters, as `python -m serve explain` does.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from experiments.workloads import sessions
from experiments.workloads.sessions import RELEASES, Session
from experiments.workloads.synthetic import Json, text_block
from serve.api.messages import decode_count_tokens
from serve.diagnosis.compare import Comparison, characters, compare
from serve.diagnosis.sections import CHARACTERS
from serve.rules.normalize import DEFAULT_RULES


@dataclass(frozen=True)
class Case:
    """Two requests, and the rule, in addition to the default ones, that repairs the difference between them."""

    old: Json
    new: Json
    rule: str | None = None


def cases(release: str) -> dict[str, Case]:
    """The known ways to diverge, as one client release has them."""
    one = Session(release=release, group="kin")
    other, there = replace(one, seed=1), replace(one, folder="/home/dev/another")
    base, later = sent(one), sent(one, turn=2)
    loaded = sessions.tools(replace(one, num_tools=len(base["tools"]) + 1, scale=one.scale))[-1]
    return {
        "fresh session, same prompt": Case(base, sent(one, number=1)),
        "same folder, other prompt": Case(base, other_task(sent(one, header_of=other))),
        "other folder, same prompt": Case(base, sent(there), "tools-first"),
        "next turn": Case(later, sent(one, turn=3, number=1)),
        "main agent, then sub-agent": Case(base, sub_agent(one)),
        "a tool is loaded midway": Case(
            later, later | {"tools": [*later["tools"][:6], loaded, *later["tools"][6:]]}
        ),
        "token countdown": Case(counting(base, 2500), counting(base, 5000), "fold-reminders"),
        "another day": Case(dated(base, 24), dated(base, 25), "volatile-last"),
        "a reminder moves on": Case(reminded(later), reminded(sent(one, turn=3)), "reminders-last"),
        "keys of schemas": Case(base, base | {"tools": [*map(reversed_keys, base["tools"])]}, "sort-schema-keys"),
        "order of tools": Case(base, base | {"tools": base["tools"][::-1]}, "sort-tools"),
    }  # fmt: skip


def sent(session: Session, turn: int = 0, number: int = 0, header_of: Session | None = None) -> Json:
    """A request of a session, with the header of request `number`."""
    return sessions.request(session, turn, header=sessions.session_header(header_of or session, number))


def other_task(body: Json) -> Json:
    """The body with another task in its first message."""
    first, *rest = body["messages"]
    content = first["content"]
    blocks = content if isinstance(content, list) else [text_block(content)]
    blocks = [*blocks[:-1], blocks[-1] | {"text": f"Something else. {blocks[-1]['text']}"}]
    return body | {"messages": [first | {"content": blocks}, *rest]}


def sub_agent(session: Session) -> Json:
    """A sub-agent's first request, with its own header and prompt and fewer tools."""
    body = sent(replace(session, seed=1, subagent=True))
    *others, prompt = body["system"]
    return body | {
        "system": [*others, prompt | {"text": f"You are a helper. {prompt['text']}"}],
        "tools": body["tools"][:4],
    }


def counting(body: Json, used: int) -> Json:
    """The body with a countdown at the start of its last system block."""
    *others, last = body["system"]
    return body | {"system": [*others, last | {"text": f"Token usage: {used}/200000\n{last['text']}"}]}


def dated(body: Json, day: int) -> Json:
    """The body with a date at the start of its last system block."""
    *others, last = body["system"]
    return body | {"system": [*others, last | {"text": f"Today's date: 2026-11-{day}\n{last['text']}"}]}


def reminded(body: Json) -> Json:
    """The body with a reminder at the start of its last message."""
    *others, last = body["messages"]
    content = last["content"]
    blocks = content if isinstance(content, list) else [text_block(content)]
    reminder = text_block("<system-reminder>\nKeep the list of tasks up to date.\n</system-reminder>")
    return body | {"messages": [*others, last | {"content": [reminder, *blocks]}]}


def reversed_keys(tool: Json) -> Json:
    """The tool with the keys of its schema in another order."""
    return tool | {"input_schema": dict(reversed(tool["input_schema"].items()))}


def compare_case(case: Case, rules: frozenset[str]) -> Comparison:
    """How far a case's second request matches its first under a set of rules."""
    old, new = (decode_count_tokens(json.dumps(body).encode()) for body in (case.old, case.new))
    return compare(old, new, rules, characters, CHARACTERS)


def table_cell(found: Comparison) -> str:
    """A comparison as a cell of the table."""
    if found.cause is None:
        return "all"
    return f"{found.position:,} ({found.position / found.length:.1%})\n{found.section}: {found.cause}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.stability", description=__doc__)
    parser.add_argument("--release", nargs="*", choices=list(RELEASES), default=["2.1.179", "2.1.331"])
    for release in parser.parse_args().release:
        table = Table("case", "characters", "as sent", "stripped", "with one more rule", title=release, show_lines=True)
        for name, case in cases(release).items():
            kept, stripped = compare_case(case, frozenset()), compare_case(case, DEFAULT_RULES)
            more = f"{case.rule}: {table_cell(compare_case(case, DEFAULT_RULES | {case.rule}))}" if case.rule else ""
            table.add_row(name, f"{kept.length:,}", table_cell(kept), table_cell(stripped), more)
        Console().print(table)


if __name__ == "__main__":
    main()
