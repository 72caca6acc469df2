"""What a server writes is its user's alone, whatever the umask is and whoever made the folder before."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache.disk import DiskTier
from cache.private import make_folder, write_for_this_user
from serve.api.messages import InputMessage, TextBlock
from serve.prompt.replay import RecordedAnswer, ReplayLog
from serve.prompt.signing import signing_key
from tests.helpers.storage_children import items, right


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[tuple[bool, str]]:
    """Whether each entry of a folder, and the folder itself, is a directory, and its mode."""
    found = [folder, *folder.rglob("*")]
    return {(path.is_dir(), oct(stat.S_IMODE(path.stat().st_mode))) for path in found}


PRIVATE = {(True, "0o700"), (False, "0o600")}


def test_pages_answers_and_the_signing_key_are_for_their_user_only(umask: int, tmp_path: Path) -> None:
    store = tmp_path / "new" / "store"
    tier = DiskTier(store, 1 << 20)
    tier.put_many(items(range(3)))
    log = ReplayLog(store)
    signing_key(store)
    answer = RecordedAnswer("", np.arange(3, dtype=np.int32))
    log.put(b"", [InputMessage("user", "a secret")], (TextBlock("it is"),), answer)
    log.flush()
    assert modes(tmp_path / "new") == PRIVATE
    log.close()
    tier.close()


def test_a_store_that_an_earlier_version_left_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "store", 1 << 20)
    tier.put_many(items(range(3)))
    tier.close()
    for path in (tmp_path / "store").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    tier = DiskTier(tmp_path / "store", 1 << 20)
    assert modes(tmp_path / "store") == PRIVATE
    assert right(tier, range(3)) == [True] * 3
    tier.close()


def test_a_folder_that_the_operator_has_made_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir(mode=0o750)
    (tmp_path / "given").chmod(0o750)
    make_folder(tmp_path / "given")
    make_folder(tmp_path / "given" / "parent" / "folder")
    assert stat.S_IMODE((tmp_path / "given").stat().st_mode) == 0o750
    assert modes(tmp_path / "given" / "parent") == {(True, "0o700")}


def test_what_libraries_write_in_a_process_that_serves_is_private_too(umask: int, tmp_path: Path) -> None:
    write_for_this_user()
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "file").write_text("")
    assert modes(tmp_path / "library") == PRIVATE
