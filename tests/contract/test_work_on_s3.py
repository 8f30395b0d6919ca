"""A work store in a bucket besides the contract: what it asks of the service, and what it bears of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ConditionalWriteError, TargetUnavailableError
from pipeline.fingerprint import digest_bytes
from pipeline.settings import load_settings
from pipeline.storage.s3 import S3Store
from pipeline.storage.work import StageRecord, WorkStore, open_work_store
from pipeline.storage.work_objects import ObjectWorkStore
from tests.contract.conftest import BUCKET
from tests.s3_faults import S3Faults, Trouble
from tests.s3_server import S3Server

KEY = "0123456789abcdef" * 4


@pytest.fixture
def faults(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Faults]:
    """A proxy before the server, which this process's environment leads to. Waits between attempts are short."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.02)
    with S3Faults(s3_server) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{digest_bytes(str(tmp_path).encode())[:16]}"


def open_on(machine: Path, prefix: str) -> ObjectWorkStore:
    store = open_work_store(prefix, replace(load_settings(), cache_dir=machine))
    assert isinstance(store, ObjectWorkStore)
    return store


def write(store: WorkStore, content: bytes = b"codes", key: str = KEY) -> StageRecord:
    with store.writing("solve", key) as writer:
        writer.path("codes.bin").write_bytes(content)
        return writer.finish({"loss": 0.5})


def test_planning_asks_for_a_listing_and_for_what_is_there(faults: S3Faults, prefix: str, tmp_path: Path) -> None:
    store = open_on(tmp_path / "a", prefix)
    keys = [digest_bytes(str(number).encode()) for number in range(400)]
    for key in keys[:3]:
        write(store, key=key)
    faults.requests.clear()
    found = open_on(tmp_path / "b", prefix).lookup_all([("solve", key) for key in keys])
    assert [key for _, key in found] == keys[:3]
    methods = [("list" if "list-type" in path else "get") for _, path in faults.requests]
    assert sorted(methods) == ["get", "get", "get", "list"]


def test_a_file_comes_to_a_machine_once(faults: S3Faults, prefix: str, tmp_path: Path) -> None:
    write(open_on(tmp_path / "a", prefix))
    other = open_on(tmp_path / "b", prefix)
    path = other.open_checked("solve", KEY, "codes.bin")
    faults.requests.clear()
    assert other.open_checked("solve", KEY, "codes.bin") == path
    assert faults.requests == []
    # Another process asks for the record, as the stage may be gone, and not for the file.
    assert open_on(tmp_path / "b", prefix).open_checked("solve", KEY, "codes.bin") == path
    assert [path.rpartition("/")[2] for _, path in faults.requests if "list-type" not in path] == ["record.json"]


def test_what_was_written_here_is_not_fetched_back(faults: S3Faults, prefix: str, tmp_path: Path) -> None:
    store = open_on(tmp_path / "a", prefix)
    write(store)
    faults.requests.clear()
    assert store.open_checked("solve", KEY, "codes.bin").read_bytes() == b"codes"
    assert faults.requests == []


def test_a_damaged_copy_on_this_machine_is_fetched_again(faults: S3Faults, prefix: str, tmp_path: Path) -> None:
    store = open_on(tmp_path / "a", prefix)
    record = write(store)
    path = store.open_checked("solve", KEY, "codes.bin")
    path.write_bytes(b"c0des")
    for reader in (store, open_on(tmp_path / "a", prefix)):
        assert reader.open_checked("solve", KEY, "codes.bin").read_bytes() == b"codes"
        assert reader.damaged == []
        assert reader.lookup("solve", KEY) == record
        path.write_bytes(b"c0des")


def test_a_second_writer_of_other_bytes_leaves_the_first_ones_files_alone(
    faults: S3Faults, prefix: str, tmp_path: Path
) -> None:
    first, second = open_on(tmp_path / "a", prefix), open_on(tmp_path / "b", prefix)
    with second.writing("solve", KEY) as writer:
        writer.path("codes.bin").write_bytes(b"c0des")
        # The first is done between the second's look and its upload, as when a straggler was started twice.
        original, raced = second.store.upload, []

        def upload(*arguments: object) -> None:
            if not raced:
                raced.append(write(first))
            original(*arguments)  # type: ignore[arg-type]

        second.store.upload = upload  # type: ignore[method-assign]
        with pytest.raises(Exception, match="gave different results") as caught:
            writer.finish({"loss": 0.5})
    assert getattr(caught.value, "code", "") == "storage.nondeterministic_stage"
    assert open_on(tmp_path / "c", prefix).open_checked("solve", KEY, "codes.bin").read_bytes() == b"codes"


@pytest.mark.parametrize(
    "trouble",
    [
        Trouble(status=503, share=0.25),
        Trouble(status=500, share=0.25),
        Trouble(lose_answer=True, share=0.25),
        Trouble(delay_s=0.2, share=0.5),
    ],
    ids=["slow down", "internal error", "lost answers", "slow"],
)
def test_trouble_that_passes_changes_nothing(faults: S3Faults, prefix: str, tmp_path: Path, trouble: Trouble) -> None:
    faults.trouble = trouble
    keys = [digest_bytes(str(number).encode()) for number in range(10)]
    store = open_on(tmp_path / "a", prefix)
    store.prepare()
    records = {key: write(store, key.encode(), key) for key in keys}
    other = open_on(tmp_path / "b", prefix)
    assert {key: record for (_, key), record in other.lookup_all([("solve", key) for key in keys]).items()} == records
    for key in keys:
        assert other.open_checked("solve", key, "codes.bin").read_bytes() == key.encode()
    assert store.damaged == other.damaged == []
    assert faults.num_troubled > 5


def test_lost_answers_do_not_speak_against_a_service(faults: S3Faults, prefix: str, tmp_path: Path) -> None:
    """A write whose answer got lost is repeated, and the condition of the repeated one does not hold."""
    faults.trouble = Trouble(lose_answer=True, share=0.4)
    for _ in range(5):
        open_on(tmp_path / "a", prefix).prepare()
    assert faults.num_troubled > 5


def test_trouble_that_stays_is_an_error_in_bounded_time_and_nothing_is_lost(
    faults: S3Faults, prefix: str, tmp_path: Path
) -> None:
    store = open_on(tmp_path / "a", prefix)
    record = write(store)
    faults.trouble = Trouble(status=503)
    before = time.monotonic()
    for call in (
        lambda: write(store, key="f" * 64),
        lambda: store.lookup("solve", KEY),
        lambda: store.lookup_all([("solve", KEY)] * 30),
        lambda: open_on(tmp_path / "b", prefix).open_checked("solve", KEY, "codes.bin"),
        lambda: store.discard("solve", KEY),
    ):
        with pytest.raises(TargetUnavailableError, match="HTTP 503"):
            call()
    assert time.monotonic() - before < 30
    assert store.damaged == []
    faults.trouble = None
    assert open_on(tmp_path / "b", prefix).lookup("solve", KEY) == record


def test_a_service_that_ignores_conditions_is_refused_before_work_begins(
    faults: S3Faults, prefix: str, tmp_path: Path
) -> None:
    store = open_on(tmp_path / "a", prefix)
    assert isinstance(store.store, S3Store)
    store.store._client.meta.events.register(
        "before-parameter-build.s3.PutObject", lambda params, **_: params.pop("IfNoneMatch", None)
    )
    with pytest.raises(ConditionalWriteError, match="does not honour conditional writes"):
        store.prepare()
