"""Outputs of a job's stages: content-addressed, finished by one rename, shared by all workers of a job.

Layout: ``root/<stage>/<key[:2]>/<key>/`` holds the files of one finished stage and ``record.json``, which lists them
with their digests. A stage is written in a private folder; finishing flushes and hashes its files, writes the record
last and renames the folder into place. So a folder at its place is complete, a killed writer leaves only a temporary
that the next `WorkStore.sweep` removes, and a rerun redoes exactly the stages that are not there.

The key is the fingerprint of everything that affects the stage's bytes. When two workers finish the same key, the
first one's folder stays; other bytes or another summary under one key would mean that results depend on luck, and are
an error. A stage whose record or files are damaged is discarded, logged and noted in `WorkStore.damaged`, then absent.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.disk import disk_errors, make_folders, sync, write_file
from pipeline.errors import StorageError
from pipeline.fingerprint import digest_file
from pipeline.storage.manifest import Sha256
from pipeline.storage.objects import check_key
from pipeline.storage.temporaries import Temporaries, exclusive_lock

RECORD_NAME = "record.json"
_PRIVATE_FOLDER = ".tmp"
_STAGE = re.compile(r"[a-z0-9][a-z0-9_-]*")
_KEY = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


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

    def __init__(self, store: WorkStore, stage: str, key: str, folder: Path) -> None:
        self.record: StageRecord | None = None
        self._store = store
        self._stage = stage
        self._key = key
        self._folder = folder

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
            StorageError: when that other worker's files or summary differ from ours.
            DiskFullError: when the work directory is full.
        """
        with self._store.errors():
            files = {}
            for path in sorted(path for path in self._folder.rglob("*") if path.is_file()):
                sync(path)
                name = path.relative_to(self._folder).as_posix()
                files[name] = StageFile(path.stat().st_size, digest_file(path))
            record = StageRecord(stage=self._stage, key=self._key, files=files, summary=summary)
            text = json.dumps(record.model_dump(mode="json"), sort_keys=True, indent=1)
            # What every other process will read, so that nothing depends on which one finished the stage.
            record = StageRecord.model_validate_json(text)
            write_file(self._folder / RECORD_NAME, (text.encode(),))
            for path in [self._folder, *(path for path in self._folder.rglob("*") if path.is_dir())]:
                sync(path)
            self.record = self._store.place(self._folder, record)
        return self.record


class WorkStore:
    """Finished stages under one directory. Cheap to make and to pickle; all state is on disk but the two lists.

    Attributes:
        root: Absolute path of the directory.
        damaged: Stages that this object found damaged and discarded, oldest first, until `take_damaged` takes them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.damaged: list[DamagedStage] = []
        self._temporaries = Temporaries(self.root / _PRIVATE_FOLDER)
        self._checked: dict[Path, tuple[int, int, int]] = {}

    def __reduce__(self) -> tuple[type[WorkStore], tuple[Path]]:
        # What was checked in this process says nothing about another one.
        return WorkStore, (self.root,)

    def stage_dir(self, stage: str, key: str) -> Path:
        """Return the folder of a stage, which exists only once it is finished."""
        if not _STAGE.fullmatch(stage) or not _KEY.fullmatch(key):
            raise StorageError(f"{stage!r} with key {key!r} cannot be a stage", code="storage.key")
        return self.root / stage / key[:2] / key

    def lookup(self, stage: str, key: str) -> StageRecord | None:
        """Return the record of a finished stage, or None. Looks at the files' sizes, not at their bytes.

        A damaged stage is discarded, and counted in `damaged`.

        Raises:
            TargetUnavailableError: when the work directory cannot be read.
        """
        folder = self.stage_dir(stage, key)
        with self.errors():
            record, reason = _inspect(folder, stage, key)
            if not reason:
                return record
            # Look again under the lock: what we saw may have been discarded, and redone by another worker since.
            with self._claim() as aside, self._lock():
                record, reason = _inspect(folder, stage, key)
                if reason:
                    self._note_damage(stage, key, reason)
                    folder.rename(aside)
            return record

    @contextmanager
    def writing(self, stage: str, key: str) -> Iterator[StageWriter]:
        """Give a private place to write a stage. Without `StageWriter.finish` nothing is kept.

        Raises:
            DiskFullError: also for a file that the block wrote itself.
        """
        self.stage_dir(stage, key)
        with ExitStack() as stack:
            with self.errors():
                folder = stack.enter_context(self._claim())
                folder.mkdir()
            # The block may fail on files of its own, which have nothing to do with this directory.
            with self.errors(only_full=True):
                yield StageWriter(self, stage, key, folder)

    def open_checked(self, stage: str, key: str, name: str) -> Path:
        """Return the path of a stage's file whose SHA-256 is the recorded one, checked once per process and file.

        Raises:
            StorageError: when the stage or file is not there, or its bytes are damaged; the stage is discarded then.
        """
        record = self.lookup(stage, key)
        if record is None or name not in record.files:
            raise StorageError(
                f"stage {stage} {key[:12]} has no file {name!r} in {self.root}",
                code="storage.missing_stage",
                hint="run the same command again: the stage is computed anew",
            )
        path = self.stage_dir(stage, key) / name
        with self.errors():
            facts = path.stat()
            seen = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if self._checked.get(path) == seen:
                return path
            found = digest_file(path)
        if found != record.files[name].sha256:
            reason = f"{name} has SHA-256 {found}, its record says {record.files[name].sha256}"
            self._note_damage(stage, key, reason)
            self.discard(stage, key)
            raise StorageError(
                f"{path} is damaged: {reason}. The stage was discarded",
                code="storage.damaged_stage",
                hint="run the same command again: the stage is computed anew",
            )
        self._checked[path] = seen
        return path

    def discard(self, stage: str, key: str) -> None:
        """The stage is absent."""
        folder = self.stage_dir(stage, key)
        with self.errors():
            if folder.exists():
                with self._claim() as aside, self._lock():
                    if folder.exists():
                        folder.rename(aside)

    def take_damaged(self) -> list[DamagedStage]:
        """Return the stages found damaged since the last call, oldest first; `damaged` is empty then."""
        taken, self.damaged = self.damaged, []
        return taken

    def sweep(self) -> tuple[str, ...]:
        """Remove the temporaries of dead processes, and return their names."""
        with self.errors():
            return self._temporaries.sweep()

    def place(self, folder: Path, record: StageRecord) -> StageRecord:
        """Rename a complete folder to its place unless a sound one is there; return the record that is in force."""
        target = self.stage_dir(record.stage, record.key)
        with self._claim() as aside, self._lock():
            existing, reason = _inspect(target, record.stage, record.key)
            if reason:
                self._note_damage(record.stage, record.key, reason)
                target.rename(aside)
            if existing is None:
                make_folders(target.parent)
                folder.rename(target)
                sync(target.parent)
                return record
        differing = _differences(existing, record)
        if differing:
            raise StorageError(
                f"two runs of stage {record.stage} {record.key[:12]} in {self.root} gave different results: "
                f"{', '.join(differing)}",
                code="storage.nondeterministic_stage",
                hint="this is a bug or failing memory; remove the work directory and run it again",
            )
        return existing

    def errors(self, *, only_full: bool = False) -> AbstractContextManager[None]:
        """Turn OSErrors of a block, or only those of a full disk, into StorageErrors that name the work directory."""
        return disk_errors(
            f"the work directory {self.root}",
            hint="free some space there, or choose another directory with --work-dir; finished stages are kept",
            only_full=only_full,
        )

    def _claim(self) -> AbstractContextManager[Path]:
        make_folders(self._temporaries.folder)
        return self._temporaries.claim()

    def _lock(self) -> AbstractContextManager[None]:
        return exclusive_lock(self._temporaries.folder / "commit")

    def _note_damage(self, stage: str, key: str, reason: str) -> None:
        self.damaged.append(DamagedStage(stage, key, reason))
        _log.warning("discarded stage %s %s: %s", stage, key[:12], reason)


def _differences(one: StageRecord, other: StageRecord) -> list[str]:
    """Return the files and the summary's keys in which two records of one stage differ."""
    files = sorted(name for name in {*one.files, *other.files} if one.files.get(name) != other.files.get(name))
    # As texts: a NaN is equal to itself there.
    texts = [
        {key: json.dumps(value, sort_keys=True) for key, value in record.summary.items()} for record in (one, other)
    ]
    keys = sorted(key for key in {*one.summary, *other.summary} if texts[0].get(key) != texts[1].get(key))
    return files + [f"summary.{key}" for key in keys]


def _inspect(folder: Path, stage: str, key: str) -> tuple[StageRecord | None, str]:
    """Return the record of a sound stage, or None, and what is wrong when there is something but it is not sound."""
    try:
        data = (folder / RECORD_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None, f"{RECORD_NAME} is missing" if folder.exists() else ""
    try:
        record = StageRecord.model_validate_json(data)
    except ValidationError as error:
        return None, f"{RECORD_NAME} cannot be read: {error.errors(include_url=False)[0]['msg']}"
    if (record.stage, record.key) != (stage, key):
        return None, f"{RECORD_NAME} is that of {record.stage} {record.key[:12]}"
    for name, file in record.files.items():
        try:
            size_bytes = os.stat(folder / name).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None, f"{name} is missing"
        if size_bytes != file.size_bytes:
            return None, f"{name} has {size_bytes} bytes, its record says {file.size_bytes}"
    return record, ""
