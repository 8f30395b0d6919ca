"""What every work store promises: stages are complete, checked, and redone when they are damaged."""

from __future__ import annotations

import errno
import logging
import math
import pickle
from collections.abc import Callable

import pytest

from pipeline.errors import DiskFullError, StorageError
from pipeline.fingerprint import digest_bytes
from pipeline.storage.work import RECORD_NAME, DamagedStage, StageFile, StageRecord, WorkStore, stage_folder
from tests.contract.conftest import WorkPlace

KEY = "0123456789abcdef" * 4


def write(store: WorkStore, content: bytes = b"codes", key: str = KEY, **summary: object) -> StageRecord:
    with store.writing("solve", key) as writer:
        writer.path("codes.bin").write_bytes(content)
        writer.path("parts/scales.bin").write_bytes(b"scales")
        return writer.finish(summary)


def test_a_finished_stage_is_found_on_any_machine_with_its_summary(work_place: WorkPlace) -> None:
    store = work_place.open()
    assert store.lookup("solve", KEY) is None
    record = write(store, loss=0.25, notes=["rounded"], share=math.inf)
    assert record.files == {
        "codes.bin": StageFile(5, digest_bytes(b"codes")),
        "parts/scales.bin": StageFile(6, digest_bytes(b"scales")),
    }
    assert record.summary == {"loss": 0.25, "notes": ["rounded"], "share": math.inf}
    for other in (store, work_place.open(), work_place.open("second")):
        assert other.lookup("solve", KEY) == record
        assert other.open_checked("solve", KEY, "parts/scales.bin").read_bytes() == b"scales"
        assert other.lookup("solve", "f" * 64) is None
        assert other.lookup("calibrate", KEY) is None


def test_many_stages_are_looked_up_together(work_place: WorkPlace) -> None:
    store = work_place.open()
    keys = [digest_bytes(str(number).encode()) for number in range(60)]
    records = {("solve", key): write(store, key=key, number=number) for number, key in enumerate(keys[:40])}
    work_place.raw.delete(work_place.file_key(records["solve", keys[7]], "codes.bin"))
    wanted = [("solve", key) for key in keys] + [("pack", KEY)]
    other = work_place.open("second")
    assert other.lookup_all(wanted) == {
        place: record for place, record in records.items() if place != ("solve", keys[7])
    }
    assert other.take_damaged() == [DamagedStage("solve", keys[7], "codes.bin is missing")]
    assert other.lookup_all([("solve", keys[0]), ("solve", keys[59])]) == {
        ("solve", keys[0]): records["solve", keys[0]]
    }
    assert other.lookup_all([]) == {}


def test_nothing_is_kept_of_a_stage_that_was_not_finished(work_place: WorkPlace) -> None:
    store = work_place.open()
    with store.writing("solve", KEY) as writer:
        writer.path("codes.bin").write_bytes(b"half")

    def fail() -> None:
        with store.writing("solve", KEY) as writer:
            writer.path("codes.bin").write_bytes(b"half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        fail()
    assert store.lookup("solve", KEY) is None
    assert list(work_place.raw.list("solve/")) == []
    assert [path for path in work_place.folder.rglob("*") if path.is_file()] == []


def test_the_first_of_two_equal_results_stays(work_place: WorkPlace) -> None:
    first = write(work_place.open(), loss=math.nan)
    second = write(work_place.open("second"), loss=math.nan)
    assert second.files == first.files
    found = work_place.open("third").lookup("solve", KEY)
    assert found is not None
    assert found.files == first.files


@pytest.mark.parametrize(
    ("content", "summary", "differing"),
    [(b"other", {"loss": 1}, r"codes\.bin"), (b"codes", {"loss": 2, "n": 1}, r"summary\.loss, summary\.n")],
)
def test_different_results_under_one_key_are_an_error_and_the_first_stays(
    work_place: WorkPlace, content: bytes, summary: dict[str, object], differing: str
) -> None:
    first = write(work_place.open(), loss=1)
    with pytest.raises(StorageError, match=f"gave different results: {differing}\n") as caught:
        write(work_place.open("second"), content=content, **summary)
    assert caught.value.code == "storage.nondeterministic_stage"
    third = work_place.open("third")
    assert third.lookup("solve", KEY) == first
    assert third.open_checked("solve", KEY, "codes.bin").read_bytes() == b"codes"


def put_record(place: WorkPlace, change: Callable[[bytes], bytes]) -> None:
    name = f"{stage_folder('solve', KEY)}/{RECORD_NAME}"
    found = place.raw.read(name)
    assert found is not None
    place.raw.put(name, change(found.data))


def put_file(place: WorkPlace, record: StageRecord, content: bytes | None) -> None:
    name = place.file_key(record, "codes.bin")
    place.raw.delete(name) if content is None else place.raw.put(name, content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda place, record: put_file(place, record, None), "codes.bin is missing"),
        (lambda place, record: put_file(place, record, b"cod"), "codes.bin has 3 bytes, its record says 5"),
        (lambda place, _: put_record(place, lambda _: b'{"stage": "so'), "record.json cannot be read"),
        (
            lambda place, _: put_record(place, lambda text: text.replace(b'"solve"', b'"pack"')),
            "record.json is that of pack",
        ),
    ],
)
def test_a_damaged_stage_is_absent_counted_and_can_be_redone(
    work_place: WorkPlace,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[WorkPlace, StageRecord], None],
    reason: str,
) -> None:
    record = write(work_place.open())
    damage(work_place, record)
    store = work_place.open("second")
    with caplog.at_level(logging.WARNING):
        assert store.lookup("solve", KEY) is None
    assert [(found.stage, found.key) for found in store.damaged] == [("solve", KEY)]
    assert reason in store.damaged[0].reason
    assert reason in caplog.text
    assert list(work_place.raw.list(stage_folder("solve", KEY))) == []
    assert write(store) == record
    assert len(store.take_damaged()) == 1
    assert store.take_damaged() == []


def test_finishing_over_a_damaged_stage_replaces_it(work_place: WorkPlace) -> None:
    record = write(work_place.open())
    put_file(work_place, record, None)
    store = work_place.open("second")
    assert write(store) == record
    assert work_place.open("third").open_checked("solve", KEY, "codes.bin").read_bytes() == b"codes"
    assert store.damaged == [DamagedStage("solve", KEY, "codes.bin is missing")]


def test_a_flipped_byte_is_found_before_the_file_is_used(work_place: WorkPlace) -> None:
    record = write(work_place.open())
    put_file(work_place, record, b"c0des")
    store = work_place.open("second")
    with pytest.raises(StorageError, match=r"is damaged: codes\.bin has SHA-256 .*The stage was discarded") as caught:
        store.open_checked("solve", KEY, "codes.bin")
    assert caught.value.code == "storage.damaged_stage"
    assert caught.value.context == {"stage": "solve", "key": KEY}
    assert "run the same command again" in caught.value.hint
    assert store.lookup("solve", KEY) is None
    assert len(store.damaged) == 1
    write(store)
    assert work_place.open("third").open_checked("solve", KEY, "codes.bin").read_bytes() == b"codes"


def test_a_file_that_vanishes_after_its_stage_was_found_is_damage(work_place: WorkPlace) -> None:
    record = write(work_place.open())
    store = work_place.open("second")
    assert store.lookup("solve", KEY) == record
    put_file(work_place, record, None)
    with pytest.raises(StorageError) as caught:
        store.open_checked("solve", KEY, "codes.bin")
    assert caught.value.context == {"stage": "solve", "key": KEY}
    assert [found.reason for found in store.damaged] == ["codes.bin is missing"]
    assert store.lookup("solve", KEY) is None


def test_a_file_that_is_not_there_is_named(work_place: WorkPlace) -> None:
    store = work_place.open()
    with pytest.raises(StorageError, match=r"stage solve 0123456789ab has no file 'codes\.bin'") as caught:
        store.open_checked("solve", KEY, "codes.bin")
    assert caught.value.code == "storage.missing_stage"
    write(store)
    with pytest.raises(StorageError, match=r"has no file 'absent\.bin'"):
        store.open_checked("solve", KEY, "absent.bin")


def test_a_discarded_stage_is_absent(work_place: WorkPlace) -> None:
    store = work_place.open()
    store.discard("solve", KEY)
    write(store)
    work_place.open("second").discard("solve", KEY)
    assert store.lookup("solve", KEY) is None
    store.discard("solve", KEY)
    with pytest.raises(StorageError, match="has no file"):
        store.open_checked("solve", KEY, "codes.bin")
    assert store.damaged == []


def test_a_sweep_spares_living_writers(work_place: WorkPlace) -> None:
    store = work_place.open()
    with store.writing("solve", KEY) as writer, store.private_folder() as private:
        writer.path("codes.bin").write_bytes(b"codes")
        (private / "spilled").write_bytes(b"x")
        assert work_place.open().sweep() == ()
        assert (private / "spilled").is_file()
        writer.finish({})
    assert store.lookup("solve", KEY) is not None
    assert not private.exists()


def test_a_prepared_store_is_usable_and_left_as_it_was(work_place: WorkPlace) -> None:
    store = work_place.open()
    record = write(store)
    before = list(work_place.raw.list(""))
    work_place.open("second").prepare()
    assert list(work_place.raw.list("")) == before
    assert store.lookup("solve", KEY) == record


@pytest.mark.parametrize(("stage", "key"), [("../x", KEY), ("Solve", KEY), ("", KEY), ("solve", "abc"), ("solve", "")])
def test_what_is_no_address_of_a_stage_is_refused(work_place: WorkPlace, stage: str, key: str) -> None:
    store = work_place.open()
    with pytest.raises(StorageError, match="cannot be a stage"):
        store.lookup(stage, key)
    with pytest.raises(StorageError, match="cannot be a stage"), store.writing(stage, key):
        pass


@pytest.mark.parametrize("name", ["../codes.bin", "/codes.bin", "", "record.json"])
def test_files_stay_inside_their_stage(work_place: WorkPlace, name: str) -> None:
    with work_place.open().writing("solve", KEY) as writer, pytest.raises(StorageError):
        writer.path(name)


def test_a_store_travels_to_another_process_without_its_checks(work_place: WorkPlace) -> None:
    store = work_place.open()
    put_file(work_place, write(store), None)
    store.lookup("solve", KEY)
    other = pickle.loads(pickle.dumps(store))
    assert type(other) is type(store)
    assert (other.url, other.damaged) == (store.url, [])


def test_a_blocks_own_failures_are_not_blamed_on_the_store(work_place: WorkPlace) -> None:
    store = work_place.open()
    with pytest.raises(FileNotFoundError), store.writing("solve", KEY):
        (work_place.folder / "absent").read_bytes()
    with pytest.raises(DiskFullError), store.writing("solve", KEY):
        raise OSError(errno.ENOSPC, "No space left on device")
