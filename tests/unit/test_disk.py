"""Files that appear whole or not at all, and what a failing disk is called."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.disk import disk_errors, make_folders, replacing, save_file, write_error, write_file
from pipeline.errors import DiskFullError, StorageError, TargetUnavailableError


def test_a_saved_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file(path, (b"first",))
    save_file(path, (b"sec", b"ond"))
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_block_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            assert path.read_bytes() == b"old"
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        fail()
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file", b"old")]


def test_what_is_written_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix or 'folder'}")
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        steps.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    save_file(tmp_path / "file", (b"content",))
    assert steps == ["sync .tmp", "replace", "sync folder"]


def test_a_new_file_is_never_written_over(tmp_path: Path) -> None:
    make_folders(tmp_path / "a" / "b")
    write_file(tmp_path / "a" / "b" / "file", (b"x", b"y"))
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a" / "b" / "file", (b"z",))
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"xy"


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, DiskFullError, "no space left in /there"),
        (errno.EDQUOT, DiskFullError, "no space left in /there"),
        (errno.EACCES, TargetUnavailableError, "no access to /there"),
        (errno.EROFS, TargetUnavailableError, "no access to /there"),
        (errno.ENOENT, TargetUnavailableError, "a folder is missing in /there"),
        (errno.EIO, StorageError, "the file system failed in /there"),
    ],
)
def test_each_failure_of_a_disk_has_its_error(number: int, kind: type[StorageError], words: str) -> None:
    with pytest.raises(StorageError) as caught, disk_errors("/there", hint="do this"):
        raise OSError(number, os.strerror(number), "/there/file")
    assert type(caught.value) is kind
    assert caught.value.message == f"{words}: {os.strerror(number)} (/there/file)"
    assert caught.value.hint == "do this"
    only_full = DiskFullError if kind is DiskFullError else OSError
    with pytest.raises(only_full), disk_errors("/there", hint="do this", only_full=True):
        raise OSError(number, os.strerror(number))


def test_a_failed_write_says_how_much_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    full = write_error(OSError(errno.EDQUOT, "over quota"), path, 4000, elsewhere="move", check="look")
    assert type(full) is DiskFullError
    assert full.message == f"{path}: no space left; 4 kB more are needed"
    assert full.hint == "free at least 4 kB there, or move"
    assert full.context == {"path": str(path), "needed_bytes": 4000}
    other = write_error(OSError(errno.EIO, "Input/output error"), path, 4000, elsewhere="move", check="look")
    assert (type(other), other.message, other.hint) == (
        StorageError,
        f"{path} cannot be written: Input/output error",
        "look",
    )
