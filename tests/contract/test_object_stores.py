"""What every object store must do, on a directory and on a real S3 server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.errors import ConflictError, StorageError
from pipeline.fingerprint import digest_bytes, digest_file
from pipeline.storage.objects import ObjectStore
from pipeline.storage.probe import PROBE_FOLDER, probe
from pipeline.storage.s3 import S3Store
from tests.contract.storage_actors import PART_BYTES, open_for_test, process_context, race_to_put

NUM_RACERS = 8


def test_what_was_put_is_read_back(store: ObjectStore) -> None:
    etag = store.put("a/b.json", b"content")
    blob = store.read("a/b.json")
    assert blob is not None
    assert blob.data == b"content"
    assert blob.etag == etag
    info = store.head("a/b.json")
    assert info is not None
    assert (info.key, info.size_bytes) == ("a/b.json", 7)
    assert abs(datetime.now(UTC) - info.modified_at) < timedelta(minutes=5)


def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    store.put("empty", b"")
    blob, info = store.read("empty"), store.head("empty")
    assert blob is not None
    assert blob.data == b""
    assert info is not None
    assert info.size_bytes == 0
    assert b"".join(store.stream("empty")) == b""


def test_an_absent_object_is_none_and_cannot_be_streamed(store: ObjectStore, tmp_path: Path) -> None:
    assert store.head("absent") is None
    assert store.read("absent") is None
    assert not store.holds("absent", 0, digest_bytes(b""))
    with pytest.raises(StorageError, match="absent does not exist"):
        list(store.stream("absent"))
    with pytest.raises(StorageError, match="absent does not exist"):
        store.download("absent", tmp_path / "file")
    assert list(tmp_path.glob("*file*")) == []
    store.delete("absent")


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "./a", "a\\b", "a\nb"])
def test_keys_that_stores_disagree_on_are_refused(store: ObjectStore, key: str) -> None:
    with pytest.raises(StorageError, match="cannot be the key"):
        store.put(key, b"x")


def test_a_range_is_exact_or_an_error(store: ObjectStore) -> None:
    store.put("a", bytes(range(100)))
    assert store.get_range("a", 10, 20) == bytes(range(10, 20))
    assert store.get_range("a", 99, 100) == b"\x63"
    assert store.get_range("a", 5, 5) == b""
    for start, end in ((90, 101), (100, 101), (500, 600)):
        with pytest.raises(StorageError, match=f"fewer than {end} bytes"):
            store.get_range("a", start, end)
    with pytest.raises(StorageError, match="does not exist"):
        store.get_range("absent", 0, 1)


def test_a_listing_has_the_keys_under_a_prefix_in_order(store: ObjectStore) -> None:
    if isinstance(store, S3Store):
        store.page_size = 2
    for key in ("b/2", "b/10", "b-c/1", "a", "b/x/y"):
        store.put(key, key.encode())
    assert [info.key for info in store.list("")] == ["a", "b-c/1", "b/10", "b/2", "b/x/y"]
    assert [(info.key, info.size_bytes) for info in store.list("b/")] == [("b/10", 4), ("b/2", 3), ("b/x/y", 5)]
    assert [info.key for info in store.list("b/1")] == ["b/10"]
    assert list(store.list("c/")) == []


def test_a_deleted_object_is_gone_and_its_neighbours_are_not(store: ObjectStore) -> None:
    store.put("a/b/c", b"1")
    store.put("a/d", b"2")
    store.delete("a/b/c")
    assert [info.key for info in store.list("")] == ["a/d"]
    assert store.put("a/b/c", b"3", if_absent=True)


def test_only_the_first_creation_wins(store: ObjectStore) -> None:
    store.put("a", b"first", if_absent=True)
    with pytest.raises(ConflictError):
        store.put("a", b"second", if_absent=True)
    blob = store.read("a")
    assert blob is not None
    assert blob.data == b"first"


def test_a_conditional_write_needs_the_content_that_was_read(store: ObjectStore) -> None:
    first = store.put("a", b"first")
    second = store.put("a", b"second", if_match=first)
    with pytest.raises(ConflictError):
        store.put("a", b"third", if_match=first)
    blob = store.read("a")
    assert blob is not None
    assert (blob.data, blob.etag) == (b"second", second)
    with pytest.raises(ConflictError):
        store.put("absent", b"x", if_match=second)
    assert store.read("absent") is None


@pytest.mark.parametrize("size_bytes", [0, 1000, PART_BYTES, PART_BYTES + 1])
def test_an_uploaded_file_is_known_by_its_digest(new_url: Callable[[], str], tmp_path: Path, size_bytes: int) -> None:
    store = open_for_test(new_url())
    path, copy = tmp_path / "file", tmp_path / "copy"
    path.write_bytes(b"0123456789abcdef" * (size_bytes // 16) + b"x" * (size_bytes % 16))
    sha256 = digest_file(path)
    store.upload(path, "a/file", sha256)
    assert store.holds("a/file", size_bytes, sha256)
    assert not store.holds("a/file", size_bytes + 1, sha256)
    assert not store.holds("a/file", size_bytes, digest_bytes(b"other"))
    store.download("a/file", copy)
    assert digest_file(copy) == sha256
    path.write_bytes(b"shorter")
    store.upload(path, "a/file", digest_file(path))
    assert [(info.key, info.size_bytes) for info in store.list("")] == [("a/file", 7)]


@pytest.mark.parametrize("size_bytes", [10, PART_BYTES + 1])
def test_a_file_that_changed_since_it_was_hashed_does_not_appear(
    new_url: Callable[[], str], tmp_path: Path, size_bytes: int
) -> None:
    store = open_for_test(new_url())
    path = tmp_path / "file"
    path.write_bytes(b"x" * size_bytes)
    with pytest.raises(StorageError, match="changed while it was being uploaded"):
        store.upload(path, "releases/file", digest_bytes(b"before"))
    assert list(store.list("")) == []
    assert store.sweep_partial("releases/", datetime.now(UTC) + timedelta(hours=1)) == ()


def test_a_sweep_of_everything_is_refused(store: ObjectStore) -> None:
    for prefix in ("", "/", "../"):
        with pytest.raises(StorageError, match="cannot be the key"):
            store.sweep_partial(prefix, datetime.now(UTC) + timedelta(hours=1))


def test_a_file_that_vanished_before_its_upload_is_named(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*/gone to publish it: No such file") as caught:
        store.upload(tmp_path / "gone", "file", digest_bytes(b"before"))
    assert "run the same command again" in caught.value.hint
    assert list(store.list("")) == []


def test_of_eight_racing_processes_exactly_one_creates(new_url: Callable[[], str]) -> None:
    url = new_url()
    assert _race(url, {"if_absent": True}) == 1


def test_of_eight_racing_processes_exactly_one_moves_on(new_url: Callable[[], str]) -> None:
    url = new_url()
    etag = open_for_test(url).put("raced", b"before")
    assert _race(url, {"if_match": etag}) == 1


def test_of_eight_racing_threads_exactly_one_wins_each_round(store: ObjectStore) -> None:
    barrier = threading.Barrier(NUM_RACERS)

    def write(etag: str, writer: int) -> bool:
        barrier.wait()
        try:
            store.put("raced", f"{etag} {writer}".encode(), if_match=etag)
        except ConflictError:
            return False
        return True

    store.put("raced", b"start")
    with ThreadPoolExecutor(NUM_RACERS) as pool:
        for _ in range(2):
            blob = store.read("raced")
            assert blob is not None
            winners = list(pool.map(write, [blob.etag] * NUM_RACERS, range(NUM_RACERS)))
            assert sum(winners) == 1
            found = store.read("raced")
            assert found is not None
            assert found.data == f"{blob.etag} {winners.index(True)}".encode()


def test_a_reader_sees_whole_contents_while_they_are_replaced(store: ObjectStore) -> None:
    contents = (b"a" * 300_000, b"b" * 200_000)
    is_done = threading.Event()

    def replace_often() -> None:
        for number in range(30):
            store.put("replaced", contents[number % 2])
        is_done.set()

    store.put("replaced", contents[1])
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(replace_often)
        while not is_done.is_set() and not writer.done():
            blob = store.read("replaced")
            assert blob is not None
            assert blob.data in contents
        writer.result()


def test_a_store_that_keeps_its_promises_passes_the_probe_and_stays_clean(store: ObjectStore) -> None:
    probe(store)
    assert [info.key for info in store.list(PROBE_FOLDER)] == []


def _race(url: str, condition: dict[str, object]) -> int:
    """Let processes write the same key at once; return how many won, after checking that the winner's bytes stayed."""
    context = process_context()
    barrier, answers = context.Barrier(NUM_RACERS), context.Queue()
    racers = [
        context.Process(target=race_to_put, args=(url, "raced", writer, condition, barrier, answers))
        for writer in range(NUM_RACERS)
    ]
    for racer in racers:
        racer.start()
    told = [answers.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    winners = [writer for writer, has_won in told if has_won]
    blob = open_for_test(url).read("raced")
    assert blob is not None
    assert blob.data == f"written by {winners[0]}".encode()
    return len(winners)
