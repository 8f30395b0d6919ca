"""A work store in a directory: each stage finished by one rename.

Layout: ``root/<stage>/<key[:2]>/<key>/`` holds the files of one finished stage and ``record.json``. A stage is written
in a private folder; finishing flushes and hashes its files, writes the record last and renames the folder into place.
So a folder at its place is complete, a killed writer leaves only a temporary that the next `DirectoryWorkStore.sweep`
removes, and what lacks a record or a file was damaged from outside.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.disk import disk_errors, make_folders, sync, write_file
from pipeline.fingerprint import digest_file
from pipeline.storage.temporaries import Temporaries, exclusive_lock
from pipeline.storage.work import (
    RECORD_NAME,
    DamageLog,
    Place,
    StageRecord,
    StageWriter,
    check_size,
    damaged_file,
    make_record,
    missing_file,
    read_record,
    require_same,
    stage_folder,
)

_PRIVATE_FOLDER = ".tmp"


class DirectoryWorkStore(DamageLog):
    """A `WorkStore` under one directory. Cheap to make and to pickle; all state is on disk but the two lists.

    Attributes:
        root: Absolute path of the directory.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root.expanduser().absolute()
        self._temporaries = Temporaries(self.root / _PRIVATE_FOLDER)
        self._checked: dict[Path, tuple[int, int, int]] = {}

    def __reduce__(self) -> tuple[type[DirectoryWorkStore], tuple[Path]]:
        # What was checked in this process says nothing about another one.
        return DirectoryWorkStore, (self.root,)

    @property
    def url(self) -> str:
        """The directory's absolute path."""
        return str(self.root)

    def stage_dir(self, stage: str, key: str) -> Path:
        """Return the folder of a stage, which exists only once it is finished."""
        return self.root / stage_folder(stage, key)

    def prepare(self) -> None:
        """The directory is there, and what dead processes left in it is gone."""
        with self._errors():
            self.root.mkdir(parents=True, exist_ok=True)
        self.sweep()

    def lookup(self, stage: str, key: str) -> StageRecord | None:
        """Return the record of a finished stage, or None. Looks at the files' sizes, not at their bytes.

        A damaged stage is discarded, and counted in `damaged`.

        Raises:
            TargetUnavailableError: when the work directory cannot be read.
        """
        folder = self.stage_dir(stage, key)
        with self._errors():
            record, reason = _inspect(folder, stage, key)
            if not reason:
                return record
            # Look again under the lock: what we saw may have been discarded, and redone by another worker since.
            with self._claim() as aside, self._lock():
                record, reason = _inspect(folder, stage, key)
                if reason:
                    self.note_damage(stage, key, reason)
                    folder.rename(aside)
            return record

    def lookup_all(self, places: Iterable[Place]) -> dict[Place, StageRecord]:
        """Return the records of those of many stages that are finished."""
        return {place: record for place in places if (record := self.lookup(*place)) is not None}

    @contextmanager
    def writing(self, stage: str, key: str) -> Iterator[StageWriter]:
        """Give a private place to write a stage. Without `StageWriter.finish` nothing is kept.

        Raises:
            DiskFullError: also for a file that the block wrote itself.
        """
        self.stage_dir(stage, key)
        with self.private_folder() as folder, self._errors(only_full=True):
            # The block may fail on files of its own, which have nothing to do with this directory.
            yield StageWriter(folder, lambda summary: self._complete(folder, stage, key, summary))

    def open_checked(self, stage: str, key: str, name: str) -> Path:
        """Return the path of a stage's file whose SHA-256 is the recorded one, checked once per process and file.

        Raises:
            StorageError: when the stage or file is not there, or its bytes are damaged; the stage is discarded then.
        """
        record = self.lookup(stage, key)
        if record is None or name not in record.files:
            raise missing_file(stage, key, name, self.url)
        path = self.stage_dir(stage, key) / name
        with self._errors():
            try:
                facts = path.stat()
                seen = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
                if self._checked.get(path) == seen:
                    return path
                found = digest_file(path)
            except FileNotFoundError as error:  # another process has discarded it since the look at its record
                raise missing_file(stage, key, name, self.url) from error
        if found != record.files[name].sha256:
            reason = f"{name} has SHA-256 {found}, its record says {record.files[name].sha256}"
            self.note_damage(stage, key, reason)
            self.discard(stage, key)
            raise damaged_file(stage, key, str(path), reason)
        self._checked[path] = seen
        return path

    def discard(self, stage: str, key: str) -> None:
        """The stage is absent."""
        folder = self.stage_dir(stage, key)
        with self._errors():
            if folder.exists():
                with self._claim() as aside, self._lock():
                    if folder.exists():
                        folder.rename(aside)

    @contextmanager
    def private_folder(self) -> Iterator[Path]:
        """Give the path of a folder for one process alone, on the work directory's disk; `sweep` removes it when the
        process is dead."""
        with ExitStack() as stack:
            with self._errors():
                folder = stack.enter_context(self._claim())
                folder.mkdir()
            yield folder

    def sweep(self) -> tuple[str, ...]:
        """Remove the temporaries of dead processes, and return their names."""
        with self._errors():
            return self._temporaries.sweep()

    def _complete(self, folder: Path, stage: str, key: str, summary: dict[str, Any]) -> StageRecord:
        """Flush and record a folder and rename it to its place unless a sound stage is there; return the record that
        is in force."""
        with self._errors():
            for path in folder.rglob("*"):
                if path.is_file():
                    sync(path)
            record, text = make_record(stage, key, folder, summary)
            write_file(folder / RECORD_NAME, (text,))
            for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
                sync(path)
            target = self.stage_dir(stage, key)
            with self._claim() as aside, self._lock():
                existing, reason = _inspect(target, stage, key)
                if reason:
                    self.note_damage(stage, key, reason)
                    target.rename(aside)
                if existing is None:
                    make_folders(target.parent)
                    folder.rename(target)
                    sync(target.parent)
                    return record
        return require_same(existing, record, self.url)

    def _errors(self, *, only_full: bool = False) -> AbstractContextManager[None]:
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


def _inspect(folder: Path, stage: str, key: str) -> tuple[StageRecord | None, str]:
    """Return the record of a sound stage, or None, and what is wrong when there is something but it is not sound."""
    try:
        data = (folder / RECORD_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None, f"{RECORD_NAME} is missing" if folder.exists() else ""
    record, reason = read_record(data, stage, key)
    if record is None:
        return None, reason
    for name, file in record.files.items():
        try:
            found_bytes = os.stat(folder / name).st_size
        except (FileNotFoundError, NotADirectoryError):
            found_bytes = None
        if reason := check_size(name, file, found_bytes):
            return None, reason
    return record, ""
