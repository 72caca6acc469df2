"""The pages of the server and the proxy have the tables that the code makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.docs import BLOCK, PAGES, TABLES, with_tables


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_tables_of_a_page_are_current(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert page == with_tables(page), "run `python -m serve.docs`, which rewrites them"


def test_every_table_is_on_a_page() -> None:
    shown = [found["name"] for path in PAGES for found in BLOCK.finditer(path.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(TABLES)


def test_a_table_that_differs_is_replaced_and_the_text_around_it_stays() -> None:
    page = "Before.\n\n<!-- table causes -->\n| old |\n<!-- end -->\n\nAfter.\n"
    made = with_tables(page)
    assert "| old |" not in made
    assert "`preamble`" in made
    assert made.startswith("Before.\n")
    assert made.endswith("\nAfter.\n")
    assert with_tables(made) == made
