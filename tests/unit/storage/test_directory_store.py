"""What is special about objects that are plain files."""

from __future__ import annotations

import errno
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.errors import ConditionalWriteError, StorageError
from pipeline.fingerprint import digest_bytes
from pipeline.storage.directory import PRIVATE_FOLDER, DirectoryStore
from pipeline.storage.probe import probe


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def test_reading_creates_nothing(store: DirectoryStore) -> None:
    assert store.head("a") is None
    assert store.read("a/b") is None
    assert list(store.list("")) == []
    store.delete("a")
    assert not store.root.exists()


def test_objects_are_plain_files_that_other_users_may_read(store: DirectoryStore, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"content")
    mask = os.umask(0o022)
    try:
        store.put("a/put", b"content")
        store.upload(source, "a/uploaded", digest_bytes(b"content"))
    finally:
        os.umask(mask)
    for name in ("put", "uploaded"):
        path = store.root / "a" / name
        assert path.read_bytes() == b"content"
        assert path.stat().st_mode & 0o777 == 0o644
        assert path.stat().st_nlink == 1


def test_a_dead_writers_leftovers_are_not_listed_and_are_removed_by_the_next_writer(store: DirectoryStore) -> None:
    private = store.root / PRIVATE_FOLDER
    private.mkdir(parents=True)
    (private / "abc").write_bytes(b"half of an object")
    (private / "abc.lock").touch()
    assert list(store.list("")) == []
    store.put("a", b"x")
    assert [path.name for path in private.iterdir()] == ["commit"]
    (private / "def.lock").touch()
    assert store.sweep_partial("releases/", datetime.now(UTC)) == ("def",)
    assert [path.name for path in private.iterdir()] == ["commit"]


def test_the_private_folder_cannot_be_addressed(store: DirectoryStore) -> None:
    with pytest.raises(StorageError, match="cannot be the key"):
        store.put(f"{PRIVATE_FOLDER}/commit", b"x")


def test_deleting_the_last_object_of_a_folder_removes_the_folder(store: DirectoryStore) -> None:
    store.put("a/b/c", b"x")
    store.delete("a/b/c")
    assert [path.name for path in store.root.iterdir()] == [PRIVATE_FOLDER]


def test_an_object_where_a_folder_has_to_be_is_an_error(store: DirectoryStore) -> None:
    store.put("a", b"x")
    with pytest.raises(StorageError, match="File exists"):
        store.put("a/b", b"y")
    assert store.read("a/b") is None
    with pytest.raises(StorageError, match="File exists"):
        store.put("a/b", b"y", if_absent=True)


def test_a_file_system_without_hard_links_is_refused(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ConditionalWriteError, match="has no hard links") as caught:
        probe(store)
    assert "another file system" in caught.value.hint
    assert list(store.list("")) == []


def test_a_failing_disk_is_named(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    store.put("a", b"before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=r"the file system failed in .*/store: Input/output error"):
        store.put("a", b"after")
    blob = store.read("a")
    assert blob is not None
    assert blob.data == b"before"


def test_opening_a_store_does_not_load_boto3() -> None:
    import subprocess
    import sys

    program = (
        "import sys; from pipeline.settings import load_settings; from pipeline.storage.objects import open_store; "
        "import pipeline.storage.locate, pipeline.storage.work, pipeline.storage.probe; "
        "open_store('x', load_settings()); assert 'boto3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_directory_is_called_what_it_was_given_as_and_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = DirectoryStore(Path("out"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.put("key", b"data")
    assert (store.url, store.root) == ("out", tmp_path / "out")
    assert (tmp_path / "out" / "key").read_bytes() == b"data"
