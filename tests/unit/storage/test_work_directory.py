"""What a work store in a directory does besides the contract: `tests/contract/test_work_stores.py`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.errors import DiskFullError, StorageError, TargetUnavailableError
from pipeline.fingerprint import digest_bytes
from pipeline.storage.work import DamagedStage, StageRecord
from pipeline.storage.work_directory import DirectoryWorkStore
from tests.small_disk import make_read_only, small_disk

KEY = "0123456789abcdef" * 4


@pytest.fixture
def store(tmp_path: Path) -> DirectoryWorkStore:
    return DirectoryWorkStore(tmp_path / "work")


def write(store: DirectoryWorkStore, content: bytes = b"codes", **summary: object) -> StageRecord:
    with store.writing("solve", KEY) as writer:
        writer.path("codes.bin").write_bytes(content)
        writer.path("parts/scales.bin").write_bytes(b"scales")
        return writer.finish(summary)


def test_a_file_is_checked_once_and_again_when_it_was_written_since(
    store: DirectoryWorkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store)
    hashed = []

    def digest(path: Path) -> str:
        hashed.append(path.name)
        return digest_bytes(path.read_bytes())

    monkeypatch.setattr("pipeline.storage.work_directory.digest_file", digest)
    path = store.open_checked("solve", KEY, "codes.bin")
    assert store.open_checked("solve", KEY, "codes.bin") == path
    assert hashed == ["codes.bin"]
    path.write_bytes(b"c0des")
    with pytest.raises(StorageError, match="is damaged"):
        store.open_checked("solve", KEY, "codes.bin")


def test_a_full_work_directory_is_named_with_the_way_out(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = DirectoryWorkStore(disk)
        with pytest.raises(DiskFullError, match=r"the work directory .*/disk") as caught:
            write(store, content=b"x" * (2 << 20))
        assert "--work-dir" in caught.value.hint
        assert store.lookup("solve", KEY) is None
        assert write(store).files["codes.bin"].size_bytes == 5


def test_a_work_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        make_read_only(disk)
        with pytest.raises(TargetUnavailableError, match=r"no access to the work directory .*/disk"):
            write(DirectoryWorkStore(disk))


def test_an_unreadable_record_is_neither_absent_nor_damaged(store: DirectoryWorkStore) -> None:
    write(store)
    record = store.stage_dir("solve", KEY) / "record.json"
    record.unlink()
    record.mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        store.lookup("solve", KEY)
    assert store.damaged == []
    shutil.rmtree(record)


def test_a_folder_without_a_record_is_damage(store: DirectoryWorkStore) -> None:
    write(store)
    (store.stage_dir("solve", KEY) / "record.json").unlink()
    assert store.lookup("solve", KEY) is None
    assert store.damaged == [DamagedStage("solve", KEY, "record.json is missing")]
    assert not store.stage_dir("solve", KEY).exists()
