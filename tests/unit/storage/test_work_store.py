"""The outputs of stages: complete, checked, and redone when they are damaged."""

from __future__ import annotations

import errno
import logging
import math
import pickle
import shutil
from pathlib import Path

import pytest

from pipeline.errors import DiskFullError, StorageError, TargetUnavailableError
from pipeline.fingerprint import digest_bytes
from pipeline.storage.work import DamagedStage, StageFile, StageRecord, WorkStore
from tests.small_disk import make_read_only, small_disk

KEY = "0123456789abcdef" * 4


@pytest.fixture
def store(tmp_path: Path) -> WorkStore:
    return WorkStore(tmp_path / "work")


def write(store: WorkStore, content: bytes = b"codes", **summary: object) -> StageRecord:
    with store.writing("solve", KEY) as writer:
        writer.path("codes.bin").write_bytes(content)
        writer.path("parts/scales.bin").write_bytes(b"scales")
        return writer.finish(summary)


def test_a_finished_stage_is_found_with_its_summary(store: WorkStore) -> None:
    assert store.lookup("solve", KEY) is None
    record = write(store, loss=0.25, notes=["rounded"])
    assert record.files == {
        "codes.bin": StageFile(5, digest_bytes(b"codes")),
        "parts/scales.bin": StageFile(6, digest_bytes(b"scales")),
    }
    assert record.summary == {"loss": 0.25, "notes": ["rounded"]}
    assert WorkStore(store.root).lookup("solve", KEY) == record
    assert store.stage_dir("solve", KEY) == store.root / "solve" / "01" / KEY
    assert store.open_checked("solve", KEY, "parts/scales.bin").read_bytes() == b"scales"
    assert store.lookup("solve", "f" * 64) is None
    assert store.lookup("calibrate", KEY) is None


def test_nothing_is_kept_of_a_stage_that_was_not_finished(store: WorkStore) -> None:
    with store.writing("solve", KEY) as writer:
        writer.path("codes.bin").write_bytes(b"half")

    def fail() -> None:
        with store.writing("solve", KEY) as writer:
            writer.path("codes.bin").write_bytes(b"half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        fail()
    assert store.lookup("solve", KEY) is None
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_the_first_of_two_equal_results_stays(store: WorkStore) -> None:
    loss = {"loss": 0.1, "worst": math.nan, "shape": (3, 4), "by_block": {10: 0.5, 9: 0.25}}
    first = write(store, **loss)
    place = store.stage_dir("solve", KEY).stat().st_ino
    again, found = write(store, **loss), store.lookup("solve", KEY)
    assert repr(first) == repr(again) == repr(found)
    assert store.stage_dir("solve", KEY).stat().st_ino == place
    assert math.isnan(first.summary["worst"])
    assert (first.summary["shape"], first.summary["by_block"]) == ([3, 4], {"10": 0.5, "9": 0.25})


def test_different_figures_under_one_key_are_an_error_and_the_first_stay(store: WorkStore) -> None:
    first = write(store, loss=0.1, divergence={"kl": 0.25}, name="q_proj")
    with pytest.raises(StorageError, match=r"gave different results: summary\.divergence, summary\.loss\b") as caught:
        write(store, loss=math.nextafter(0.1, 1), divergence={"kl": 0.5}, name="q_proj")
    assert caught.value.code == "storage.nondeterministic_stage"
    with pytest.raises(StorageError, match=r"gave different results: summary\.name"):
        write(store, loss=0.1, divergence={"kl": 0.25})
    assert store.lookup("solve", KEY) == first


def test_different_bytes_under_one_key_are_an_error_and_the_first_stays(store: WorkStore) -> None:
    first = write(store)
    with pytest.raises(StorageError, match=r"gave different results: codes\.bin") as caught:
        write(store, content=b"other")
    assert caught.value.code == "storage.nondeterministic_stage"
    assert store.lookup("solve", KEY) == first


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "codes.bin").unlink(), "codes.bin is missing"),
        (lambda folder: (folder / "codes.bin").write_bytes(b"cod"), "codes.bin has 3 bytes, its record says 5"),
        (lambda folder: (folder / "record.json").unlink(), "record.json is missing"),
        (lambda folder: (folder / "record.json").write_text('{"stage": "so'), "record.json cannot be read"),
        (
            lambda folder: (folder / "record.json").write_text(
                (folder / "record.json").read_text().replace('"solve"', '"pack"')
            ),
            "record.json is that of pack",
        ),
    ],
)
def test_a_damaged_stage_is_absent_counted_and_can_be_redone(
    store: WorkStore, caplog: pytest.LogCaptureFixture, damage: object, reason: str
) -> None:
    record = write(store)
    damage(store.stage_dir("solve", KEY))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert store.lookup("solve", KEY) is None
    assert [(found.stage, found.key) for found in store.damaged] == [("solve", KEY)]
    assert reason in store.damaged[0].reason
    assert reason in caplog.text
    assert not store.stage_dir("solve", KEY).exists()
    assert write(store) == record
    assert len(store.damaged) == 1


def test_damage_is_taken_once(store: WorkStore) -> None:
    write(store)
    (store.stage_dir("solve", KEY) / "codes.bin").unlink()
    store.lookup("solve", KEY)
    assert store.take_damaged() == [DamagedStage("solve", KEY, "codes.bin is missing")]
    assert (store.take_damaged(), store.damaged) == ([], [])
    write(store)
    (store.stage_dir("solve", KEY) / "codes.bin").write_bytes(b"c0des")
    with pytest.raises(StorageError):
        store.open_checked("solve", KEY, "codes.bin")
    assert [found.key for found in store.take_damaged()] == [KEY]


def test_finishing_over_a_damaged_stage_replaces_it(store: WorkStore) -> None:
    record = write(store)
    (store.stage_dir("solve", KEY) / "codes.bin").unlink()
    assert write(store) == record
    assert store.open_checked("solve", KEY, "codes.bin").read_bytes() == b"codes"
    assert store.damaged == [DamagedStage("solve", KEY, "codes.bin is missing")]


def test_a_flipped_byte_is_found_before_the_file_is_used(store: WorkStore) -> None:
    write(store)
    (store.stage_dir("solve", KEY) / "codes.bin").write_bytes(b"c0des")
    with pytest.raises(StorageError, match=r"codes\.bin is damaged: .*The stage was discarded") as caught:
        store.open_checked("solve", KEY, "codes.bin")
    assert caught.value.code == "storage.damaged_stage"
    assert "run the same command again" in caught.value.hint
    assert store.lookup("solve", KEY) is None
    assert len(store.damaged) == 1
    write(store)
    assert store.open_checked("solve", KEY, "codes.bin").read_bytes() == b"codes"


def test_a_file_is_checked_once_and_again_when_it_was_written_since(
    store: WorkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store)
    hashed = []

    def digest(path: Path) -> str:
        hashed.append(path.name)
        return digest_bytes(path.read_bytes())

    monkeypatch.setattr("pipeline.storage.work.digest_file", digest)
    path = store.open_checked("solve", KEY, "codes.bin")
    assert store.open_checked("solve", KEY, "codes.bin") == path
    assert hashed == ["codes.bin"]
    path.write_bytes(b"c0des")
    with pytest.raises(StorageError, match="is damaged"):
        store.open_checked("solve", KEY, "codes.bin")


def test_a_file_that_is_not_there_is_named(store: WorkStore) -> None:
    with pytest.raises(StorageError, match=r"stage solve 0123456789ab has no file 'codes\.bin'"):
        store.open_checked("solve", KEY, "codes.bin")
    write(store)
    with pytest.raises(StorageError, match=r"has no file 'absent\.bin'"):
        store.open_checked("solve", KEY, "absent.bin")


def test_a_discarded_stage_is_absent(store: WorkStore) -> None:
    store.discard("solve", KEY)
    write(store)
    store.discard("solve", KEY)
    assert store.lookup("solve", KEY) is None
    assert store.damaged == []


def test_a_sweep_spares_living_writers(store: WorkStore) -> None:
    with store.writing("solve", KEY) as writer:
        writer.path("codes.bin").write_bytes(b"codes")
        assert WorkStore(store.root).sweep() == ()
        writer.finish({})
    assert store.lookup("solve", KEY) is not None


@pytest.mark.parametrize(("stage", "key"), [("../x", KEY), ("Solve", KEY), ("", KEY), ("solve", "abc"), ("solve", "")])
def test_what_is_no_address_of_a_stage_is_refused(store: WorkStore, stage: str, key: str) -> None:
    with pytest.raises(StorageError, match="cannot be a stage"):
        store.lookup(stage, key)
    with pytest.raises(StorageError, match="cannot be a stage"), store.writing(stage, key):
        pass


@pytest.mark.parametrize("name", ["../codes.bin", "/codes.bin", "", "record.json"])
def test_files_stay_inside_their_stage(store: WorkStore, name: str) -> None:
    with store.writing("solve", KEY) as writer, pytest.raises(StorageError):
        writer.path(name)


def test_a_store_travels_to_another_process_without_its_checks(store: WorkStore) -> None:
    write(store)
    store.open_checked("solve", KEY, "codes.bin")
    (store.stage_dir("solve", KEY) / "parts" / "scales.bin").unlink()
    store.lookup("solve", KEY)
    other = pickle.loads(pickle.dumps(store))
    assert (other.root, other.damaged) == (store.root, [])


def test_a_full_work_directory_is_named_with_the_way_out(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = WorkStore(disk)
        with pytest.raises(DiskFullError, match=r"the work directory .*/disk") as caught:
            write(store, content=b"x" * (2 << 20))
        assert "--work-dir" in caught.value.hint
        assert store.lookup("solve", KEY) is None
        assert write(store).files["codes.bin"].size_bytes == 5


def test_a_work_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        make_read_only(disk)
        with pytest.raises(TargetUnavailableError, match=r"no access to the work directory .*/disk"):
            write(WorkStore(disk))


def test_a_blocks_own_failures_are_not_blamed_on_the_work_directory(store: WorkStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), store.writing("solve", KEY):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(DiskFullError), store.writing("solve", KEY):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_unreadable_record_is_neither_absent_nor_damaged(store: WorkStore) -> None:
    write(store)
    record = store.stage_dir("solve", KEY) / "record.json"
    record.unlink()
    record.mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        store.lookup("solve", KEY)
    assert store.damaged == []
    shutil.rmtree(record)
