"""A work store in an object store: workers on any machine share it, a second driver elsewhere continues.

Layout: below ``<stage>/<key[:2]>/<key>/`` lie a stage's files, each under its SHA-256, and ``record.json``, created
last with If-None-Match. So a stage with a record is complete; the second writer of a key finds the first one's record
and never touches its files; a killed writer leaves files that its rerun writes again under the same names, and that
nothing reads. Objects vanish or rot only by somebody else's hand: what is missing, too short or has another digest than
recorded is discarded with its stage.

Files are read through a cache on this machine, by digest: a file that was written or read here is not transferred
again. A stage is written in a private folder of that cache.

Deleting is not conditional: who discards a damaged stage late may take away what another worker has just redone. That
costs doing it once more; wrong bytes cannot come of it, as every file is checked against the record before it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import ConflictError, StorageError
from pipeline.fingerprint import digest_file
from pipeline.settings import load_settings
from pipeline.storage.file_cache import FileCache
from pipeline.storage.objects import MISSING_OBJECT, ObjectStore
from pipeline.storage.probe import probe
from pipeline.storage.work import (
    RECORD_NAME,
    DamageLog,
    Place,
    StageRecord,
    StageWriter,
    WorkStore,
    check_size,
    damaged_file,
    make_record,
    missing_file,
    open_work_store,
    read_record,
    require_same,
    stage_folder,
)

REQUESTS_AT_ONCE = 10
"""Records read at a time: as many connections as the S3 client keeps."""

LISTED_FROM = 20
"""Stages of one kind from which on a listing of all of them is asked for instead of each record."""

MAX_COLLISIONS = 5
"""Times that a record is found in the way and then gone, after which the store is taken to be at fault."""


class ObjectWorkStore(DamageLog):
    """A `WorkStore` in an object store. Cheap to make and to pickle: only its address travels.

    Attributes:
        store: Where stages are.
        cache: This machine's copies of their files.
    """

    def __init__(self, store: ObjectStore, cache: FileCache) -> None:
        super().__init__()
        self.store = store
        self.cache = cache
        self._records: dict[tuple[str, str], StageRecord] = {}
        self._checked: dict[Path, tuple[int, int, int]] = {}

    def __reduce__(self) -> Any:
        return _open_here, (self.url,)

    @property
    def url(self) -> str:
        """``s3://bucket/prefix``."""
        return self.store.url

    def prepare(self) -> None:
        """The store has proved that it can be written to and honours conditional writes; what dead processes left on
        this machine is gone.

        Raises:
            ConditionalWriteError: when two writers of a stage could overwrite each other's record.
            TargetUnavailableError: when it cannot be reached or written to.
        """
        probe(self.store)
        self.sweep()

    def lookup(self, stage: str, key: str) -> StageRecord | None:
        """Return the record of a finished stage, or None. Looks at the files' sizes, not at their bytes.

        A damaged stage is discarded, and counted in `damaged`. One request for a stage that is not there, two for one
        that is.
        """
        record, reason = self._inspect(stage, key)
        if reason:
            # Look again: what we saw may have been discarded, and redone by another worker since.
            record, reason = self._inspect(stage, key)
            if reason:
                self.note_damage(stage, key, reason)
                self.discard(stage, key)
        if record is not None:
            self._records[stage, key] = record
        return record

    def lookup_all(self, places: Iterable[Place]) -> dict[Place, StageRecord]:
        """Return the records of those of many stages that are finished.

        Each kind of stage is listed once, and of what is there the records are read, some at a time.
        """
        wanted: dict[str, list[Place]] = {}
        for place in dict.fromkeys(places):
            wanted.setdefault(place[0], []).append(place)
        found: dict[Place, StageRecord] = {}
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            for stage, own in wanted.items():
                sizes = self._sizes(stage) if len(own) >= LISTED_FROM else None
                listed = own if sizes is None else [place for place in own if _record_key(*place) in sizes]
                records = pool.map(partial(self._known, sizes=sizes), listed)
                found |= {place: record for place, record in zip(listed, records, strict=True) if record is not None}
        return {place: found[place] for own in wanted.values() for place in own if place in found}

    @contextmanager
    def writing(self, stage: str, key: str) -> Iterator[StageWriter]:
        """Give a private place to write a stage. Without `StageWriter.finish` nothing is kept.

        Raises:
            DiskFullError: also for a file that the block wrote itself.
        """
        stage_folder(stage, key)
        with self.private_folder() as folder, self.cache.errors(only_full=True):
            yield StageWriter(folder, lambda summary: self._complete(folder, stage, key, summary))

    def open_checked(self, stage: str, key: str, name: str) -> Path:
        """Return the path of a copy of a stage's file whose SHA-256 is the recorded one, checked once per process.

        Nothing is asked of the store when this process knows the record and this machine has the file.

        Raises:
            StorageError: when the stage or file is not there, or its bytes are damaged; the stage is discarded then.
        """
        record = self._records.get((stage, key)) or self.lookup(stage, key)
        if record is None or name not in record.files:
            raise missing_file(stage, key, name, self.url)
        sha256 = record.files[name].sha256
        path = self.cache.find(sha256)
        if path is not None and self._is_sound(path, sha256):
            return path
        return self._transfer(stage, key, name, sha256)

    def discard(self, stage: str, key: str) -> None:
        """The stage is absent: its record goes first, so that it is never without its files."""
        self._records.pop((stage, key), None)
        present = [info.key for info in self.store.list(stage_folder(stage, key) + "/")]
        for name in sorted(present, key=lambda name: not name.endswith("/" + RECORD_NAME)):
            self.store.delete(name)

    @contextmanager
    def private_folder(self) -> Iterator[Path]:
        """Give the path of a folder for one process alone, on this machine's disk; `sweep` removes it when the process
        is dead."""
        with self.cache.private_folder() as folder:
            yield folder

    def sweep(self) -> tuple[str, ...]:
        """Remove the private folders of dead processes of this machine, and return their names."""
        return self.cache.sweep()

    def _inspect(self, stage: str, key: str, sizes: Mapping[str, int] | None = None) -> tuple[StageRecord | None, str]:
        """Return the record of a sound stage, or None, and what is wrong when there is one but it is not sound.

        Args:
            stage: The stage.
            key: Its key.
            sizes: Sizes of all objects of the stage, if they are known; they are asked for otherwise.
        """
        blob = self.store.read(_record_key(stage, key))
        if blob is None:
            return None, ""
        record, reason = read_record(blob.data, stage, key)
        if record is None:
            return None, reason
        folder = stage_folder(stage, key) + "/"
        sizes = self._sizes(folder) if sizes is None else sizes
        for name, file in record.files.items():
            if reason := check_size(name, file, sizes.get(folder + file.sha256)):
                return None, reason
        return record, ""

    def _known(self, place: tuple[str, str], sizes: Mapping[str, int] | None) -> StageRecord | None:
        """Return what `lookup` does, with fewer requests for a stage that was listed."""
        record, _ = self._inspect(*place, sizes) if sizes is not None else (None, "")
        if record is None:
            return self.lookup(*place)
        self._records[place] = record
        return record

    def _sizes(self, prefix: str) -> dict[str, int]:
        return {info.key: info.size_bytes for info in self.store.list(prefix.rstrip("/") + "/")}

    def _complete(self, folder: Path, stage: str, key: str, summary: dict[str, Any]) -> StageRecord:
        """Upload a folder's files, then create the record unless a sound stage is there; return the record in force."""
        with self.cache.errors():
            record, text = make_record(stage, key, folder, summary)
        for _ in range(MAX_COLLISIONS):
            existing = self.lookup(stage, key)
            if existing is not None:
                self._keep(folder, record)
                return require_same(existing, record, self.url)
            for name, file in record.files.items():
                self.store.upload(folder / name, f"{stage_folder(stage, key)}/{file.sha256}", file.sha256)
            try:
                self.store.put(_record_key(stage, key), text, if_absent=True)
            except ConflictError:
                continue  # somebody was faster, perhaps a request of ours whose answer got lost
            self._keep(folder, record)
            self._records[stage, key] = record
            return record
        raise StorageError(
            f"{self.url}: the record of stage {stage} {key[:12]} is refused as being there, and is not there when read",
            hint="look at what else writes to or deletes from this prefix, or choose another with --work-dir",
        )

    def _keep(self, folder: Path, record: StageRecord) -> None:
        """Make the files that were written here entries of the cache: they are likely to be read here."""
        for name, file in record.files.items():
            if (folder / name).is_file():  # two names of one content share an entry
                self._note_sound(self.cache.add(file.sha256, folder / name))

    def _transfer(self, stage: str, key: str, name: str, sha256: str) -> Path:
        where = f"{stage_folder(stage, key)}/{sha256}"
        with self.cache.private_folder() as folder:
            hasher = hashlib.sha256()
            try:
                with self.cache.errors(), (folder / "file").open("wb") as handle:
                    for chunk in self.store.stream(where):
                        hasher.update(chunk)
                        handle.write(chunk)
                reason = f"{name} has SHA-256 {hasher.hexdigest()}, its record says {sha256}"
            except StorageError as error:
                if error.code != MISSING_OBJECT:
                    raise
                reason = f"{name} is missing"
            if hasher.hexdigest() == sha256:
                path = self.cache.add(sha256, folder / "file")
                self._note_sound(path)
                return path
        self.note_damage(stage, key, reason)
        self.discard(stage, key)
        raise damaged_file(stage, key, f"{self.url}/{where}", reason)

    def _is_sound(self, path: Path, sha256: str) -> bool:
        """Return whether a copy has its digest, which is computed once per process; one that has not is dropped."""
        with self.cache.errors():
            try:
                is_known = self._checked.get(path) == _stamp(path)
                is_sound = is_known or digest_file(path) == sha256
            except FileNotFoundError:  # another process made room for something else
                return False
            if is_sound:
                self._note_sound(path)
        if not is_sound:
            self.cache.drop(sha256)
        return is_sound

    def _note_sound(self, path: Path) -> None:
        self._checked[path] = _stamp(path)


def _record_key(stage: str, key: str) -> str:
    return f"{stage_folder(stage, key)}/{RECORD_NAME}"


def _stamp(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _open_here(url: str) -> WorkStore:
    """Open a store that another process knew, as this process's environment says."""
    return open_work_store(url, load_settings())
