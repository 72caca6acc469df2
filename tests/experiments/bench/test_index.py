"""The index's benchmark: a store that is filled to the given pages, and matches that end where a case says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.progress import Progress

from experiments.bench.index import Config, fill, main, time_growth, time_matches, tree_bytes

CONFIG = Config(page=16, prompt=640, shared_prefix=256, sessions=3, chunk=64, repeats=4)


def test_the_store_is_filled_to_the_pages_and_holds_the_prompts_that_are_matched() -> None:
    with Progress(disable=True) as progress:
        store, whole = fill(CONFIG, 300, progress)
    store.check()
    assert 300 <= store.stats().pages_cached < 300 + CONFIG.prompt // CONFIG.page
    assert len(whole) > 3
    assert all(store.peek(prompt) == CONFIG.prompt for prompt in whole)
    branches = sum(len(node.children) > 1 for node in store.tree.nodes())
    assert branches >= 4, "sessions share prefixes and branch"
    assert tree_bytes(store) > 300 * 4 * CONFIG.page


def test_matches_and_growth_leave_no_lease_behind() -> None:
    with Progress(disable=True) as progress:
        store, whole = fill(CONFIG, 300, progress)
    matches = time_matches(store, whole, CONFIG)
    assert {case: len(ms) for case, ms in matches.items()} == dict.fromkeys(CONFIG.cases, CONFIG.repeats)
    growth = time_growth(store, whole, CONFIG)
    assert all(len(ms) == CONFIG.repeats for ms in growth.values())
    assert store.stats().pages_evicted > 0
    assert not store.live
    store.check()


@pytest.mark.parametrize("case", ["25%", "50%", "75%"])
def test_quarters_end_with_a_page_and_the_middle_does_not(case) -> None:
    config = Config()
    assert config.cases[case] % config.page == 0
    assert config.cases["mid-page"] % config.page != 0


def test_the_command_writes_a_row_for_each_number_of_pages(tmp_path: Path) -> None:
    out = tmp_path / "index.json"
    main(["--pages", "200", "400", "--prompt", "4096", "--shared-prefix", "2048", "--repeats", "2", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [row["pages"] >= pages for row, pages in zip(result["rows"], (200, 400), strict=True)] == [True, True]
    assert result["goal"]["slowest_case_p99_ms"] > 0
