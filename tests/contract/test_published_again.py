"""A published release, asked again: what is read of it, from a directory and from a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli.inspect import inspect_command
from pipeline.errors import CorruptReleaseError, DiskFullError
from pipeline.facts import FACTS_FILE
from pipeline.graph.verify import inspect, read_card, verify
from pipeline.publish.report import facts_as_json
from pipeline.settings import Settings
from pipeline.storage.objects import ObjectStore
from pipeline.storage.release import publish_release
from tests.contract.storage_actors import file_names
from tests.factories import make_facts
from tests.small_disk import small_disk

CARD = "# As it was published\nWith a sentence that no template has: ½.\n".encode()
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture
def own_settings(settings: Settings, tmp_path: Path) -> Settings:
    """Settings with a cache of the test's own."""
    return replace(settings, cache_dir=tmp_path / "cache")


@pytest.fixture
def release(store: ObjectStore, tmp_path: Path) -> str:
    """The location of a release whose facts and card are real and whose weights are not."""
    folder = tmp_path / "converted"
    (folder / "assets").mkdir(parents=True)
    (folder / FACTS_FILE).write_text(facts_as_json(make_facts()), encoding="utf-8")
    (folder / "README.md").write_bytes(CARD)
    (folder / WEIGHTS).write_bytes(b"weights" * 1000)
    (folder / "assets" / "size.png").write_bytes(b"png")
    done = publish_release(store, folder, "org", "model", {}, file_names=file_names(folder), verdict_passed=True)
    return done.path_or_uri


def key(store: ObjectStore, release: str, path: str) -> str:
    return f"{release.removeprefix(store.url + '/')}/{path}"


def test_an_inspection_reads_what_it_shows_and_keeps_nothing(
    store: ObjectStore, release: str, own_settings: Settings
) -> None:
    store.delete(key(store, release, WEIGHTS))
    located, facts = inspect(release, own_settings)
    assert (located.uri, facts) == (release, make_facts())
    assert read_card(release, own_settings) == CARD
    assert not own_settings.cache_dir.exists()


def test_the_card_is_shown_as_it_was_published(release: str) -> None:
    shown = CliRunner().invoke(inspect_command, [release, "--card"])
    assert (shown.exit_code, shown.stdout_bytes) == (0, CARD)


@pytest.mark.parametrize("path", [FACTS_FILE, "README.md"])
def test_what_an_inspection_shows_is_what_the_manifest_says(
    store: ObjectStore, release: str, own_settings: Settings, path: str
) -> None:
    read = inspect if path == FACTS_FILE else read_card
    blob = store.read(key(store, release, path))
    assert blob is not None
    store.put(key(store, release, path), blob.data.replace(b"s", b"5", 1))
    with pytest.raises(CorruptReleaseError, match=f"{path} does not match the release's manifest"):
        read(release, own_settings)
    store.delete(key(store, release, path))
    with pytest.raises(CorruptReleaseError, match=f"has no {path}"):
        read(release, own_settings)


def test_a_verification_transfers_each_file_once_and_keeps_none(
    store: ObjectStore, release: str, own_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = type(store).stream
    streamed = []

    def count(self: ObjectStore, key: str) -> Iterator[bytes]:
        streamed.append(key.rpartition("/")[2])
        return stream(self, key)

    monkeypatch.setattr(type(store), "stream", count)
    checks = verify(release, None, own_settings, print).checks
    # The weights are none, which only the structure's check can know.
    assert [(check.name, check.passed) for check in checks] == [("digests", True), ("structure", False)]
    assert "4 files" in checks[0].detail
    assert sorted(streamed) == ["README.md", FACTS_FILE, WEIGHTS, "size.png"]
    assert [path for path in own_settings.cache_dir.rglob("*") if path.is_file()] == []


def test_a_verification_names_every_damaged_file(store: ObjectStore, release: str, own_settings: Settings) -> None:
    store.put(key(store, release, "README.md"), b"another card")
    store.put(key(store, release, WEIGHTS), b"Weights" * 1000)
    store.delete(key(store, release, "assets/size.png"))
    (check,) = verify(release, None, own_settings, print).checks
    assert (check.name, check.passed) == ("digests", False)
    for words in ("README.md has 12 bytes", f"{WEIGHTS} has SHA-256", "assets/size.png is missing"):
        assert words in check.detail
    assert [path for path in own_settings.cache_dir.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("new_url", ["s3"], indirect=True)
def test_copies_that_a_killed_verification_left_are_removed(release: str, own_settings: Settings) -> None:
    left = own_settings.cache_dir / "verify" / "0123"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(b"weights")
    left.with_suffix(".lock").touch()
    verify(release, None, own_settings, print)
    assert list((own_settings.cache_dir / "verify").iterdir()) == []


@pytest.mark.parametrize("new_url", ["s3"], indirect=True)
def test_a_full_cache_is_named(release: str, own_settings: Settings, tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", 4096 * 3) as disk,
        pytest.raises(DiskFullError, match=r"no space left in .*/disk"),
    ):
        verify(release, None, replace(own_settings, cache_dir=disk), print)
