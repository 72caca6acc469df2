"""Folders and files that hold other people's prompts: only this user may read them, whatever the umask is."""

import contextlib
import os
from pathlib import Path

FOLDER_MODE, FILE_MODE = 0o700, 0o600


def make_folder(path: Path) -> None:
    """Make a folder with its missing parents, all of mode 0700; one that is there stays as it is. Raises OSError.

    `Path.mkdir(parents=True)` leaves the parents' modes to the umask.
    """
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)


def close_to_others(path: Path) -> None:
    """Take all rights of other users from a file or folder, as earlier versions left them; not from another user's."""
    with contextlib.suppress(OSError):  # it is gone, or on a read-only file system
        found = path.stat()
        if found.st_uid == os.getuid() and found.st_mode & 0o077:
            path.chmod(found.st_mode & 0o700)


def write_for_this_user() -> None:
    """Let all that this process writes from now on be its user's alone, by libraries, too."""
    os.umask(0o077)
