"""Outputs of a job's stages: content-addressed, complete or absent, shared by all workers of a job.

A stage is a few files and a record, which lists them with their digests and is written last. The key is the fingerprint
of everything that affects the stage's bytes, so whoever looks a key up can use what is there, and a rerun redoes
exactly the stages that are not there. When two workers finish the same key, the first one's stage stays; other bytes or
another summary under one key would mean that results depend on luck, and are an error. A stage whose record or files
are damaged is discarded, logged and noted, then absent.

`DirectoryWorkStore` keeps stages on a file system that every worker reaches, `ObjectWorkStore` in an S3 bucket; both
pass one contract suite. A store is opened from its address alone, in each process anew.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import StorageError
from pipeline.fingerprint import digest_file
from pipeline.settings import Settings
from pipeline.storage.manifest import Sha256
from pipeline.storage.objects import check_key, open_store

RECORD_NAME = "record.json"
CACHE_FOLDER = "work-files"
"""Folder of the cache directory for what this machine has of a store that is elsewhere."""

NONDETERMINISTIC = "storage.nondeterministic_stage"
"""Code of the error for two results under one key."""

S3_ATTEMPTS = 8
"""Attempts of a request to a bucket that holds work: a run outlives a minute in which the service fails."""

_STAGE = re.compile(r"[a-z0-9][a-z0-9_-]*")
_KEY = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)

Place = TypeVar("Place", bound=tuple[str, str])
"""A stage and a key."""


class StageFile(NamedTuple):
    """Size and SHA-256 of a stage's file."""

    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class StageRecord(BaseModel):
    """What a finished stage left."""

    # A figure that is not a number stays one for whoever reads it; by default it would be written as null.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    stage: str
    key: str
    """Fingerprint of everything that affects the files."""
    files: dict[str, StageFile]
    summary: dict[str, Any]
    """JSON values that the next stages and the report need without opening a file."""


class DamagedStage(NamedTuple):
    """A stage that was found damaged and discarded."""

    stage: str
    key: str
    reason: str


class StageWriter:
    """A stage in the making, private to its writer until `finish`.

    Attributes:
        record: The finished stage's record; None before.
    """

    def __init__(self, folder: Path, complete: Callable[[dict[str, Any]], StageRecord]) -> None:
        self.record: StageRecord | None = None
        self._folder = folder
        self._complete = complete

    def path(self, name: str) -> Path:
        """Return where to write a file of the stage; its folder exists."""
        if check_key(name) == RECORD_NAME:
            raise StorageError(f"{name!r} is the name of a stage's record", code="storage.key")
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, summary: dict[str, Any]) -> StageRecord:
        """The stage is complete and visible to every worker; returns its record.

        When another worker finished the same key first, its stage stays and its record is returned.

        Raises:
            StorageError: when that other worker's files or summary differ from ours, or the store fails.
            DiskFullError: when there is no space for the files.
        """
        self.record = self._complete(summary)
        return self.record


class WorkStore(Protocol):
    """Finished stages somewhere. All methods may raise `StorageError` and its subclasses.

    Attributes:
        damaged: Stages that this object found damaged and discarded, oldest first, until `take_damaged` takes them.
    """

    damaged: list[DamagedStage]

    @property
    def url(self) -> str:
        """The store's address, which `open_work_store` takes: an absolute path or ``s3://bucket/prefix``."""

    def prepare(self) -> None:
        """The store is known to be fit for a run, and what dead processes left on this machine is gone."""

    def lookup(self, stage: str, key: str) -> StageRecord | None:
        """Return the record of a finished stage, or None. Looks at the files' sizes, not at their bytes.

        A damaged stage is discarded, and counted in `damaged`.

        Raises:
            TargetUnavailableError: when the store cannot be read.
        """

    def lookup_all(self, places: Iterable[Place]) -> dict[Place, StageRecord]:
        """Return the records of those of many stages that are finished; as `lookup`, in as few requests as it takes."""

    def writing(self, stage: str, key: str) -> AbstractContextManager[StageWriter]:
        """Give a private place to write a stage. Without `StageWriter.finish` nothing is kept.

        Raises:
            DiskFullError: also for a file that the block wrote itself.
        """

    def open_checked(self, stage: str, key: str, name: str) -> Path:
        """Return the path of a stage's file whose SHA-256 is the recorded one, checked once per process and file.

        It is to be opened, linked or copied at once: a file on this machine that is a copy may be dropped later.

        Raises:
            StorageError: when the stage or file is not there, or its bytes are damaged; the stage is discarded then.
        """

    def discard(self, stage: str, key: str) -> None:
        """The stage is absent."""

    def take_damaged(self) -> list[DamagedStage]:
        """Return the stages found damaged since the last call, oldest first."""

    def private_folder(self) -> AbstractContextManager[Path]:
        """Give the path of a folder on this machine for one process alone; `sweep` removes it when that is dead."""

    def sweep(self) -> tuple[str, ...]:
        """Remove what dead processes left on this machine's disk or in the directory, and return the names."""


def open_work_store(address: str, settings: Settings) -> WorkStore:
    """Return the work store at a directory's path or ``s3://bucket/prefix``. Nothing is read or written yet.

    Args:
        address: Where the work is; the `WorkStore.url` of another process's store.
        settings: Endpoint and cache directory of this process.

    Raises:
        SpecError: when ``address`` is neither.
        TargetUnavailableError: when the S3 endpoint or its settings cannot be used.
    """
    # Here and not above: these modules need this one's types.
    if address.startswith("s3://"):
        from pipeline.storage.file_cache import FileCache
        from pipeline.storage.work_objects import ObjectWorkStore

        store = open_store(address, settings, attempts=S3_ATTEMPTS)
        return ObjectWorkStore(store, FileCache(settings.cache_dir / CACHE_FOLDER))
    from pipeline.storage.work_directory import DirectoryWorkStore

    return DirectoryWorkStore(Path(address))


def stage_folder(stage: str, key: str) -> str:
    """Return where a stage lies, relative to its store.

    Raises:
        StorageError: when there can be no such stage.
    """
    if not _STAGE.fullmatch(stage) or not _KEY.fullmatch(key):
        raise StorageError(f"{stage!r} with key {key!r} cannot be a stage", code="storage.key")
    return f"{stage}/{key[:2]}/{key}"


def make_record(stage: str, key: str, folder: Path, summary: dict[str, Any]) -> tuple[StageRecord, bytes]:
    """Return the record of a stage whose files lie in ``folder``, and the bytes that stand for it. Raises OSError."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = StageFile(path.stat().st_size, digest_file(path))
    written = StageRecord(stage=stage, key=key, files=files, summary=summary)
    text = json.dumps(written.model_dump(mode="json"), sort_keys=True, indent=1)
    # What every other process will read, so that nothing depends on which one finished the stage.
    return StageRecord.model_validate_json(text), text.encode()


def read_record(data: bytes, stage: str, key: str) -> tuple[StageRecord | None, str]:
    """Return the record that ``data`` stands for, or None and what is wrong with it."""
    try:
        record = StageRecord.model_validate_json(data)
    except ValidationError as error:
        return None, f"{RECORD_NAME} cannot be read: {error.errors(include_url=False)[0]['msg']}"
    if (record.stage, record.key) != (stage, key):
        return None, f"{RECORD_NAME} is that of {record.stage} {record.key[:12]}"
    return record, ""


def check_size(name: str, file: StageFile, found_bytes: int | None) -> str:
    """Return what is wrong with a stage's file as far as its size tells, or nothing; None bytes means no file."""
    if found_bytes is None:
        return f"{name} is missing"
    if found_bytes != file.size_bytes:
        return f"{name} has {found_bytes} bytes, its record says {file.size_bytes}"
    return ""


def require_same(existing: StageRecord, record: StageRecord, url: str) -> StageRecord:
    """Return the record that was there first.

    Raises:
        StorageError: when the second says something else.
    """
    files = sorted(
        name for name in {*existing.files, *record.files} if existing.files.get(name) != record.files.get(name)
    )
    # As texts: a NaN is equal to itself there.
    old, new = (
        {key: json.dumps(value, sort_keys=True) for key, value in one.summary.items()} for one in (existing, record)
    )
    differing = files + [f"summary.{key}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if differing:
        raise StorageError(
            f"two runs of stage {record.stage} {record.key[:12]} in {url} gave different results: "
            f"{', '.join(differing)}",
            code=NONDETERMINISTIC,
            hint="this is a bug or failing memory; remove the work directory and run it again",
        )
    return existing


def missing_file(stage: str, key: str, name: str, url: str) -> StorageError:
    """Return the error for a stage or file that had to be there; it names the stage, which is computed anew."""
    return StorageError(
        f"stage {stage} {key[:12]} has no file {name!r} in {url}",
        code="storage.missing_stage",
        hint="run the same command again: the stage is computed anew",
        context={"stage": stage, "key": key},
    )


def damaged_file(stage: str, key: str, where: str, reason: str) -> StorageError:
    """Return the error for a file whose stage was discarded; it names the stage, which is computed anew."""
    return StorageError(
        f"{where} is damaged: {reason}. The stage was discarded",
        code="storage.damaged_stage",
        hint="run the same command again: the stage is computed anew",
        context={"stage": stage, "key": key},
    )


class DamageLog:
    """The stages that a store found damaged.

    Attributes:
        damaged: Since the last `take_damaged`, oldest first.
    """

    def __init__(self) -> None:
        self.damaged: list[DamagedStage] = []

    def take_damaged(self) -> list[DamagedStage]:
        """Return the stages found damaged since the last call, oldest first."""
        taken, self.damaged = self.damaged, []
        return taken

    def note_damage(self, stage: str, key: str, reason: str) -> None:
        """Log a stage that is being discarded, and remember it."""
        self.damaged.append(DamagedStage(stage, key, reason))
        _log.warning("discarded stage %s %s: %s", stage, key[:12], reason)
