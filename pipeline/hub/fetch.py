"""Fetch what a conversion needs, resumably, and prove that it is what the hub says it is.

A file grows as ``<file>.part`` beside its final name and takes that name only after its digest has been checked, so a
file under its final name is whole. A rerun continues each part from the bytes that are there; a part whose digest is
wrong in the end is deleted, because nobody knows which byte of it is bad. One process fetches a commit at a time;
others wait for it and then find the files.

A bucket says no digest: the SHA-256 of what came is taken as the file's. Such a file is only found again by its record
(``DigestRecords``), for as long as it is what was written; without one it is fetched again.

Memory is one network chunk; a file is hashed while it comes in and not read again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CorruptWeightsError, DiskFullError, SourceError, SourceNotFoundError
from pipeline.fingerprint import fingerprint
from pipeline.hub.client import Sleep
from pipeline.hub.digests import ContentHasher, DigestRecords, Digests, storage_error
from pipeline.hub.repository import CopyRange, SourceFile
from pipeline.hub.source import Source, copier, needed_files
from pipeline.settings import Settings
from pipeline.units import format_bytes

LOCK_POLL_S = 0.5
"""Seconds between two tries to begin where another process fetches."""

PROGRESS_BYTES = 4 * 1024 * 1024
PART_SUFFIX = ".part"

OnProgress = Callable[[str, int, int], None]
"""Called as ``on_progress(path, done_bytes, total_bytes)``, every ``PROGRESS_BYTES`` and with both equal at the end."""

OnWait = Callable[[str], None]
"""Called with the reason before a wait whose end nobody knows."""


@dataclass(frozen=True)
class FetchedSource:
    """A source whose needed files lie in a local folder, verified.

    Attributes:
        source: What was fetched.
        folder: Where the files are; for a local source its own folder.
        digests: SHA-256 of each needed file by path.
        commit: The source's commit, or for a folder the fingerprint of ``digests``.
    """

    source: Source
    folder: Path
    digests: dict[str, str]
    commit: str


def fetch(
    source: Source,
    settings: Settings,
    on_progress: OnProgress = lambda path, done_bytes, total_bytes: None,
    on_wait: OnWait = lambda reason: None,
    *,
    sleep: Sleep = time.sleep,
    with_weights: bool = True,
) -> FetchedSource:
    """Make all needed files of a source local and verified; on request all but the weights.

    Weights that stay where they are are listed with the digests that are known of them; nothing of them is read.

    What ``on_progress`` or ``sleep`` raise ends the fetch as a crash would.

    A rerun after a crash downloads only what is missing and hashes only what has changed. A local folder is used in
    place and never written to.

    Raises:
        SourceNotFoundError: when the hub or a file is not there or not accessible any more.
        CorruptWeightsError: when a file's digest is not the one that the hub announced, or a file changed meanwhile.
        DiskFullError: when the cache directory cannot take the files.
        StorageError: when the cache directory cannot be written for another reason.
    """
    needed = needed_files(source)
    if source.is_local:
        return _digest_folder(source, needed, settings, on_progress)
    assert source.commit is not None, "a source elsewhere is pinned"
    folder = settings.cache_dir / _cache_folder(source) / source.commit
    announced = {} if with_weights else _announced_weights(source)
    needed = tuple(file for file in needed if file.path not in announced)
    copy = copier(source, settings, sleep)
    fetched = fetch_files(copy, source.name, needed, folder, settings.cache_dir, on_progress, on_wait, sleep)
    fetched |= announced
    return FetchedSource(source, folder, fetched, source.commit)


def _cache_folder(source: Source) -> str:
    """Return where sources of one origin are kept, one folder for each commit."""
    if source.bucket is None:
        return f"sources/{source.name}"
    # An ETag says which content it is of one object only: another endpoint may mean another by it.
    return f"buckets/{fingerprint([source.endpoint, source.location])}"


def _announced_weights(source: Source) -> dict[str, str]:
    """Return the SHA-256 of each weights file as it is known before it is read."""
    digests = {}
    for file in source.files:
        if file.path not in source.weight_files:
            continue
        if file.sha256 is None:
            raise SourceError(
                f"{source.name}/{file.path}: the hub states no SHA-256, so streamed weights could not be verified",
                code="source.no_digest",
                hint="leave out --stream, or use a hub that lists the digests of large files",
            )
        digests[file.path] = file.sha256
    return digests


def fetch_files(
    copy: CopyRange,
    name: str,
    files: tuple[SourceFile, ...],
    folder: Path,
    cache_dir: Path,
    on_progress: OnProgress,
    on_wait: OnWait,
    sleep: Sleep,
) -> dict[str, str]:
    """Make ``files`` of a source, called ``name``, lie in ``folder`` and return their SHA-256 by path.

    Raises:
        As ``fetch``.
    """
    with _alone_in(folder, on_wait, sleep):
        records = DigestRecords(cache_dir, folder)
        _require_space(files, folder)
        fetched: dict[str, str] = {}
        for file in files:
            download = _Download(copy, name, file, folder / file.path, _Steps(on_progress, file))
            fetched[file.path] = download.run(records).sha256
        return fetched


class _Steps:
    """Tells of one file's progress, but not of every small step."""

    def __init__(self, on_progress: OnProgress, file: SourceFile) -> None:
        self._on_progress = on_progress
        self._file = file
        self._told_bytes = -1

    def __call__(self, done_bytes: int) -> None:
        """Tell that so many bytes are done, if it is a step further, the end, or less than before (a new start)."""
        told, total = self._told_bytes, self._file.size_bytes
        is_step = not told <= done_bytes < told + PROGRESS_BYTES
        if is_step or (done_bytes == total and done_bytes != told):
            self._told_bytes = done_bytes
            self._on_progress(self._file.path, done_bytes, total)


@dataclass(frozen=True)
class _Download:
    """One file on its way."""

    copy: CopyRange
    name: str
    file: SourceFile
    target: Path
    report: _Steps

    @property
    def _by_git(self) -> bool:
        return self.file.sha256 is None and self.file.git_sha1 is not None

    def run(self, records: DigestRecords) -> Digests:
        """Make the target whole and return its digests."""
        file = self.file
        if not file.is_announced and file.etag is None:
            unverifiable = f"{self.name}/{file.path}: the hub states no digest, so it cannot be verified"
            raise SourceError(
                unverifiable, code="source.no_digest", hint="use a hub that lists blob ids and LFS digests"
            )
        try:
            if self.target.is_file():
                kept = self._kept(records)
                if kept is not None:
                    return kept
                # Our own cache was damaged or tampered with: fetch it again.
                self.target.unlink()
            digests = self._complete_part()
            records.remember(file.path, digests)
        except OSError as error:
            raise storage_error(error, self.target, file.size_bytes) from error
        return digests

    def _kept(self, records: DigestRecords) -> Digests | None:
        """Return the digests of the target, or None when it is not what was fetched."""
        if self.file.is_announced:
            kept = records.measure(self.file.path, self.report, with_git=self._by_git)
            return kept if self._mismatch(kept) is None else None
        known = records.recall(self.file.path)
        if known is not None:
            self.report(self.file.size_bytes)
        return known

    def _complete_part(self) -> Digests:
        """Download what the part lacks, verify all of it, and give it its name."""
        part = self.target.with_name(self.target.name + PART_SUFFIX)
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > self.file.size_bytes:
            part.unlink()
        hasher = ContentHasher(self.file.size_bytes, with_git=self._by_git)
        # Unbuffered: what has arrived survives a SIGKILL of this process.
        with part.open("ab", buffering=0) as handle:
            hasher.update_from(part, self.report)
            try:
                self._append(handle.fileno(), part, hasher)
            except CorruptWeightsError:
                # Where no digest would tell, nothing of a reply that was wrong is kept.
                if not self.file.is_announced:
                    part.unlink()
                raise
            os.fsync(handle.fileno())
        digests = hasher.digests()
        mismatch = self._mismatch(digests)
        if mismatch is not None:
            part.unlink()
            raise mismatch
        part.replace(self.target)
        self.report(self.file.size_bytes)
        return digests

    def _append(self, descriptor: int, part: Path, hasher: ContentHasher) -> None:
        done = part.stat().st_size

        def take(data: bytes) -> None:
            nonlocal done
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            hasher.update(data)
            done += len(data)
            self.report(done)

        self.copy(self.file, done, self.file.size_bytes, take)

    def _mismatch(self, got: Digests) -> CorruptWeightsError | None:
        """Return the error for digests other than the announced ones, or None when they are the same, or none are."""
        if not self.file.is_announced:
            return None
        kind, expected, actual = "SHA-256", self.file.sha256, got.sha256
        if self._by_git:
            kind, expected, actual = "git blob id", self.file.git_sha1 or "", got.git_sha1
        if actual == expected:
            return None
        return CorruptWeightsError(
            f"{self.name}/{self.file.path} came with {kind} {actual}, the hub announced {expected}",
            code="source.digest",
            hint="the partial file was deleted; run the command again, and check any proxy or mirror if it stays so",
            context={"file": self.file.path, "expected": expected, "got": actual},
        )


def _digest_folder(
    source: Source, needed: tuple[SourceFile, ...], settings: Settings, on_progress: OnProgress
) -> FetchedSource:
    folder = Path(source.location)
    records = DigestRecords(settings.cache_dir, folder)
    digests: dict[str, str] = {}
    for file in needed:
        total = file.size_bytes
        try:
            size_bytes = (folder / file.path).stat().st_size
            if size_bytes != total:
                changed = f"{folder / file.path} had {total} bytes a moment ago and has {size_bytes} now"
                raise CorruptWeightsError(changed, code="source.changed", hint="run the command when it is complete")
            digests[file.path] = records.measure(file.path, _Steps(on_progress, file), with_git=False).sha256
        except OSError as error:
            gone = f"{folder / file.path} cannot be read: {error.strerror or error}"
            raise SourceNotFoundError(
                gone, code="source.unreadable", hint="check the file and its permissions"
            ) from error
    return FetchedSource(source, folder, digests, fingerprint(digests))


def _require_space(files: tuple[SourceFile, ...], folder: Path) -> None:
    """Require that the disk can take what is not there yet, before an hour of downloading shows that it cannot."""
    missing = 0
    for file in files:
        target = folder / file.path
        part = target.with_name(target.name + PART_SUFFIX)
        present = next((path.stat().st_size for path in (target, part) if path.exists()), 0)
        missing += max(file.size_bytes - present, 0)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise DiskFullError(
            f"{folder}: {format_bytes(missing)} are to be fetched, {format_bytes(free)} are free",
            hint=f"free at least {format_bytes(missing - free)} there, or set BITMILL_CACHE to a larger disk",
            context={"path": str(folder), "needed_bytes": missing, "free_bytes": free},
        )


@contextmanager
def _alone_in(folder: Path, on_wait: OnWait, sleep: Sleep) -> Iterator[None]:
    """Hold the lock of a folder, waiting for it; the system releases it when the process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise storage_error(error, folder, 0) from error
    try:
        try:
            if not _try_to_lock(descriptor):
                on_wait(f"another process fetches into {folder}: waiting until it is done")
                while not _try_to_lock(descriptor):
                    sleep(LOCK_POLL_S)
        except OSError as error:
            raise storage_error(error, folder, 0) from error
        yield
    finally:
        os.close(descriptor)


def _try_to_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
