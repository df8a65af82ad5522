"""Files are written whole or not at all, and only over regular files."""

import errno
import os
import stat

import pytest

from tl_loops.writing import FileInUseError, check_writable, in_use, write_whole


def test_mode_and_links_stay(tmp_path):
    file, link = tmp_path / "a.bin", tmp_path / "b.bin"
    file.write_bytes(b"old")
    file.chmod(0o600)
    link.symlink_to(file.name)
    write_whole(link, b"new")
    assert link.is_symlink() and file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {p.name for p in tmp_path.iterdir()} == {"a.bin", "b.bin"}


@pytest.mark.parametrize("write", [lambda path: write_whole(path, b"x"), check_writable])
def test_only_regular_files_are_replaced(tmp_path, write):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), ("/dev/null", "a device"),
                       (tmp_path, "a directory")):  # fmt: skip
        with pytest.raises(ValueError, match=f"is {kind}"):
            write(path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_link_under_a_guessed_staging_name_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / ".a.bin.writing").symlink_to(victim)
    write_whole(tmp_path / "a.bin", b"x")
    assert victim.read_bytes() == b"mine"


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*a\.bin"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_directory_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError, match=r"cannot write.*a\.bin"):
        check_writable(tmp_path / "a.bin")


def test_a_file_has_one_writer(tmp_path):
    file = tmp_path / "a.bin"
    (tmp_path / ".a.bin.0123.writing").write_bytes(b"left by a kill")
    with in_use(file), pytest.raises(FileInUseError, match=r"a\.bin is in use"), in_use(file):
        pass
    with in_use(file):
        pass
    assert not list(tmp_path.iterdir())
