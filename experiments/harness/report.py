"""How results are printed and written: tables for a terminal, JSON files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def make_table(columns: Iterable[str], words: Collection[str] = (), no_wrap: bool = False, **options: Any) -> Table:
    """An empty table with these columns: those in `words` are left-aligned, the others hold numbers.

    `options` are those of `rich.table.Table`.
    """
    table = Table(box=SIMPLE_HEAD, **options)
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right", no_wrap=no_wrap)
    return table


def write_json(path: Path, result: Any, indent: int | None = 2) -> None:
    """Write a result; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=indent) + "\n", encoding="utf-8")
