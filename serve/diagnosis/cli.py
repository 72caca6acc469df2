"""`python -m serve explain A.json B.json`: where a request stops matching the one before it, and in which text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from serve.api.messages import CountTokensRequest, InvalidRequest, decode_count_tokens
from serve.diagnosis.causes import CAUSES
from serve.diagnosis.compare import Comparison, characters, compare, rule_sets
from serve.diagnosis.sections import CHARACTERS, vocabulary_of
from serve.prompt.render import Prompt, prompt
from serve.prompt.tokenizer import load_tokenizer
from serve.rules.normalize import parse_rules

BAR = 20  # width in characters of the bar that shows how much matches


def read_request(path: Path) -> CountTokensRequest:
    """The request in a file: its body, or an object with a field `body`. Raises ValueError, which names the file."""
    try:
        content = path.read_bytes()
        value: Any = msgspec.json.decode(content)
        inner = value.get("body") if isinstance(value, dict) else None
        if inner is not None and "messages" not in value:
            content = inner.encode() if isinstance(inner, str) else msgspec.json.encode(inner)
        return decode_count_tokens(content)
    except (InvalidRequest, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the body of a POST /v1/messages: {error}") from error


def request_pairs(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The two files, or each .json file of a folder with the next one by name. Raises ValueError for anything else."""
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
    cli.add_argument("paths", nargs="+", type=Path, metavar="FILE", help="two captured requests, or a folder of them")
    cli.add_argument(
        "--model", metavar="DIR", help="checkpoint folder, to count tokens of its tokenizer (default: characters)"
    )
    cli.add_argument("--normalize", metavar="RULES", help="comma-separated rules (default: compare several sets)")
    cli.add_argument("--svg", type=Path, metavar="FILE", help="also write the tables as an SVG picture")
    args = cli.parse_args(argv)
    console = Console(record=args.svg is not None)
    render, vocabulary, unit = characters, CHARACTERS, "characters"
    try:
        named = {args.normalize: parse_rules(args.normalize)} if args.normalize else rule_sets()
        requests = [
            (older, newer, read_request(older), read_request(newer)) for older, newer in request_pairs(args.paths)
        ]
        if args.model:
            tokenizer = load_tokenizer(args.model)
            vocabulary, unit = vocabulary_of(tokenizer.hf), "tokens"

            def render(request: CountTokensRequest, tools_first: bool) -> Prompt:
                return prompt(request, tokenizer, tools_first=tools_first)

        for older, newer, old, new in requests:
            comparisons = {name: compare(old, new, rules, render, vocabulary) for name, rules in named.items()}
            print_comparisons(console, f"{older.name} -> {newer.name}, in {unit}", comparisons)
        if args.svg:
            console.save_svg(str(args.svg), title="tokenzero explain")
    except (OSError, ValueError, InvalidRequest, RecursionError) as error:
        sys.exit(f"explain: {error}")


def print_comparisons(console: Any, title: str, comparisons: dict[str, Comparison]) -> None:
    """Print how far one request matches another, a row for each set of rules, and an explanation of each cause."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("rules", "matches", "of", "", "", "section", "cause", "there was", "and now", title=title)
    for column in table.columns[1:4]:
        column.justify = "right"
    for name, found in comparisons.items():
        if found.refused:
            table.add_row(name, "", "", "", "", "", "refused", "", escape(found.refused))
            continue
        share = found.position / found.length if found.length else 1.0
        bar = ("█" * round(share * BAR)).ljust(BAR, "░")
        where = [
            found.section,
            found.cause,
            *(repr(text)[1:-1][:24] for text in (found.nearest_text, found.prompt_text)),
        ]
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
    for cause in dict.fromkeys(found.cause for found in comparisons.values() if found.cause):
        console.print(f"{cause}: {CAUSES[cause]}")
