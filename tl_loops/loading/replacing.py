"""Replacing the files of a directory: at any moment a reader finds the old ones or the new ones.

No file system replaces several files at once, so the new ones are first gathered in a directory of
their own. It gets the name :data:`SAVED` when it is complete, in one step; from then on it is what
:func:`readable` gives. Its files are then placed, and it goes. What a kill leaves undone, the next
writer finishes. Files that the directory holds besides are never touched.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tl_loops.writing import in_use, named

SAVED = ".saved"
"""Directory, beside the files that it replaces, of new files that are complete."""

_STAGING = ".saving-"


def readable(directory: Path) -> Path:
    """Where the files of a directory are to be read: there, or where a killed writer left them.

    Args:
        directory: Of the files.
    """
    saved = directory / SAVED
    return saved if saved.is_dir() else directory


@contextmanager
def replaced(
    directory: Path, marker: str, order: Callable[[str], Any], outdated: Callable[[str], bool]
) -> Iterator[Path]:
    """Gather files in a directory that is yielded, and then let them replace those of another.

    Args:
        directory: Whose files are replaced; made where missing, and taken away again where an
            error leaves it empty.
        marker: The file by which a second writer finds that the directory is in use.
        order: Sort key of the names: in which order the files are placed.
        outdated: Whether a file of this name goes where it is not among the new ones.

    Raises:
        FileInUseError: Another process or thread writes there.
        OSError: The disk is full or may not be written; the message names the directory.
    """
    created = not directory.exists()
    with named(directory):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        with in_use(directory / marker), named(directory):
            # Held, so that whoever made these is gone.
            for left in directory.glob(f"{_STAGING}*"):
                shutil.rmtree(left, ignore_errors=True)
            if (directory / SAVED).is_dir():
                _place(directory, order, outdated)
            staging = _staging(directory)
            try:
                yield staging
                _to_disk(staging)
                os.rename(staging, directory / SAVED)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            _place(directory, order, outdated)
    finally:
        if created and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def _place(directory: Path, order: Callable[[str], Any], outdated: Callable[[str], bool]) -> None:
    """Put the files of a complete directory into place; doing it twice is the same as once."""
    saved, staging = directory / SAVED, _staging(directory)
    try:
        names = sorted((file.name for file in saved.iterdir()), key=order)
        for name in names:
            # Linked, so that the complete directory stays complete until all are placed.
            if (saved / name).is_dir():
                shutil.copytree(saved / name, staging / name, copy_function=_link)
            else:
                _link(saved / name, staging / name)
            if (directory / name).is_dir():
                os.rename(directory / name, _unused(staging))
            os.replace(staging / name, directory / name)
        for file in directory.iterdir():
            if file.name not in names and outdated(file.name):
                file.unlink()
        os.rename(saved, _unused(staging))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(directory: Path) -> Path:
    staging = directory / f"{_STAGING}{secrets.token_hex(8)}"
    staging.mkdir()
    return staging


def _unused(staging: Path) -> Path:
    return staging / f".{secrets.token_hex(8)}"


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _to_disk(directory: Path) -> None:
    """Wait until the files of a directory would outlast a loss of power."""
    for place, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(place, name), "rb+") as stream:
                os.fsync(stream.fileno())
