"""How every file of this package is written: whole or not at all, and only over regular files."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class FileInUseError(OSError):
    """Another process or thread writes this file."""


def check_regular(path: str | os.PathLike[str]) -> Path:
    """The file that a path means, or an error if it can be none.

    Args:
        path: Of a file that need not exist; links are followed.

    Returns:
        The path after all links.

    Raises:
        ValueError: There is something that is not a regular file: a directory, device or pipe.
        OSError: The links form a circle.
    """
    if "\0" in os.fsdecode(path):
        raise ValueError(f"a path cannot hold a null byte, got {os.fsdecode(path)!r}")
    target = Path(os.path.realpath(path))
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return target
    if not stat.S_ISREG(mode):
        kind = next((words for holds, words in _KINDS if holds(mode)), "no regular file")
        raise ValueError(f"{path} is {kind}; give the path of a file")
    return target


def check_writable(path: str | os.PathLike[str]) -> None:
    """Try, before the work begins, whether :func:`write_whole` can write a file.

    Args:
        path: Of the file; nothing is left there.

    Raises:
        FileNotFoundError: The directory does not exist.
        PermissionError: The directory or the file may not be written.
        ValueError: There is something that is not a regular file.
        OSError: Nothing can be created there, for example because the disk is read-only.
    """
    with named(path):
        staged = _staged(_target(path))
        try:
            os.close(_create(staged))
        finally:
            staged.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one.

    The content goes to a new file of an unpredictable name beside the target, which then takes its
    name. A replaced file's permissions stay; a link stays, and the file that it names is replaced.

    Args:
        path: Where to.
        content: The whole content.

    Raises:
        FileNotFoundError: The directory does not exist.
        PermissionError: The directory or the file may not be written.
        ValueError: There is something that is not a regular file.
        OSError: The disk is full or fails; the message names the file.
    """
    with named(path):
        target = _target(path)
        staged = _staged(target)
        try:  # an interrupt may come as soon as the file is there
            with open(_create(staged), "wb") as stream:
                _keep_permissions(stream, target)
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(staged, target)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise


def append_whole(path: str | os.PathLike[str], content: bytes, place: int) -> None:
    """Append to a file; what it held before stays, whatever happens.

    A kill may leave a part of the content at the end, so that a reader must know a whole one.

    Args:
        path: Of a file that exists.
        content: What is appended.
        place: Number of bytes before it; what the file holds after them is cut off.

    Raises:
        FileNotFoundError: The file is gone.
        PermissionError: The file may not be written.
        ValueError: It is not a regular file.
        OSError: The disk is full or fails; the message names the file, which is as before.
    """
    left = memoryview(content)
    # Without a buffer: one that could not be written would be tried again when the file is closed.
    with named(path), open(check_regular(path), "r+b", buffering=0) as stream:
        stream.truncate(place)
        try:
            stream.seek(place)
            while left:
                left = left[stream.write(left) :]
            os.fsync(stream.fileno())
        except BaseException:
            with suppress(OSError):
                stream.truncate(place)
            raise


@contextmanager
def in_use(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a file as the only writer, and remove what a killed writer left beside it.

    Args:
        path: Of the file; it need not exist.

    Raises:
        FileInUseError: Another process or thread holds it.
        OSError: As in :func:`check_writable`.
    """
    with named(path):
        target = _target(path)
        lock = target.with_name(f".{target.name}.lock")
        held = _locked(path, lock)
    try:
        for left in target.parent.iterdir():
            if left.name.startswith(f".{target.name}.") and left.name.endswith(".writing"):
                left.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # still held, so that nobody else takes the name meanwhile
        held.close()


def _locked(path: str | os.PathLike[str], lock: Path) -> FileIO:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        # An object and no number: an interrupt that loses it closes it, which gives the lock back.
        held = FileIO(lock, "r+", opener=lambda path, _: os.open(path, flags, 0o600))
        try:
            if fcntl is not None:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file between opening and locking.
            if lock.exists() and os.path.samestat(os.fstat(held.fileno()), os.stat(lock)):
                return held
        except BlockingIOError:
            held.close()
            raise FileInUseError(
                f"{path} is in use by another run; wait for it, or give another path"
            ) from None
        except BaseException:
            held.close()
            raise
        held.close()


def _target(path: str | os.PathLike[str]) -> Path:
    target = check_regular(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {target.parent}")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"cannot write {path}: its permissions do not allow it")
    return target


def _staged(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.writing")


def _create(staged: Path) -> int:
    # Exclusive: neither a file nor a link that somebody put there is opened.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    return os.open(staged, flags | getattr(os, "O_BINARY", 0), 0o666)


def _keep_permissions(stream: BinaryIO, target: Path) -> None:
    if not target.exists() or not hasattr(os, "fchmod"):
        return
    old = os.stat(target)
    with suppress(PermissionError):  # only root can give files away
        os.fchown(stream.fileno(), old.st_uid, old.st_gid)
    os.fchmod(stream.fileno(), stat.S_IMODE(old.st_mode))


@contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """An error of the system says what was to be written and why it could not be.

    Args:
        path: Of the file or directory.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # says so itself
            raise
        raise type(error)(error.errno, f"cannot write: {error.strerror}", str(path)) from error
