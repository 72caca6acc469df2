"""What `make` installs: pinned packages with the hashes of their files, of the versions of constraints.txt."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = sorted(FOLDER.glob("*.txt"))
PINNED = re.compile(r"([a-z0-9._-]+)==(\S+)(?: ; (.+?))?")


def blocks(path: Path) -> list[tuple[str, list[str]]]:
    """The requirements of a file and the hashes of each, without the files that it builds on."""
    lines = path.read_text(encoding="utf-8").replace(" \\\n", "\0").splitlines()
    kept = [line for line in lines if not line.startswith(("#", "--requirement "))]
    return [(parts[0], [part.strip() for part in parts[1:]]) for parts in (line.split("\0") for line in kept)]


def packages(*names: str) -> set[str]:
    return {PINNED.fullmatch(line)[1] for name in names for line, _ in blocks(FOLDER / f"{name}.txt")}


def normalised(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_package_is_pinned_and_hashed_and_no_index_is_named(path: Path) -> None:
    found = blocks(path)
    assert found
    for line, hashes in found:
        assert PINNED.fullmatch(line), line
        assert hashes, line
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes)
    assert "://" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("extra", "files"),
    [
        (None, ["base"]),
        ("experiments", ["base"]),
        ("test", ["base", "test", "torch"]),
        ("fuzz", ["base", "test", "torch", "fuzz"]),
    ],
)
def test_what_the_project_needs_is_there(extra: str | None, files: list[str]) -> None:
    needed = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    missing = {normalised(each) for each in needed} - packages(*files) - {"tokenzero"}
    assert not missing, "run `make lock`, which writes .requirements/"


def test_versions_are_those_of_the_constraints() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {tuple(line.partition(";")[0].strip().split("==")) for line in constraints if "==" in line}
    names = {name for name, _ in tested}
    for path in FILES:
        for line, _ in blocks(path):
            name, version, _ = PINNED.fullmatch(line).groups()
            if name in names:
                assert (name, version.partition("+")[0]) in tested, f"{path.name}: {line}: run `make lock`"


report = runpy.run_path(str(FOLDER / "audit.py"))["report"]
CLEAN = {"name": "a", "version": "1", "vulns": []}
MISSED = {"name": "b", "skip_reason": "Dependency not found on PyPI"}
FLAWED = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]}
OURS = {"name": "tokenzero", "skip_reason": "distribution marked as editable"}


class TestAudit:
    def test_it_succeeds_only_if_all_are_looked_up_and_clean(self) -> None:
        assert report([CLEAN, OURS])[1] == 0
        assert report([CLEAN, MISSED])[1] == 2

    def test_it_names_what_is_flawed_and_what_mends_it(self) -> None:
        lines, status = report([CLEAN, FLAWED, MISSED])
        assert (lines[0], status) == ("c 2: PYSEC-1, mended in 2.1", 1)

    def test_it_says_in_a_line_that_nothing_could_be_looked_up(self) -> None:
        lines, status = report([MISSED, OURS])
        assert lines == ["audit: 1 packages could not be looked up: the advisories cannot be reached from here"]
        assert status == 2
