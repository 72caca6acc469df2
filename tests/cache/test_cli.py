"""`python -m cache`: what its commands print, remove and refuse."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cache.__main__ import main
from cache.disk import DiskTier
from cache.lmdb_env import FORMAT, OLD_FORMATS, file_bytes
from cache.sizes import parse_bytes, show_bytes
from tests.helpers.storage_children import items, key_of, keys, page_of, right

MIB = 1 << 20


@pytest.fixture
def store(tmp_path) -> Path:
    tier = DiskTier(tmp_path / "store", 10 * MIB)
    for i in range(10):
        tier.put_many(items([i]))
    tier.close()
    return tmp_path / "store"


def damage(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff\x00\xff")


def test_the_module_runs_as_a_command(store):
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "cache", "ls", "--store", store],
        cwd=root, env=os.environ | {"COLUMNS": "100"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert all(key_of(i).hex()[:16] in run.stdout for i in range(10))


def test_ls_shows_the_most_recently_used_first_and_says_what_it_leaves_out(store, capsys):
    assert main(["ls", "--store", str(store), "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert out.index(key_of(9).hex()[:16]) < out.index(key_of(8).hex()[:16])
    assert key_of(7).hex()[:16] not in out
    assert "8 more" in out
    assert "ago" in out


def test_stats_shows_totals(store, capsys):
    assert main(["stats", "--store", str(store)]) == 0
    out = capsys.readouterr().out
    assert "10" in out
    assert show_bytes(sum(len(page_of(i)) for i in range(10))) in out


def test_verify_finds_a_damaged_page_and_fix_removes_it(store, capsys):
    assert main(["verify", "--store", str(store)]) == 0
    data = store / FORMAT / "data.mdb"
    damage(data, data.read_bytes().index(page_of(4)[1000:2000]))
    for _ in range(2):
        assert main(["verify", "--store", str(store)]) == 1
        assert "1 damaged" in capsys.readouterr().out
    assert main(["verify", "--store", str(store), "--fix"]) == 1
    assert main(["verify", "--store", str(store)]) == 0
    assert "9 pages read, 0 damaged" in capsys.readouterr().out
    tier = DiskTier(store, 10 * MIB)
    assert right(tier, range(10)) == [True] * 4 + [False] + [True] * 5
    tier.close()


def test_verify_finds_a_damaged_tree_leaves_it_and_deletes_it_with_fix(store, capsys):
    data = store / FORMAT / "data.mdb"
    for match in re.finditer(re.escape(key_of(3)), data.read_bytes()):
        damage(data, match.start() - 8)  # the header of the key's node, in old states of the tree too
    before = data.read_bytes()
    for command in ("ls", "stats", "verify"):
        assert main([command, "--store", str(store)]) == 2
        assert "verify --fix" in capsys.readouterr().err
    assert data.read_bytes() == before
    assert main(["verify", "--store", str(store), "--fix"]) == 1
    assert main(["verify", "--store", str(store)]) == 0


def test_prune_keeps_what_was_used_last(store, capsys):
    assert main(["prune", "--store", str(store), "--store-bytes", "150kB"]) == 0
    assert "pages evicted" in capsys.readouterr().out
    tier = DiskTier(store, 10 * MIB)
    there = tier.contains_many(keys(range(10)))
    assert there == sorted(there)
    assert 3 <= sum(there) <= 7
    assert tier.stats().bytes <= 150_000
    tier.close()


def test_prune_old_removes_stores_of_older_formats_and_says_how_large_they_were(store, capsys):
    (name,) = OLD_FORMATS
    (store / name).mkdir()
    old = DiskTier(store, 10 * MIB, name=name)
    old.put_many(items(range(3)))
    assert main(["prune", "--store", str(store), "--old"]) == 2, "it is in use"
    assert "in use" in capsys.readouterr().err
    old.close()
    size = file_bytes(store / name)
    (store / name / "notes.txt").write_text("mine")
    assert main(["prune", "--store", str(store), "--old"]) == 2
    assert "found notes.txt in it" in capsys.readouterr().err
    (store / name / "notes.txt").unlink()
    assert main(["prune", "--store", str(store), "--old"]) == 0
    assert f"{name} removed: {show_bytes(size)} ({size} bytes)" in capsys.readouterr().out
    assert not (store / name).exists()
    assert main(["prune", "--store", str(store), "--old"]) == 0
    assert "no store of an earlier format" in capsys.readouterr().out
    tier = DiskTier(store, 10 * MIB)
    assert all(right(tier, range(10)))
    tier.close()


def test_prune_says_what_it_wants(store, capsys):
    with pytest.raises(SystemExit):
        main(["prune", "--store", str(store)])
    assert "expected --store-bytes SIZE or --old" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ls", "--store", "DIR/none"], "found no tokenzero-pages-v2/data.mdb, expected a store"),
        (["ls", "--store", "s3://bucket/"], "expected a directory"),
        (["ls", "--store", "DIR/other"], "another program"),
    ],
)
def test_errors_say_what_was_found_and_what_to_do(store, arguments, expected, capsys):
    other = store.parent / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert main([a.replace("DIR", str(store.parent)) for a in arguments]) == 2
    assert expected in capsys.readouterr().err
    assert [p.name for p in other.iterdir()] == ["notes.txt"]
    assert not (store.parent / "none").exists()


def test_a_size_that_is_none_is_refused_by_the_name_of_its_flag(store, capsys):
    with pytest.raises(SystemExit):
        main(["prune", "--store", str(store), "--store-bytes", "much"])
    assert "--store-bytes: expected a size such as 4GB or 512MiB, got 'much'" in capsys.readouterr().err


def test_sizes_are_read_and_shown_in_units() -> None:
    assert [parse_bytes(t) for t in ("20GB", "1.5 KiB", "7", "2mib")] == [20 * 10**9, 1536, 7, 2 * MIB]
    assert [show_bytes(n) for n in (0, 1023, 1536, 20 * MIB)] == ["0 B", "1023 B", "1.5 KiB", "20.0 MiB"]
    for text in ("20 potatoes", "-1", "1e9", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size"):
            parse_bytes(text)
