"""Tensors read by range: right, once for a machine, within bounds, and never two different things."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from pipeline.errors import CorruptWeightsError, SourceNotFoundError
from pipeline.storage.file_cache import FileCache
from pipeline.tensors.local import read_folder_index
from pipeline.tensors.reader import expect_tensors
from pipeline.tensors.streamed import StreamedTensors
from pipeline.tensors.writer import write_safetensors

SEGMENT = 4096
FILE = "model.safetensors"


class Book:
    """Digests that several readers share."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, str]] = {}

    def known(self, key: str, names: Sequence[str]) -> Mapping[str, str] | None:
        return self.written.get(key)

    def write_down(self, key: str, digests: Mapping[str, str]) -> None:
        self.written[key] = dict(digests)


class Place:
    """A folder that stands for somewhere far away, and its readers."""

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            f"block.{number}.{name}": torch.randn(40, 50, generator=generator)
            for number in range(6)
            for name in ("a", "b")
        } | {"flag": torch.tensor([True, False]), "none": torch.zeros(0)}
        self.folder, self.book = folder / "source", Book()
        self.folder.mkdir()
        write_safetensors(self.folder / FILE, self.tensors, {})
        self.data = (self.folder / FILE).read_bytes()
        self.asked: list[tuple[int, int]] = []
        self.wrong: set[int] = set()
        self.is_down = False

    def read_range(self, path: str, start: int, end: int) -> bytes:
        if self.is_down:
            raise SourceNotFoundError("the hub is gone")
        self.asked.append((start, end))
        data = self.data[start:end]
        return bytes(255 - byte for byte in data) if start in self.wrong else data

    def reader(self, cache: FileCache) -> StreamedTensors:
        groups = [[f"block.{number}.a", f"block.{number}.b"] for number in range(6)] + [["flag", "none"]]
        digests = {FILE: hashlib.sha256(self.data).hexdigest()}
        index = read_folder_index(self.folder)
        return StreamedTensors(index, {FILE: len(self.data)}, digests, self.read_range, cache, self.book, groups)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr("pipeline.tensors.streamed.SEGMENT_BYTES", SEGMENT)
    return Place(tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> FileCache:
    return FileCache(tmp_path / "cache", grace_s=0)


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_tensors_are_those_of_the_file_and_every_segment_comes_once(place: Place, cache: FileCache) -> None:
    first, second = place.reader(cache), place.reader(cache)
    for reader in (first, second):
        assert same(reader.read(place.tensors), place.tensors)
    assert len(place.asked) == len(set(place.asked))
    assert all(end - start <= SEGMENT and start % SEGMENT == 0 for start, end in place.asked)


def test_readers_that_start_together_transfer_once(place: Place, cache: FileCache) -> None:
    readers = [threading.Thread(target=place.reader(cache).read, args=(list(place.tensors),)) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(place.asked) == len(set(place.asked))


def test_only_the_groups_that_are_read_are_transferred(place: Place, cache: FileCache) -> None:
    place.reader(cache).read(["block.2.a"])
    # Eight thousand bytes a tensor, two in the group, and what shares a segment with them.
    assert sum(end - start for start, end in place.asked) <= 2 * 8000 + 2 * SEGMENT


def test_a_cache_that_holds_less_than_a_block_costs_transfers_and_no_disk(place: Place, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", max_bytes=2 * (SEGMENT + 4), grace_s=0)
    reader = place.reader(cache)
    for name in place.tensors:
        assert same(reader.read([name]), {name: place.tensors[name]})
        assert sum(path.stat().st_size for path in cache.folder.glob("[!.]*/*")) <= 3 * (SEGMENT + 4)


def test_what_is_expected_is_there_before_it_is_read(place: Place, cache: FileCache) -> None:
    reader = place.reader(cache)
    block = ["block.3.a", "block.3.b"]
    reader.expect(block)
    entries = [read_folder_index(place.folder).entries[name][1] for name in block]
    wanted = {byte // SEGMENT for entry in entries for byte in range(entry.start_bytes, entry.end_bytes)}
    deadline = time.monotonic() + 30
    while len(place.asked) < len(wanted) and time.monotonic() < deadline:
        time.sleep(0.005)
    reader.close()
    place.is_down = True
    assert same(reader.read(["block.3.a"]), {"block.3.a": place.tensors["block.3.a"]})


def test_what_cannot_be_read_ahead_is_an_error_only_when_it_is_read(place: Place, cache: FileCache) -> None:
    reader = place.reader(cache)
    place.is_down = True
    reader.expect(["block.3.a"])
    reader.close()
    with pytest.raises(SourceNotFoundError, match="the hub is gone"):
        reader.read(["block.3.a"])


def test_a_tensor_that_comes_otherwise_than_before_is_an_error_for_every_reader(place: Place, tmp_path: Path) -> None:
    place.reader(FileCache(tmp_path / "one")).read(place.tensors)
    place.wrong = {2 * SEGMENT}
    other = place.reader(FileCache(tmp_path / "other"))
    with pytest.raises(CorruptWeightsError, match=r"came with SHA-256 .*, and before with") as caught:
        other.read(place.tensors)
    assert caught.value.code == "source.digest"
    place.wrong = set()
    assert same(place.reader(FileCache(tmp_path / "other")).read(["flag"]), {"flag": place.tensors["flag"]})


def test_a_wrong_segment_of_this_machine_is_fetched_again(place: Place, tmp_path: Path) -> None:
    place.wrong = {2 * SEGMENT}
    bad = FileCache(tmp_path / "bad")
    place.reader(bad).read(place.tensors)
    place.wrong, place.book = set(), Book()
    place.reader(FileCache(tmp_path / "good")).read(place.tensors)
    assert same(place.reader(bad).read(place.tensors), place.tensors)


def test_a_segment_that_rots_is_fetched_again_before_it_is_used(place: Place, cache: FileCache) -> None:
    place.reader(cache).expect(place.tensors)
    place.reader(cache).read(place.tensors)
    place.book = Book()
    for path in cache.folder.glob("[!.]*/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert same(place.reader(cache).read(place.tensors), place.tensors)


def test_a_file_read_from_end_to_end_has_its_digest_and_those_of_its_tensors(place: Place, cache: FileCache) -> None:
    reader = place.reader(cache)
    reader.read(["block.0.a"])
    before = set(cache.folder.glob("[!.]*/*"))
    whole, tensors = reader.digest_tensors(FILE)
    assert whole == hashlib.sha256(place.data).hexdigest()
    assert tensors == {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in place.tensors.items()
    }
    assert set(cache.folder.glob("[!.]*/*")) == before
    written = {name: sha256 for group in place.book.written.values() for name, sha256 in group.items()}
    assert written.items() <= tensors.items()
    reader.forget(FILE)
    assert not list(cache.folder.glob("[!.]*/*"))


def test_a_file_that_became_shorter_is_corrupt(place: Place, cache: FileCache) -> None:
    reader = place.reader(cache)
    place.data = place.data[: 3 * SEGMENT + 10]
    with pytest.raises(CorruptWeightsError, match=r"model\.safetensors ends before byte"):
        reader.read(place.tensors)


def test_tensors_of_a_folder_are_announced_to_the_system_by_their_ranges(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda _, start, length, advice: told.append((start, length)))
    index = read_folder_index(place.folder)
    expect_tensors(place.folder, index, ["block.1.a", "block.4.b"])
    entries = [index.entries[name][1] for name in ("block.1.a", "block.4.b")]
    assert told == [(entry.start_bytes, entry.num_bytes) for entry in entries]
    (place.folder / FILE).unlink()
    expect_tensors(place.folder, index, ["block.1.a"])
