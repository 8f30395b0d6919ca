"""Publishing, finding and checking releases, on a directory and on a real S3 server."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import ConflictError, CorruptReleaseError, SpecError, StorageError, TargetUnavailableError
from pipeline.fingerprint import digest_bytes
from pipeline.graph.convert import ref_sequences
from pipeline.settings import Settings
from pipeline.storage.locate import (
    copy_release,
    download_release,
    locate_release,
    require_own_files,
    verify_release_files,
)
from pipeline.storage.manifest import MANIFEST_NAME, Manifest, release_prefix
from pipeline.storage.objects import ObjectStore, open_store
from pipeline.storage.refs import FENCED, MAX_HISTORY, Ref, move_ref, read_ref
from pipeline.storage.release import (
    PARTIAL_UPLOAD_AGE,
    ListedRelease,
    PublishedRelease,
    StoredFile,
    list_releases,
    publish_release,
)
from tests.contract.conftest import BUCKET
from tests.contract.storage_actors import (
    PART_BYTES,
    PROVENANCE,
    file_names,
    open_for_test,
    process_context,
    publish_and_die,
)
from tests.s3_server import S3Server

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ADDRESS = ("org", "model-GPTQ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files as a converter leaves them."""
    folder = tmp_path / "converted"
    (folder / "assets").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"0123456789abcdef" * 100)
    (folder / "assets" / "size.png").write_bytes(b"png")
    return folder


def publish(store: ObjectStore, folder: Path, **changed: object) -> PublishedRelease:
    arguments: dict[str, object] = {
        "provenance": PROVENANCE,
        "file_names": file_names(folder),
        "verdict_passed": True,
        "now": lambda: NOW,
        **changed,
    }
    return publish_release(store, folder, *ADDRESS, **arguments)  # type: ignore[arg-type]


def tomorrow() -> datetime:
    """A time at which everything that was left behind now is old."""
    return datetime.now(UTC) + PARTIAL_UPLOAD_AGE + timedelta(minutes=5)


def contents(store: ObjectStore, prefix: str = "releases/") -> dict[str, str]:
    """Every object's digest."""
    return {info.key: digest_bytes(b"".join(store.stream(info.key))) for info in store.list(prefix)}


def test_a_published_release_is_found_listed_and_intact(store: ObjectStore, settings: Settings, folder: Path) -> None:
    published = publish(store, folder)
    assert published.path_or_uri == f"{store.url}/releases/org/model-GPTQ/{published.revision}"
    assert (published.url, published.refs, published.num_uploaded) == (store.url, ("main",), 3)
    assert list_releases(store) == (ListedRelease(*ADDRESS, published.revision, ("main",)),)
    by_name = f"{store.url}/releases/org/model-GPTQ"
    locations = [
        by_name,
        f"{by_name}/",
        f"{by_name}@main",
        f"{by_name}@{published.revision}",
        published.path_or_uri,
        f"{published.path_or_uri}/manifest.json",
    ]
    for location in locations:
        located = locate_release(location, settings)
        assert (located.namespace, located.name, located.revision) == (*ADDRESS, published.revision)
        assert located.uri == published.path_or_uri
        assert (located.local_path is None) == store.url.startswith("s3://")
    assert verify_release_files(located) == []
    assert [file.path for file in located.manifest.files] == ["assets/size.png", "config.json", "model.safetensors"]
    assert located.manifest.provenance == PROVENANCE


def test_publishing_again_uploads_nothing_and_changes_nothing(store: ObjectStore, folder: Path) -> None:
    first = publish(store, folder)
    before = contents(store, "")
    again = publish(store, folder, now=lambda: NOW + timedelta(days=1))
    assert (again.revision, again.num_uploaded) == (first.revision, 0)
    assert contents(store, "") == before


def test_a_release_does_not_depend_on_when_it_is_published(
    new_url: Callable[[], str], settings: Settings, folder: Path
) -> None:
    stores = [open_store(new_url(), settings) for _ in range(2)]
    for days, store in enumerate(stores):
        publish(store, folder, now=lambda days=days: NOW + timedelta(days=days))
    assert contents(stores[0]) == contents(stores[1])


def test_other_content_provenance_or_verdict_is_another_revision(store: ObjectStore, folder: Path) -> None:
    revisions = {publish(store, folder).revision}
    revisions.add(publish(store, folder, provenance=PROVENANCE | {"commit": "d" * 40}).revision)
    revisions.add(publish(store, folder, verdict_passed=False, refs=()).revision)
    (folder / "config.json").write_text("{}")
    revisions.add(publish(store, folder).revision)
    assert len(revisions) == 4
    assert {found.revision for found in list_releases(store)} == revisions


def test_a_release_that_failed_its_gates_gets_no_ref(store: ObjectStore, folder: Path) -> None:
    with pytest.raises(StorageError, match="did not pass its gates"):
        publish(store, folder, verdict_passed=False)
    assert contents(store, "") == {}
    failed = publish(store, folder, verdict_passed=False, refs=())
    with pytest.raises(StorageError, match="did not pass its gates"):
        move_ref(store, *ADDRESS, "main", failed.revision)
    assert read_ref(store, *ADDRESS, "main") is None


def test_a_ref_cannot_point_at_what_is_not_finished(store: ObjectStore) -> None:
    with pytest.raises(StorageError, match="not a finished release"):
        move_ref(store, *ADDRESS, "main", "a" * 64)


def test_names_that_cannot_be_addresses_are_refused_before_anything_is_written(
    store: ObjectStore, folder: Path
) -> None:
    for namespace, name, ref in (("a/b", "n", "main"), ("a", "..", "main"), ("a", "n", "@"), ("", "n", "main")):
        with pytest.raises(SpecError, match="cannot be the"):
            publish_release(
                store,
                folder,
                namespace,
                name,
                PROVENANCE,
                file_names=file_names(folder),
                verdict_passed=True,
                refs=(ref,),
            )
    assert contents(store, "") == {}


def test_a_ref_keeps_its_history(store: ObjectStore, folder: Path) -> None:
    revisions = []
    for version in range(3):
        (folder / "config.json").write_text(f"{version}")
        revisions.append(publish(store, folder, now=lambda version=version: NOW + timedelta(hours=version)).revision)
    move_ref(store, *ADDRESS, "main", revisions[0], now=lambda: NOW + timedelta(hours=9))
    ref = read_ref(store, *ADDRESS, "main")
    assert ref is not None
    assert (ref.sequence, ref.revision, ref.previous) == (4, revisions[0], revisions[2])
    assert [(move.sequence, move.revision) for move in ref.history] == [
        (3, revisions[2]),
        (2, revisions[1]),
        (1, revisions[0]),
    ]
    assert [move.updated_at for move in ref.history] == [NOW + timedelta(hours=hours) for hours in (2, 1, 0)]


@pytest.mark.parametrize("has_ref", [False, True])
def test_a_job_that_comes_after_another_one_moves_nothing(store: ObjectStore, folder: Path, has_ref: bool) -> None:
    if has_ref:
        publish(store, folder, provenance=PROVENANCE | {"commit": "a" * 40})
    (seen,) = ref_sequences([store], ADDRESS[0], [ADDRESS[1]]).values()
    assert seen == int(has_ref)
    other = publish(store, folder, provenance=PROVENANCE | {"commit": "b" * 40}, seen={"main": seen})
    ref = read_ref(store, *ADDRESS, "main")
    with pytest.raises(ConflictError, match=r"was moved to .* since this job began") as caught:
        publish(store, folder, seen={"main": seen})
    assert caught.value.code == FENCED
    assert read_ref(store, *ADDRESS, "main") == ref
    assert ref is not None
    assert ref.revision == other.revision
    assert [found.revision for found in list_releases(store) if found.refs] == [other.revision]
    # Who publishes the same as the other one is not late.
    assert publish(store, folder, provenance=PROVENANCE | {"commit": "b" * 40}, seen={"main": seen}) == replace(
        other, num_uploaded=0
    )


def test_racing_moves_of_a_ref_lose_none(store: ObjectStore, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    revisions = []
    for version in range(8):
        (small / "config.json").write_text(f"{version}")
        revisions.append(publish(store, small, refs=()).revision)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda revision: move_ref(store, *ADDRESS, "main", revision), revisions))
    ref = read_ref(store, *ADDRESS, "main")
    assert ref is not None
    assert ref.sequence == 8
    assert {ref.revision, *(move.revision for move in ref.history)} == set(revisions)


def test_racing_publishers_of_the_same_bytes_all_succeed(store: ObjectStore, folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        published = list(pool.map(lambda _: publish(store, folder), range(8)))
    assert len({found.revision for found in published}) == 1
    ref = read_ref(store, *ADDRESS, "main")
    assert ref is not None
    assert ref.sequence == 1


def test_a_history_is_bounded_while_its_numbers_go_on() -> None:
    ref = Ref(sequence=1, revision="0" * 64, updated_at=NOW, previous=None, history=())
    for number in range(1, MAX_HISTORY + 6):
        ref = ref.moved_to(f"{number:064x}", NOW)
    assert (ref.sequence, len(ref.history)) == (MAX_HISTORY + 6, MAX_HISTORY)
    assert ref.history[0].revision == ref.previous


def test_every_kind_of_damage_is_named(store: ObjectStore, settings: Settings, folder: Path) -> None:
    for name in ("lost.txt", "short.txt", "other.txt"):
        (folder / name).write_text("content")
    published = publish(store, folder)
    prefix = release_prefix(*ADDRESS, published.revision)
    store.delete(f"{prefix}lost.txt")
    store.put(f"{prefix}short.txt", b"cont")
    store.put(f"{prefix}other.txt", b"CONTENT")
    store.put(f"{prefix}added.txt", b"x")
    problems = verify_release_files(locate_release(published.path_or_uri, settings))
    assert [problem.split(" ", 1)[0] for problem in problems] == ["lost.txt", "other.txt", "short.txt", "added.txt"]
    for word, problem in zip(("missing", "SHA-256", "bytes", "not in"), problems, strict=True):
        assert word in problem
    assert publish(store, folder).num_uploaded == 3
    assert verify_release_files(locate_release(published.path_or_uri, settings)) == ["added.txt is not in the manifest"]


def test_a_folder_without_a_manifest_is_not_a_release(store: ObjectStore, settings: Settings, folder: Path) -> None:
    published = publish(store, folder)
    other = release_prefix("org", "other", "b" * 64)
    store.put(f"{other}config.json", b"{}")
    with pytest.raises(CorruptReleaseError, match="not a finished release") as caught:
        locate_release(f"{store.url}/{other}", settings)
    assert f"{store.url}/releases/org/model-GPTQ@main" in caught.value.hint
    assert [found.revision for found in list_releases(store)] == [published.revision]


def test_a_wrong_location_says_what_is_there(store: ObjectStore, settings: Settings, folder: Path) -> None:
    publish(store, folder)
    for location in ("releases/org/absent", "releases/org/model-GPTQ@beta", f"releases/org/model-GPTQ/{'e' * 64}"):
        with pytest.raises(StorageError) as caught:
            locate_release(f"{store.url}/{location}", settings)
        assert caught.value.code == "storage.release_not_found"
        assert f"{store.url}/releases/org/model-GPTQ@main" in caught.value.hint


def test_an_edited_manifest_is_refused(store: ObjectStore, settings: Settings, folder: Path) -> None:
    published = publish(store, folder)
    key = release_prefix(*ADDRESS, published.revision) + MANIFEST_NAME
    blob = store.read(key)
    assert blob is not None
    for data, reason in (
        (blob.data.replace(b'"verdict_passed": true', b'"verdict_passed": false'), "changed after it was published"),
        (blob.data.replace(b'"config.json"', b'"../config.json"'), "not a release's manifest"),
        (blob.data[:-20], "not a release's manifest"),
    ):
        assert data != blob.data
        store.put(key, data)
        with pytest.raises(CorruptReleaseError, match=reason):
            locate_release(published.path_or_uri, settings)
        with pytest.raises(CorruptReleaseError, match="other content"):
            publish(store, folder)


def test_a_manifest_in_another_releases_folder_is_refused(store: ObjectStore, settings: Settings, folder: Path) -> None:
    published = publish(store, folder)
    blob = store.read(release_prefix(*ADDRESS, published.revision) + MANIFEST_NAME)
    assert blob is not None
    moved = release_prefix("org", "copied", published.revision)
    store.put(moved + MANIFEST_NAME, blob.data)
    with pytest.raises(CorruptReleaseError, match="holds the manifest of org/model-GPTQ"):
        locate_release(f"{store.url}/{moved}", settings)


def test_a_copy_has_the_files_of_the_release(
    store: ObjectStore, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    located = locate_release(publish(store, folder).path_or_uri, settings)
    copy = tmp_path / "copy"
    assert copy_release(located, copy) == []
    assert {name: (copy / name).read_bytes() for name in file_names(copy)} == {
        name: (folder / name).read_bytes() for name in file_names(folder)
    }


def test_only_a_folder_of_the_release_s_own_files_is_downloaded_to(
    store: ObjectStore, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    located = locate_release(publish(store, folder).path_or_uri, settings)
    copy = tmp_path / "copy"
    require_own_files(located, copy)
    (copy / "assets").mkdir(parents=True)
    half_written = copy / "assets" / f".size.png.{'a' * 32}.part"
    half_written.write_bytes(b"pn")
    (copy / "config.json").write_text("interrupted")
    require_own_files(located, copy)
    assert not half_written.exists()
    assert (copy / "config.json").exists()
    others = f".other.png.{'a' * 32}.part"
    (copy / "assets" / others).write_bytes(b"not ours")
    with pytest.raises(StorageError, match=rf"not of org/model-GPTQ: assets/{others}") as caught:
        require_own_files(located, copy)
    assert caught.value.code == "storage.folder_in_use"
    assert (copy / "assets" / others).exists()


def test_a_download_goes_on_where_it_was_interrupted(
    store: ObjectStore, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    located = locate_release(publish(store, folder).path_or_uri, settings)
    copy = tmp_path / "copy"
    (copy / "assets").mkdir(parents=True)
    (copy / "config.json").write_text("interrupted")
    download_release(located, copy)
    found = locate_release(str(copy), settings)
    assert verify_release_files(found) == []
    assert (found.manifest, found.local_path) == (located.manifest, copy)


def test_a_damaged_file_is_not_downloaded(store: ObjectStore, settings: Settings, folder: Path, tmp_path: Path) -> None:
    located = locate_release(publish(store, folder).path_or_uri, settings)
    store.put(located.prefix + "config.json", b"damaged")
    with pytest.raises(CorruptReleaseError, match=r"config\.json does not match"):
        download_release(located, tmp_path / "copy")
    assert not (tmp_path / "copy" / "config.json").exists()
    assert not (tmp_path / "copy" / MANIFEST_NAME).exists()


def test_a_copy_does_not_trust_what_is_there_already(
    store: ObjectStore, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    located = locate_release(publish(store, folder).path_or_uri, settings)
    copy_release(located, tmp_path / "copy")
    store.put(located.prefix + "config.json", b'{"model_type": "lLama"}')
    (problem,) = copy_release(located, tmp_path / "copy")
    assert "config.json has SHA-256" in problem
    store.delete(located.prefix + "config.json")
    store.put(located.prefix + "added.txt", b"x")
    assert copy_release(located, tmp_path / "copy") == ["config.json is missing", "added.txt is not in the manifest"]


@pytest.mark.parametrize("case", ["empty", "absent", "manifest"])
def test_a_folder_that_cannot_be_a_release_is_refused(store: ObjectStore, tmp_path: Path, case: str) -> None:
    folder = tmp_path / case
    if case != "absent":
        folder.mkdir()
    if case == "manifest":
        (folder / MANIFEST_NAME).write_text("{}")
    with pytest.raises(StorageError, match=r"no files to publish|rename or remove it"):
        publish(store, folder)
    assert contents(store, "") == {}


def test_a_folder_with_other_files_than_were_written_is_refused(store: ObjectStore, folder: Path) -> None:
    names = file_names(folder)
    (folder / "assets" / "size.png").unlink()
    (folder / "notes.txt").write_text("of another job")
    with pytest.raises(StorageError, match=r"assets/size\.png is missing, notes\.txt was not written by") as caught:
        publish(store, folder, file_names=names)
    assert str(folder) in caught.value.message
    assert "run the same command again" in caught.value.hint
    (folder / "notes.txt").unlink()
    with pytest.raises(StorageError, match="is missing"):
        publish(store, folder, file_names=names)
    with pytest.raises(StorageError, match=r"model\.safetensors was not written by"):
        publish(store, folder, file_names={"config.json"})
    assert contents(store, "") == {}


def test_a_lost_answer_to_the_manifests_creation_is_no_conflict(store: ObjectStore, folder: Path) -> None:
    """What an HTTP client's retry does: the write took place, its repetition is refused."""

    class LosesAnswers:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def put(self, key: str, data: bytes, **condition: object) -> str:
            store.put(key, data, **condition)  # type: ignore[arg-type]
            raise ConflictError(f"{key} is there already")

    published = publish(LosesAnswers(), folder)  # type: ignore[arg-type]
    ref = read_ref(store, *ADDRESS, "main")
    assert ref is not None
    assert (ref.revision, ref.sequence) == (published.revision, 1)


def test_a_file_that_vanishes_before_the_manifest_stops_the_release(store: ObjectStore, folder: Path) -> None:
    class LosesFiles:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def upload(self, path: Path, key: str, sha256: str) -> None:
            if path.name != "config.json":
                store.upload(path, key, sha256)

    with pytest.raises(StorageError, match=r"config\.json vanished"):
        publish(LosesFiles(), folder)  # type: ignore[arg-type]
    assert list_releases(store) == ()
    assert read_ref(store, *ADDRESS, "main") is None


def test_a_publisher_killed_anywhere_leaves_nothing_half_done_and_a_rerun_completes_it(
    new_url: Callable[[], str], settings: Settings, folder: Path
) -> None:
    # Larger than an upload's part.
    (folder / "model.safetensors").write_bytes(b"0123456789abcdef" * (PART_BYTES // 16) + b"tail")
    undisturbed = open_for_test(new_url())
    revision = publish(undisturbed, folder).revision
    expected = contents(undisturbed)
    num_killed = 0
    # The first five requests only look what is there.
    for step in itertools.count(6 if undisturbed.url.startswith("s3://") else 1):
        url = new_url()
        process = process_context().Process(target=publish_and_die, args=(url, str(folder), dict(os.environ), step))
        process.start()
        process.join()
        store = open_for_test(url)
        _require_whole_or_nothing(store, settings, revision)
        publish(store, folder, now=tomorrow)
        assert store.sweep_partial("releases/org/", tomorrow()) == ()
        assert contents(store) == expected
        assert list_releases(store) == (ListedRelease(*ADDRESS, revision, ("main",)),)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        num_killed += 1
        leftovers = {info.key for info in store.list("")} - expected.keys() - {"refs/org/model-GPTQ/main"}
        assert leftovers == set()
    assert num_killed > 8


def _require_whole_or_nothing(store: ObjectStore, settings: Settings, revision: str) -> None:
    for found in list_releases(store):
        assert found.revision == revision
        located = locate_release(f"{store.url}/{release_prefix(*ADDRESS, revision)}", settings)
        assert verify_release_files(located) == []
    ref = read_ref(store, *ADDRESS, "main")
    assert ref is None or [found.refs for found in list_releases(store)] == [("main",)]


def test_publishing_gives_up_old_uploads_of_the_same_release_and_no_others(s3_server: S3Server, folder: Path) -> None:
    client = s3_server.client()
    root = uuid.uuid4().hex
    mine = f"{root}/releases/org/model-GPTQ/{'b' * 64}/model.safetensors"
    others = {
        f"{root}/releases/org/model-GPTQ-2/{'b' * 64}/model.safetensors",
        f"{root}/releases/other/model-GPTQ/{'b' * 64}/model.safetensors",
        f"{root}-2/releases/org/model-GPTQ/{'b' * 64}/model.safetensors",
        f"somebody-elses-{root}",
    }
    for key in (mine, *others):
        client.create_multipart_upload(Bucket=BUCKET, Key=key)

    def unfinished() -> set[str]:
        found = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
        return {upload["Key"] for upload in found if root in upload["Key"]}

    store = open_for_test(f"s3://{BUCKET}/{root}")
    publish(store, folder, now=lambda: datetime.now(UTC))
    assert unfinished() == {mine, *others}
    publish(store, folder, now=tomorrow)
    assert unfinished() == others


def test_a_store_that_refuses_to_list_leftovers_takes_the_release_all_the_same(
    store: ObjectStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class RefusesSweeps:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def sweep_partial(self, prefix: str, before: datetime) -> tuple[str, ...]:
            raise TargetUnavailableError(f"listing unfinished uploads under {prefix} failed: HTTP 403")

    with caplog.at_level(logging.WARNING):
        publish(RefusesSweeps(), folder)  # type: ignore[arg-type]
    assert [found.refs for found in list_releases(store)] == [("main",)]
    assert "listing unfinished uploads under releases/org/model-GPTQ/ failed: HTTP 403" in caplog.text


def test_a_ref_that_is_no_ref_is_refused(store: ObjectStore) -> None:
    store.put("refs/org/model-GPTQ/main", b"not json")
    with pytest.raises(CorruptReleaseError, match="refs/org/model-GPTQ/main is not a ref"):
        read_ref(store, *ADDRESS, "main")


def test_a_manifest_has_one_text(store: ObjectStore, folder: Path) -> None:
    published = publish(store, folder)
    blob = store.read(release_prefix(*ADDRESS, published.revision) + MANIFEST_NAME)
    assert blob is not None
    assert Manifest.model_validate_json(blob.data).to_bytes() == blob.data
    assert str(folder) not in blob.data.decode()


def test_what_people_and_engines_look_at_comes_last(store: ObjectStore, folder: Path) -> None:
    """An upload that stops in the middle leaves no card that says that a release was verified, nor a config."""
    uploaded: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def upload(self, path: Path, key: str, sha256: str) -> None:
            uploaded.append(path.relative_to(folder).as_posix())
            store.upload(path, key, sha256)

    (folder / "README.md").write_text("**Verified:** all checks passed.")
    (folder / "tokenizer.json").write_text("{}")
    publish(Watched(), folder)  # type: ignore[arg-type]
    assert uploaded == ["assets/size.png", "model.safetensors", "tokenizer.json", "config.json", "README.md"]


def test_stored_files_are_asked_for_one_at_a_time_and_only_where_they_are_missing(
    store: ObjectStore, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    contents = {f"model-{number}.safetensors": bytes([number]) * 1000 for number in range(3)}
    placed: list[str] = []

    def place(name: str, path: Path) -> None:
        assert {file.name for file in folder.iterdir()} == {"config.json"}, "one at a time"
        placed.append(name)
        path.write_bytes(contents[name])

    stored = {name: StoredFile(1000, digest_bytes(data), partial(place, name)) for name, data in contents.items()}

    def publish() -> PublishedRelease:
        names = {"config.json"}
        return publish_release(store, folder, *ADDRESS, {}, file_names=names, stored=stored, verdict_passed=True)

    done = publish()
    assert placed == sorted(contents)
    prefix = release_prefix(*ADDRESS, done.revision)
    for name, data in contents.items():
        found = store.read(prefix + name)
        assert found is not None
        assert found.data == data
    assert publish().num_uploaded == 0
    assert placed == sorted(contents)


def test_a_stored_file_of_other_bytes_is_not_published(store: ObjectStore, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    stored = {"model.safetensors": StoredFile(4, digest_bytes(b"good"), lambda path: void(path.write_bytes(b"evil")))}
    names = {"config.json"}
    with pytest.raises(StorageError, match="SHA-256"):
        publish_release(store, folder, *ADDRESS, {}, file_names=names, stored=stored, verdict_passed=True)
    assert list_releases(store) == ()
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def void(result: object) -> None:
    """Drop a result."""
