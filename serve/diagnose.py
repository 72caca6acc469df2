"""`python -m serve explain A.json B.json`: where a request stops matching the one before it, under each set of rules.

No server and no model is needed. With a checkpoint's tokenizer positions are tokens of the prompt that would be
computed; without one they are characters of system texts, tools and messages in that order, which is the order of most
chat templates (with the rule tools-first: tools, system texts, messages).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cache.index import common_prefix
from serve.divergence import CAUSES, Seen, difference, sections_of
from serve.messages import Block, CountTokensRequest, InvalidRequest, ToolUseBlock, decode_count_tokens
from serve.normalize import DEFAULT_RULES, RULES, normalize, parse_rules
from serve.render import Prompt, load_tokenizer, prompt
from serve.sections import CHARACTERS, Vocabulary, message_parts, said, system_parts, vocabulary_of
from serve.turns import blocks, tool_definitions

BAR = 20  # characters of the bar that shows how much matches

Render = Callable[[CountTokensRequest, bool], Prompt]  # the flag: tools ahead of the system text


@dataclass(frozen=True)
class Outcome:
    """How far a request matches the one before it. `cause` is None where it only goes on."""

    position: int = 0
    length: int = 0
    section: str = ""
    cause: str | None = None
    here: str = ""
    there: str = ""
    refused: str = ""  # why the chat template cannot render it so; then nothing else is known


def rule_sets() -> dict[str, frozenset[str]]:
    """The sets of rules that are compared, by name: none, the default, one more at a time, all."""
    more = {f"+ {name}": DEFAULT_RULES | {name} for name in RULES if name not in DEFAULT_RULES}
    return {"none": frozenset(), ", ".join(sorted(DEFAULT_RULES)): DEFAULT_RULES, **more, "all": frozenset(RULES)}


def compare(
    old: CountTokensRequest, new: CountTokensRequest, rules: frozenset[str], render: Render, vocabulary: Vocabulary
) -> Outcome:
    """How far `new` matches `old` once the rules are applied to both."""
    before, after = (normalize(request, rules).request for request in (old, new))
    try:
        was, now = (seen(request, render(request, "tools-first" in rules)) for request in (before, after))
    except InvalidRequest as error:
        return Outcome(refused=str(error))
    shared, length = common_prefix(now.tokens, was.tokens), len(now.tokens)
    # The start of an answer is no part of what was said.
    opening = len(was.prompt.opening.encode()) if was.prompt.opening else 0
    if shared == length or shared >= len(was.tokens) - (opening if extends(after, before) else 0):
        return Outcome(shared, length)
    found = difference(now, was, shared, sections_of(now, vocabulary))
    return Outcome(shared, length, found.section, found.cause, found.here, found.there)


def seen(request: CountTokensRequest, made: Prompt) -> Seen:
    """A request of a file; here a model is what it is called."""
    return Seen("", request, made, made.tokens, request.model)


def extends(new: CountTokensRequest, old: CountTokensRequest) -> bool:
    """Whether the new request has the old one's messages, and more behind them."""
    same = all(blocks(a) == blocks(b) for a, b in zip(new.messages, old.messages, strict=False))
    return same and len(new.messages) > len(old.messages)


def characters(request: CountTokensRequest, tools_first: bool) -> Prompt:
    """A request as plain text, each character a token."""
    system = [text for _, text in system_parts(request)]
    tools = [json.dumps(tool, ensure_ascii=False) for tool in tool_definitions(request) or ()]
    frame = [*tools, *system] if tools_first else [*system, *tools]
    text = "\n\n".join([*frame, *(written(block) for _, block in message_parts(request))])
    tokens = np.frombuffer(text.encode("utf-32-le", "replace"), np.int32)
    return Prompt((text,), tokens, (len(tokens),), None, np.zeros(0, np.int32), False)


def written(block: Block) -> str:
    """A block as plain text."""
    if isinstance(block, ToolUseBlock):
        return json.dumps({"name": block.name, "arguments": block.input}, ensure_ascii=False)
    return said(block)


def read(path: Path) -> CountTokensRequest:
    """A captured request: its body, or an object that has it as `body`. Raises ValueError that names the file."""
    try:
        content = path.read_bytes()
        value: Any = msgspec.json.decode(content)
        inner = value.get("body") if isinstance(value, dict) else None
        if inner is not None and "messages" not in value:
            content = inner.encode() if isinstance(inner, str) else msgspec.json.encode(inner)
        return decode_count_tokens(content)
    except (InvalidRequest, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the body of a POST /v1/messages: {error}") from error


def pairs(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Two files, or each file of a folder with the next one, by name. Raises ValueError for anything else."""
    if len(paths) == 1 and paths[0].is_dir():
        files = sorted(paths[0].glob("*.json"))
        if len(files) < 2:
            raise ValueError(f"{paths[0]}: expected two .json files or more, found {len(files)}")
        return list(pairwise(files))
    if len(paths) != 2:
        raise ValueError(f"expected two files or one folder, got {' '.join(map(str, paths))}")
    return [(paths[0], paths[1])]


def main(argv: Sequence[str]) -> None:
    """The command line."""
    from rich.console import Console

    cli = argparse.ArgumentParser(prog="python -m serve explain", description=__doc__)
    cli.add_argument("paths", nargs="+", type=Path, metavar="FILE", help="two requests, or a folder of them")
    cli.add_argument("--model", metavar="DIR", help="checkpoint whose tokenizer counts (default: characters)")
    cli.add_argument("--normalize", metavar="RULES", help="one set of rules, comma-separated (default: compare many)")
    cli.add_argument("--picture", type=Path, metavar="FILE", help="write the tables as an SVG picture, too")
    args = cli.parse_args(argv)
    console = Console(record=args.picture is not None)
    render, vocabulary, unit = characters, CHARACTERS, "characters"
    try:
        named = {args.normalize: parse_rules(args.normalize)} if args.normalize else rule_sets()
        requests = [(older, newer, read(older), read(newer)) for older, newer in pairs(args.paths)]
        if args.model:
            tokenizer = load_tokenizer(args.model)
            vocabulary, unit = vocabulary_of(tokenizer.hf), "tokens"

            def render(request: CountTokensRequest, tools_first: bool) -> Prompt:
                return prompt(request, tokenizer, tools_first=tools_first)

        for older, newer, old, new in requests:
            outcomes = {name: compare(old, new, rules, render, vocabulary) for name, rules in named.items()}
            show(console, f"{older.name} -> {newer.name}, in {unit}", outcomes)
        if args.picture:
            console.save_svg(str(args.picture), title="tokenzero explain")
    except (OSError, ValueError, InvalidRequest, RecursionError) as error:
        sys.exit(f"explain: {error}")


def show(console: Any, title: str, outcomes: dict[str, Outcome]) -> None:
    """Print how far one request matches another, a row for each set of rules, and what the causes mean."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("rules", "matches", "of", "", "", "section", "cause", "there was", "and now", title=title)
    for column in table.columns[1:4]:
        column.justify = "right"
    for name, found in outcomes.items():
        if found.refused:
            table.add_row(name, "", "", "", "", "", "refused", "", escape(found.refused))
            continue
        share = found.position / found.length if found.length else 1.0
        bar = ("█" * round(share * BAR)).ljust(BAR, "░")
        where = [found.section, found.cause, *(repr(text)[1:-1][:24] for text in (found.there, found.here))]
        matches = ["", "goes on" if found.position < found.length else "identical", "", ""]
        cells = [escape(cell or "") for cell in (where if found.cause else matches)]
        table.add_row(
            name,
            f"{found.position:,}",
            f"{found.length:,}",
            f"{share:.1%}",
            bar,
            *(escape(cell or "") for cell in cells),
        )
    console.print(table)
    for cause in dict.fromkeys(found.cause for found in outcomes.values() if found.cause):
        console.print(f"{cause}: {CAUSES[cause]}")
