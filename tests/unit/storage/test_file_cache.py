"""Copies of files on one machine: bounded, and never taken away from who has just been given one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import DiskFullError
from pipeline.storage.file_cache import FileCache
from tests.small_disk import small_disk


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def put(cache: FileCache, name: str, content: bytes) -> Path:
    with cache.private_folder() as folder:
        (folder / "file").write_bytes(content)
        return cache.add(name, folder / "file")


def present(cache: FileCache) -> set[str]:
    return {path.name for path in cache.folder.glob("[!.]*/*")}


def test_an_entry_is_found_by_every_process_and_dropped_when_asked(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache")
    assert cache.find("abc") is None
    path = put(cache, "abc", b"content")
    assert FileCache(tmp_path / "cache").find("abc") == path
    assert path.read_bytes() == b"content"
    put(cache, "abc", b"content")
    assert present(cache) == {"abc"}
    cache.drop("abc")
    cache.drop("abc")
    assert cache.find("abc") is None


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    clock = Clock()
    cache = FileCache(tmp_path / "cache", max_bytes=250, grace_s=10, clock=clock)
    for number in range(3):
        put(cache, f"name-{number}", bytes(80))
        clock.now_s += 20
    assert cache.find("name-0") is not None
    clock.now_s += 20
    put(cache, "name-3", bytes(80))
    assert present(cache) == {"name-0", "name-2", "name-3"}


def test_what_was_used_a_moment_ago_stays_though_the_bound_is_passed(tmp_path: Path) -> None:
    clock = Clock()
    cache = FileCache(tmp_path / "cache", max_bytes=100, grace_s=10, clock=clock)
    put(cache, "old", bytes(80))
    clock.now_s += 5
    put(cache, "new", bytes(80))
    assert present(cache) == {"old", "new"}
    clock.now_s += 6
    put(cache, "newer", bytes(80))
    assert present(cache) == {"new", "newer"}


def test_what_earlier_processes_left_counts(tmp_path: Path) -> None:
    clock = Clock()
    put(FileCache(tmp_path / "cache", max_bytes=100, grace_s=0, clock=clock), "old", bytes(90))
    clock.now_s += 1
    put(FileCache(tmp_path / "cache", max_bytes=100, grace_s=0, clock=clock), "new", bytes(90))
    assert present(FileCache(tmp_path / "cache")) == {"new"}


def test_a_full_disk_is_named_with_the_way_out(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        cache = FileCache(disk / "cache")
        with (
            pytest.raises(DiskFullError, match=r"the cache .*/disk/cache") as caught,
            cache.private_folder() as folder,
            cache.errors(),
        ):
            (folder / "file").write_bytes(bytes(4 << 20))
        assert "BITMILL_CACHE" in caught.value.hint
