"""`python -m serve explain A.json B.json`: where a request stops matching the one before it, and in which text.

The files are captured requests of any of the three APIs. A file of a folder that holds none is named and left out, and
the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from serve.api.messages import CountTokensRequest, InvalidRequest
from serve.diagnosis.captures import read_file
from serve.diagnosis.causes import CAUSES
from serve.diagnosis.compare import Comparison, characters, compare, rule_sets
from serve.diagnosis.sections import CHARACTERS, vocabulary_of
from serve.prompt.render import Prompt, prompt
from serve.prompt.tokenizer import load_tokenizer
from serve.rules.normalize import parse_rules

Captured = tuple[Path, CountTokensRequest]
BAR = 20  # width in characters of the bar that shows how much matches
BAR_FROM = 120  # columns of a terminal, below which the names need the bar's place
PIPED = 10_000  # columns, where there is no terminal: as many as the names need


def read_files(paths: Sequence[Path]) -> tuple[list[Captured], list[str]]:
    """The requests in two files, or in a folder's .json files by name; and what is wrong with files of the folder.

    Raises ValueError for anything else, for one of two files that holds no request, and if less than two can be read.
    """
    if len(paths) == 1 and paths[0].is_dir():
        files = sorted(paths[0].glob("*.json"))
        if len(files) < 2:
            raise ValueError(f"{paths[0]}: expected two .json files or more, found {len(files)}")
        found, problems = [], []
        for path in files:
            try:
                found.append((path, read_file(path)))
            except ValueError as error:
                problems.append(str(error))
        if len(found) < 2:
            raise ValueError("\n".join([*problems, f"{paths[0]}: {len(found)} of {len(files)} files can be read"]))
        return found, problems
    if len(paths) != 2:
        raise ValueError(f"expected two files or one folder, got {' '.join(map(str, paths))}")
    return [(path, read_file(path)) for path in paths], []


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
    console, shown = Console(width=None if sys.stdout.isatty() else PIPED), []
    render, vocabulary, unit = characters, CHARACTERS, "characters"
    try:
        named = {args.normalize: parse_rules(args.normalize)} if args.normalize else rule_sets()
        captured, problems = read_files(args.paths)
        if args.model:
            tokenizer = load_tokenizer(args.model)
            vocabulary, unit = vocabulary_of(tokenizer.hf), "tokens"

            def render(request: CountTokensRequest, tools_first: bool) -> Prompt:
                return prompt(request, tokenizer, tools_first=tools_first)

        for (older, old), (newer, new) in pairwise(captured):
            comparisons = {name: compare(old, new, rules, render, vocabulary) for name, rules in named.items()}
            shown += print_comparisons(console, f"{older.name} -> {newer.name}, in {unit}", comparisons)
        if args.svg:
            save_picture(args.svg, shown)
    except (OSError, ValueError, InvalidRequest, RecursionError) as error:
        sys.exit(f"explain: {error}")
    if problems:
        sys.exit("\n".join(f"explain: left out {problem}" for problem in problems))


def print_comparisons(console: Any, title: str, comparisons: dict[str, Comparison]) -> list[Any]:
    """Print how far one request matches another, a row for each set of rules, and an explanation of each cause.

    Returns what was printed.
    """
    from rich.table import Table
    from rich.text import Text

    has_bar = console.width >= BAR_FROM
    table = Table()
    for name in ("rules", "matches", "of", "", *([""] if has_bar else []), "section", "cause", "there was", "and now"):
        number = name in ("matches", "of", "")
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for name, found in comparisons.items():
        if found.refused:
            measured = ["", "", "", *([""] if has_bar else [])]
            where = ["", "refused", "", found.refused]
        else:
            share = found.position / found.length if found.length else 1.0
            bar = ("█" * round(share * BAR)).ljust(BAR, "░")
            measured = [f"{found.position:,}", f"{found.length:,}", f"{share:.1%}", *([bar] if has_bar else [])]
            texts = (repr(text)[1:-1][:24] for text in (found.nearest_text, found.prompt_text))
            goes_on = "goes on" if found.position < found.length else "identical"
            where = [found.section, found.cause, *texts] if found.cause else ["", goes_on, "", ""]
        table.add_row(*map(Text, (name, *measured, *where)))
    causes = dict.fromkeys(found.cause for found in comparisons.values() if found.cause)
    lines = [Text(title), table, *(Text(f"{cause}: {CAUSES[cause]}") for cause in causes)]
    for line in lines:
        console.print(line, soft_wrap=line is not table)
    return lines


def save_picture(path: Path, shown: Sequence[Any]) -> None:
    """Write what was printed as an SVG picture, as wide as it needs to be."""
    from rich.console import Console

    unbounded = Console(width=PIPED)
    width = max(unbounded.measure(line).maximum for line in shown)
    picture = Console(width=width, record=True, file=StringIO())
    for line in shown:
        picture.print(line)
    picture.save_svg(str(path), title="tokenzero explain")
