"""Stores that cannot be used, each refused with its name, the reason and a next step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ConditionalWriteError, DiskFullError, SpecError, TargetUnavailableError
from pipeline.fingerprint import digest_file
from pipeline.settings import Settings, load_settings
from pipeline.storage.directory import DirectoryStore
from pipeline.storage.objects import open_store
from pipeline.storage.probe import probe
from pipeline.storage.refs import read_ref
from pipeline.storage.release import list_releases, publish_release
from tests.contract.conftest import BUCKET
from tests.contract.storage_actors import file_names
from tests.s3_server import S3Server, careless_server, environment_for
from tests.small_disk import make_read_only, small_disk


@pytest.fixture
def s3_settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Credentials of the test servers, and nothing of the user's own."""
    for name, value in environment_for("").items():
        monkeypatch.setenv(name, value)
    return load_settings()


def test_a_store_that_ignores_conditions_is_refused(s3_settings: Settings, tmp_path: Path) -> None:
    with careless_server(tmp_path / "served", "b-1") as endpoint:
        store = open_store("s3://b-1/models", replace(s3_settings, s3_endpoint=endpoint))
        with pytest.raises(ConditionalWriteError, match=r"s3://b-1/models .*it overwrote an object") as caught:
            probe(store)
        assert "publish to a store that does" in caught.value.hint
        assert list(store.list("")) == []


def test_a_missing_bucket_is_named_with_the_command_that_makes_it(s3_server: S3Server) -> None:
    store = open_store("s3://not-there/models", load_settings())
    for use in (lambda: probe(store), lambda: store.head("a"), lambda: store.read("a"), lambda: list(store.list(""))):
        with pytest.raises(TargetUnavailableError, match=f"'not-there' at {s3_server.endpoint}: no such bucket") as it:
            use()
        assert it.value.hint == f"create it: aws s3 mb s3://not-there --endpoint-url {s3_server.endpoint}"


def test_wrong_credentials_are_named(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(TargetUnavailableError, match=f"{BUCKET}.* HTTP 403") as caught:
        probe(open_store(f"s3://{BUCKET}/x", load_settings()))
    assert "check the credentials" in caught.value.hint


def test_absent_credentials_are_named(s3_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(TargetUnavailableError, match="no credentials") as caught:
        probe(open_store("s3://b-1", replace(s3_settings, s3_endpoint="http://127.0.0.1:9")))
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://127.0.0.1:9", "Could not connect"),
        ("not a url", "Invalid endpoint"),
        ("127.0.0.1:1", "Invalid endpoint"),
    ],
)
def test_an_endpoint_that_does_not_answer_is_named(s3_settings: Settings, endpoint: str, reason: str) -> None:
    with pytest.raises(TargetUnavailableError, match=f"b-1.*{reason}") as caught:
        probe(open_store("s3://b-1/models", replace(s3_settings, s3_endpoint=endpoint)))
    assert endpoint in caught.value.message
    assert "AWS_ENDPOINT_URL_S3" in caught.value.hint


@pytest.mark.parametrize("url", ["", "s3://", "s3:///models", "s3://a b/models", "gs://bucket/models", "http://host/x"])
def test_what_is_no_target_is_refused(s3_settings: Settings, url: str) -> None:
    with pytest.raises(SpecError, match=r"names no bucket|not a target"):
        open_store(url, s3_settings)


def test_a_directory_in_a_missing_folder_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(TargetUnavailableError, match="parent folder does not exist") as caught:
        probe(DirectoryStore(tmp_path / "not" / "there"))
    assert caught.value.hint == f"mkdir -p {tmp_path / 'not'}"
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetUnavailableError, match="is not a directory"):
        probe(DirectoryStore(tmp_path / "file"))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        make_read_only(disk)
        with pytest.raises(TargetUnavailableError, match=r"no access to .*/disk: Read-only file system"):
            probe(DirectoryStore(disk))


def test_a_full_directory_is_named_and_holds_nothing_half_done(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * (2 << 20))
    names = file_names(folder)
    with small_disk(tmp_path / "disk") as disk:
        store = DirectoryStore(disk)
        for _ in range(2):
            with pytest.raises(DiskFullError, match=r"no space left in .*/disk") as caught:
                publish_release(store, folder, "org", "model", {}, file_names=names, verdict_passed=True)
            assert "choose another target" in caught.value.hint
            assert list_releases(store) == ()
            assert read_ref(store, "org", "model", "main") is None
            assert [info.key.rpartition("/")[2] for info in store.list("")] == ["config.json"]
        assert sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()) == 2
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
        assert publish_release(store, folder, "org", "model", {}, file_names=names, verdict_passed=True).refs == (
            "main",
        )


def test_a_full_disk_under_a_download_is_named(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    (tmp_path / "big").write_bytes(b"x" * (2 << 20))
    store.upload(tmp_path / "big", "big", digest_file(tmp_path / "big"))
    with small_disk(tmp_path / "disk") as disk:
        with pytest.raises(DiskFullError, match=r"no space left in .*/disk"):
            store.download("big", disk / "big")
        assert list(disk.iterdir()) == []
