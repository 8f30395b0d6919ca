"""A directory that several users of a machine publish to."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage.directory import PRIVATE_FOLDER, DirectoryStore
from pipeline.storage.work_directory import DirectoryWorkStore
from tests.contract.storage_actors import hold_as_another_user, process_context, write_as_another_user

USER = 65534


@pytest.fixture
def shared() -> Iterator[Path]:
    """A store and a work store that somebody has written to. All may write to the folders; files keep their modes."""
    if os.geteuid() != 0:
        pytest.skip("needs root to act as another user")
    before = os.umask(0o022)
    # Not tmp_path: nobody else may enter the folders above it.
    with tempfile.TemporaryDirectory() as folder:
        try:
            root = Path(folder, "store")
            DirectoryStore(root).put("releases/first", b"x")
            with DirectoryWorkStore(root / "work").writing("solve", "ab" * 32) as writer:
                writer.finish({})
        finally:
            os.umask(before)
        for path in (Path(folder), root, *root.rglob("*")):
            if path.is_dir():
                path.chmod(0o777)
        yield root


def write_as(user: int, root: Path) -> str:
    context = process_context()
    answers = context.Queue()
    process = context.Process(target=write_as_another_user, args=(user, str(root), answers))
    process.start()
    answer: str = answers.get(timeout=60)
    process.join()
    return answer


def test_a_second_user_can_write(shared: Path) -> None:
    assert (shared / PRIVATE_FOLDER / "commit").stat().st_mode & 0o777 == 0o644
    assert write_as(USER, shared) == ""
    assert [info.key for info in DirectoryStore(shared).list("releases/")] == ["releases/first", "releases/second"]
    assert DirectoryWorkStore(shared / "work").lookup("solve", "ef" * 32) is not None


def test_a_lock_that_may_only_be_read_excludes_all_the_same(shared: Path) -> None:
    lock = shared / PRIVATE_FOLDER / "commit"
    context = process_context()
    is_held, may_end = context.Event(), context.Event()
    holder = context.Process(target=hold_as_another_user, args=(USER, str(lock), is_held, may_end))
    holder.start()
    assert is_held.wait(60)
    with lock.open("rb") as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    may_end.set()
    holder.join()
    assert holder.exitcode == 0


@pytest.mark.parametrize(("lock_mode", "folder_mode"), [(0o600, 0o777), (0o644, 0o777), (0o666, 0o1777)])
def test_what_a_dead_writer_of_another_user_left_stops_nobody(shared: Path, lock_mode: int, folder_mode: int) -> None:
    private = shared / PRIVATE_FOLDER
    (private / "abc").mkdir()
    (private / "abc" / "half").write_bytes(b"half of an object")
    (private / "abc.lock").touch()
    (private / "abc.lock").chmod(lock_mode)
    private.chmod(folder_mode)
    assert write_as(USER, shared) == ""
    assert sorted(path.name for path in private.iterdir()) == ["abc", "abc.lock", "commit"]
    DirectoryStore(shared).put("releases/third", b"z")
    assert [path.name for path in private.iterdir()] == ["commit"]
