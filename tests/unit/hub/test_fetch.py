"""Fetched files are whole and proven, whatever happened on the way; nothing is fetched twice."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.errors import CorruptWeightsError, DiskFullError, SourceError, SourceNotFoundError, StorageError
from pipeline.fingerprint import fingerprint
from pipeline.hub import client as client_module
from pipeline.hub import digests
from pipeline.hub import fetch as fetch_module
from pipeline.hub.client import MAX_ATTEMPTS
from pipeline.hub.fetch import FetchedSource, fetch
from pipeline.hub.source import Source, needed_files, pin_source
from pipeline.settings import Settings
from tests.loopback_hub import Fault, LoopbackHub

WEIGHTS = "model-00001-of-00002.safetensors"
PIECE = 100_000


@pytest.fixture
def source(hub: LoopbackHub, settings: Settings, model_files: dict[str, bytes]) -> Source:
    hub.add("org/model", model_files)
    pinned = pin_source("org/model", settings)
    hub.requests.clear()
    return pinned


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RANGE_BYTES", PIECE)
    monkeypatch.setattr(fetch_module, "PROGRESS_BYTES", 1)


def quick(source: Source, settings: Settings, waits: list[float] | None = None) -> FetchedSource:
    return fetch(source, settings, sleep=(waits if waits is not None else []).append)


def test_needed_files_arrive_with_their_digests(
    hub: LoopbackHub, settings: Settings, source: Source, model_files: dict[str, bytes]
) -> None:
    told: list[tuple[str, int, int]] = []
    fetched = fetch(source, settings, lambda *event: told.append(event))
    names = [file.path for file in needed_files(source)]
    assert fetched.folder == settings.cache_dir / "sources" / "org/model" / str(source.commit)
    assert fetched.commit == source.commit
    assert {path: (fetched.folder / path).read_bytes() for path in names} == {path: model_files[path] for path in names}
    assert sorted(path.relative_to(fetched.folder).as_posix() for path in fetched.folder.rglob("*.*")) == sorted(
        name for name in names
    )
    assert fetched.digests == {path: hashlib.sha256(model_files[path]).hexdigest() for path in names}
    assert hub.ranges(WEIGHTS) == ["bytes=0-99999", "bytes=100000-199999", "bytes=200000-255999"]
    weights = [(done, total) for path, done, total in told if path == WEIGHTS]
    assert weights == sorted(weights)
    assert weights[-1] == (256_000, 256_000)


def test_a_second_fetch_asks_for_nothing_and_hashes_nothing(
    hub: LoopbackHub, settings: Settings, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quick(source, settings)
    hub.requests.clear()
    monkeypatch.setattr(digests.ContentHasher, "update_from", lambda *args: pytest.fail("hashed again"))
    assert quick(source, settings) == first
    assert hub.requests == []


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone"])
def test_a_damaged_cached_file_is_noticed_and_fetched_again(
    hub: LoopbackHub, settings: Settings, source: Source, model_files: dict[str, bytes], damage: str
) -> None:
    path = quick(source, settings).folder / WEIGHTS
    before = path.stat()
    content = b"!" + path.read_bytes()[1:]
    match damage:
        case "changed":
            path.write_bytes(content)
            # Even a change that puts the modification time back.
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "shorter":
            path.write_bytes(content[:-1])
        case _:
            path.unlink()
    hub.requests.clear()
    quick(source, settings)
    assert path.read_bytes() == model_files[WEIGHTS]
    assert len(hub.ranges("")) == len(hub.ranges(WEIGHTS)) == 3


def test_a_lost_record_costs_hashing_only(hub: LoopbackHub, settings: Settings, source: Source) -> None:
    first = quick(source, settings)
    for record in (settings.cache_dir / "digests").iterdir():
        record.write_text("{not json")
    hub.requests.clear()
    assert quick(source, settings) == first
    assert hub.requests == []


def test_a_part_is_continued(
    hub: LoopbackHub, settings: Settings, source: Source, model_files: dict[str, bytes]
) -> None:
    part = settings.cache_dir / "sources" / "org/model" / str(source.commit) / f"{WEIGHTS}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(model_files[WEIGHTS][:250_000])
    assert (quick(source, settings).folder / WEIGHTS).read_bytes() == model_files[WEIGHTS]
    assert hub.ranges(WEIGHTS) == ["bytes=250000-255999"]
    assert not part.exists()


def test_a_part_longer_than_the_file_is_dropped(
    hub: LoopbackHub, settings: Settings, source: Source, model_files: dict[str, bytes]
) -> None:
    part = settings.cache_dir / "sources" / "org/model" / str(source.commit) / f"{WEIGHTS}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 256_001)
    assert (quick(source, settings).folder / WEIGHTS).read_bytes() == model_files[WEIGHTS]


def test_a_bad_part_is_deleted_and_a_rerun_succeeds(
    settings: Settings, source: Source, model_files: dict[str, bytes]
) -> None:
    folder = settings.cache_dir / "sources" / "org/model" / str(source.commit)
    folder.mkdir(parents=True)
    (folder / f"{WEIGHTS}.part").write_bytes(b"x" * 1000)
    expected = hashlib.sha256(model_files[WEIGHTS]).hexdigest()
    got = hashlib.sha256(b"x" * 1000 + model_files[WEIGHTS][1000:]).hexdigest()
    with pytest.raises(CorruptWeightsError) as caught:
        quick(source, settings)
    assert caught.value.context == {"file": WEIGHTS, "expected": expected, "got": got}
    assert all(word in caught.value.message for word in (f"org/model/{WEIGHTS}", expected, got))
    assert not (folder / f"{WEIGHTS}.part").exists()
    assert not (folder / WEIGHTS).exists()
    assert (quick(source, settings).folder / WEIGHTS).read_bytes() == model_files[WEIGHTS]


@pytest.mark.parametrize("path", ["config.json", WEIGHTS])
def test_wrong_bytes_from_the_hub_are_refused(hub: LoopbackHub, settings: Settings, source: Source, path: str) -> None:
    hub.faults.append(Fault(path, times=9, flip=True))
    with pytest.raises(CorruptWeightsError, match="the hub announced") as caught:
        quick(source, settings)
    assert caught.value.context["file"] == path
    assert not (settings.cache_dir / "sources" / "org/model" / str(source.commit) / path).exists()


def test_dropped_connections_continue_where_they_broke(
    hub: LoopbackHub, settings: Settings, source: Source, model_files: dict[str, bytes]
) -> None:
    hub.faults.append(Fault(WEIGHTS, times=2, drop_after=30_000))
    waits: list[float] = []
    assert (quick(source, settings, waits).folder / WEIGHTS).read_bytes() == model_files[WEIGHTS]
    assert hub.ranges(WEIGHTS)[:3] == ["bytes=0-99999", "bytes=30000-129999", "bytes=60000-159999"]
    assert waits == [1.0, 1.0]


def test_a_server_that_ignores_ranges_is_still_read_right(
    hub: LoopbackHub, settings: Settings, source: Source, model_files: dict[str, bytes]
) -> None:
    hub.faults.append(Fault(WEIGHTS, times=9, ignore_range=True))
    assert (quick(source, settings).folder / WEIGHTS).read_bytes() == model_files[WEIGHTS]
    # The first reply held everything that the later pieces would have been.
    assert hub.ranges(WEIGHTS) == ["bytes=0-99999"]


def test_a_whole_file_that_breaks_off_is_continued_with_the_next_one(
    hub: LoopbackHub, settings: Settings, source: Source, model_files: dict[str, bytes]
) -> None:
    hub.faults.append(Fault(WEIGHTS, ignore_range=True, drop_after=130_000))
    hub.faults.append(Fault(WEIGHTS, times=9, ignore_range=True))
    waits: list[float] = []
    assert (quick(source, settings, waits).folder / WEIGHTS).read_bytes() == model_files[WEIGHTS]
    assert hub.ranges(WEIGHTS) == ["bytes=0-99999", "bytes=130000-229999"]
    assert waits == [1.0]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    wait: float


NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(429, {"Retry-After": "7"}, 7.0),
        Answer(429, {"RateLimit": '"resolvers";r=0;t=55'}, 55.0),
        Answer(503, {"Retry-After": "3"}, 3.0),
        Answer(502, {}, 1.0),
        Answer(429, {"Retry-After": "nonsense"}, 1.0),
    ],
)
def test_a_busy_hub_is_waited_for(hub: LoopbackHub, settings: Settings, source: Source, answer: Answer) -> None:
    hub.faults.append(Fault("config.json", status=answer.status, headers=answer.headers))
    waits: list[float] = []
    quick(source, settings, waits)
    assert waits == [answer.wait]


def test_a_date_to_wait_for_is_read_by_the_servers_clock(
    hub: LoopbackHub, settings: Settings, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.loopback_hub.HubHandler.date_time_string", lambda *a: format_datetime(NOW, usegmt=True))
    until = format_datetime(NOW + timedelta(seconds=42), usegmt=True)
    hub.faults.append(Fault("config.json", status=429, headers={"Retry-After": until}))
    waits: list[float] = []
    quick(source, settings, waits)
    assert waits == [42.0]


def test_patience_begins_anew_after_every_piece(hub: LoopbackHub, settings: Settings, source: Source) -> None:
    hub.faults += [Fault(WEIGHTS, times=2, status=503), Fault(WEIGHTS, times=1, skip=1, status=503)]
    waits: list[float] = []
    quick(source, settings, waits)
    assert waits == [1.0, 2.0, 1.0]


def test_patience_ends(hub: LoopbackHub, settings: Settings, source: Source) -> None:
    hub.faults.append(Fault("config.json", times=99, status=503))
    waits: list[float] = []
    with pytest.raises(SourceNotFoundError, match="HTTP 503: as the test asked"):
        quick(source, settings, waits)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert len(hub.ranges("config.json")) == MAX_ATTEMPTS


def test_a_hub_that_asks_for_an_hour_is_an_error_at_once(hub: LoopbackHub, settings: Settings, source: Source) -> None:
    hub.faults.append(Fault("config.json", status=429, headers={"Retry-After": "3600"}))
    waits: list[float] = []
    with pytest.raises(SourceNotFoundError, match="limits the rate") as caught:
        quick(source, settings, waits)
    assert (waits, caught.value.code) == ([], "source.rate_limited")


@pytest.mark.parametrize("status", [400, 403, 404])
def test_refusals_are_not_repeated(hub: LoopbackHub, settings: Settings, source: Source, status: int) -> None:
    hub.faults.append(Fault("config.json", times=99, status=status))
    with pytest.raises(SourceNotFoundError):
        quick(source, settings)
    assert len(hub.ranges("config.json")) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault("config.json", times=0),
        Fault("config.json", times=99, ignore_range=True),
        Fault("config.json", times=99, ignore_range=True, chunked=True),
    ],
)
def test_a_file_shorter_than_listed_is_corrupt(
    hub: LoopbackHub, settings: Settings, source: Source, fault: Fault
) -> None:
    hub.faults.append(dataclasses.replace(fault))
    files = tuple(
        dataclasses.replace(file, size_bytes=file.size_bytes + 5) if file.path == "config.json" else file
        for file in source.files
    )
    waits: list[float] = []
    with pytest.raises(CorruptWeightsError, match=r"config\.json is shorter on"):
        quick(dataclasses.replace(source, files=files), settings, waits)
    assert waits == []


def test_a_file_without_any_digest_is_refused(settings: Settings, source: Source) -> None:
    files = tuple(dataclasses.replace(file, sha256=None, git_sha1=None) for file in source.files)
    with pytest.raises(SourceError, match="states no digest"):
        quick(dataclasses.replace(source, files=files), settings)


def test_the_token_stays_with_the_hub(tmp_path: Path, settings: Settings, model_files: dict[str, bytes]) -> None:
    with LoopbackHub(token="hf_secret", cdn=True) as hub:
        hub.add("org/model", model_files)
        own = dataclasses.replace(settings, hub_endpoint=hub.url, hub_token="hf_secret")
        fetched = fetch(pin_source("org/model", own), own)
        assert (fetched.folder / WEIGHTS).read_bytes() == model_files[WEIGHTS]
        to_hub = [request for request in hub.requests if request.server == "hub"]
        to_cdn = [request for request in hub.requests if request.server == "cdn"]
    assert all(request.headers["authorization"] == "Bearer hf_secret" for request in to_hub)
    assert [request.headers["range"] for request in to_cdn if request.path.partition("?")[0].endswith(WEIGHTS)] == [
        "bytes=0-99999",
        "bytes=100000-199999",
        "bytes=200000-255999",
    ]
    assert not any("hf_secret" in f"{request.path} {request.headers}" for request in to_cdn)


def test_a_failing_cdn_does_not_put_signatures_into_messages(
    tmp_path: Path, settings: Settings, model_files: dict[str, bytes]
) -> None:
    with LoopbackHub(cdn=True) as hub:
        hub.add("org/model", model_files)
        own = dataclasses.replace(settings, hub_endpoint=hub.url)
        source = pin_source("org/model", own)
        hub.faults.append(Fault(WEIGHTS, times=99, status=503))
        with pytest.raises(SourceNotFoundError) as caught:
            quick(source, own)
    assert "signature" not in str(caught.value)


def test_too_little_space_is_said_before_downloading(
    hub: LoopbackHub, settings: Settings, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr("pipeline.hub.fetch.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match="384 kB are to be fetched, 1 kB are free"):
        quick(source, settings)
    assert hub.requests == []


def test_a_disk_that_fills_up_is_said_with_what_is_needed(
    settings: Settings, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.hub.fetch.os.write", full)
    with pytest.raises(DiskFullError, match=r"LICENSE\.txt: no space left; 12 B more are needed"):
        quick(source, settings)


def test_a_cache_that_cannot_be_written_is_named(settings: Settings, source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = dataclasses.replace(settings, cache_dir=tmp_path / "file" / "cache")
    with pytest.raises(StorageError, match="cannot be written: Not a directory") as caught:
        quick(source, blocked)
    assert "BITMILL_CACHE" in caught.value.hint


@pytest.fixture
def folder(tmp_path: Path, model_files: dict[str, bytes]) -> Path:
    for path, content in model_files.items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_bytes(content)
    return tmp_path / "model"


def test_a_folder_is_used_in_place_and_identified_by_content(
    settings: Settings, folder: Path, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(folder.rglob("*"))
    source = pin_source(str(folder), settings)
    fetched = fetch(source, settings)
    names = [file.path for file in needed_files(source)]
    assert fetched.folder == folder
    assert fetched.digests == {path: hashlib.sha256(model_files[path]).hexdigest() for path in names}
    assert fetched.commit == fingerprint(fetched.digests)
    assert sorted(folder.rglob("*")) == before
    moved = folder.rename(folder.with_name("elsewhere"))
    assert fetch(pin_source(str(moved), settings), settings).commit == fetched.commit
    monkeypatch.setattr(digests.ContentHasher, "update_from", lambda *args: pytest.fail("hashed again"))
    assert fetch(pin_source(str(moved), settings), settings).commit == fetched.commit


def test_a_changed_folder_has_another_identity(settings: Settings, folder: Path) -> None:
    first = fetch(pin_source(str(folder), settings), settings)
    (folder / "picture.png").write_bytes(b"not needed, not part of it")
    assert fetch(pin_source(str(folder), settings), settings).commit == first.commit
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes().replace(b"L", b"l"))
    assert fetch(pin_source(str(folder), settings), settings).commit != first.commit


def test_progress_is_told_in_steps_and_at_the_end_of_every_file(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "PROGRESS_BYTES", 4 << 20)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(bytes((21 << 20) + 5))
    told: list[tuple[str, int, int]] = []
    fetch(pin_source(str(folder), settings), settings, lambda *event: told.append(event))
    total = (21 << 20) + 5
    steps = [4 << 20, 8 << 20, 12 << 20, 16 << 20, 20 << 20, total]
    assert told == [("config.json", 2, 2), *(("model.safetensors", done, total) for done in steps)]


def test_progress_starts_again_with_a_file_that_is_fetched_again(
    settings: Settings, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "PROGRESS_BYTES", PIECE)
    path = quick(source, settings).folder / WEIGHTS
    path.write_bytes(b"!" + path.read_bytes()[1:])
    told: list[int] = []
    fetch(source, settings, lambda name, done, total: told.append(done) if name == WEIGHTS else None)
    assert (told[0], told[-1]) == (256_000, 256_000)
    again = told[1:]
    assert again == sorted(set(again))
    assert again[0] < 256_000
    assert all(after - before >= PIECE for before, after in itertools.pairwise(again[:-1]))


def test_a_folder_that_another_process_fetches_into_is_waited_for_and_said(
    hub: LoopbackHub, settings: Settings, source: Source
) -> None:
    folder = settings.cache_dir / "sources" / "org/model" / str(source.commit)
    folder.parent.mkdir(parents=True)
    other = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    said: list[str] = []

    def go_on(reason: str) -> None:
        said.append(reason)
        assert hub.requests == []
        os.close(other)

    assert (fetch(source, settings, on_wait=go_on).folder / WEIGHTS).is_file()
    (reason,) = said
    assert str(folder) in reason
    fetch(source, settings, on_wait=said.append)
    assert len(said) == 1


def test_a_folder_that_changes_while_it_is_read_is_refused(settings: Settings, folder: Path) -> None:
    source = pin_source(str(folder), settings)
    (folder / WEIGHTS).write_bytes(b"still being copied")
    with pytest.raises(CorruptWeightsError, match="had 256000 bytes a moment ago and has 18 now"):
        fetch(source, settings)
    (folder / WEIGHTS).unlink()
    with pytest.raises(SourceNotFoundError, match="No such file"):
        fetch(source, settings)


def test_weights_can_stay_on_the_hub_and_are_known_by_what_it_announces(
    hub: LoopbackHub, settings: Settings, source: Source, model_files: dict[str, bytes]
) -> None:
    fetched = fetch(source, settings, with_weights=False)
    assert fetched.digests == fetch(source, settings).digests
    assert not [path for path in source.weight_files if path not in fetched.digests]
    hub.requests.clear()
    again = dataclasses.replace(settings, cache_dir=settings.cache_dir / "other")
    fetch(source, again, with_weights=False)
    assert not [request for request in hub.requests if request.path.endswith(".safetensors")]
    assert not list(again.cache_dir.rglob("*.safetensors"))


def test_weights_without_an_announced_digest_do_not_stay(settings: Settings, source: Source) -> None:
    files = tuple(dataclasses.replace(file, sha256=None) for file in source.files)
    with pytest.raises(SourceError, match=r"00001-of-00002\.safetensors: the hub states no SHA-256") as caught:
        fetch(dataclasses.replace(source, files=files), settings, with_weights=False)
    assert caught.value.code == "source.no_digest"
    assert "--stream" in caught.value.hint
