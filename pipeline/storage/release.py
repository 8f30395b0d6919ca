"""How a folder becomes a release, and how releases are listed.

Publishing goes: files, manifest (created, never replaced), refs (compare-and-swap). A process killed at any point
leaves either files without a manifest, which nothing reads and a rerun completes, or a complete release whose ref
still points elsewhere. A rerun uploads only what is not there with the right size and SHA-256, finds an equal manifest
where the first run got that far, and ends with the same bytes.

Parts of interrupted uploads are invisible and cost space until somebody gives them up: publishing a release first
removes those of the same release, whatever their revision, that began more than `PARTIAL_UPLOAD_AGE` ago.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.errors import ConflictError, CorruptReleaseError, StorageError
from pipeline.fingerprint import digest_file
from pipeline.storage.manifest import (
    MANIFEST_NAME,
    NAME_PATTERN,
    REFS,
    RELEASES,
    REVISION_PATTERN,
    Manifest,
    ReleaseFile,
    check_name,
    make_manifest,
    release_prefix,
)
from pipeline.storage.objects import ObjectStore, reading_errors
from pipeline.storage.refs import DEFAULT_REF, move_ref, read_ref, utc_now

PARTIAL_UPLOAD_AGE = timedelta(days=1)
"""Age at which the writer of an unfinished upload counts as dead: a file takes minutes to hours, and clocks differ."""

UPLOADED_LAST = ("config.json", "README.md")
"""What engines and people open first, in the order in which it follows the other files: an upload that stopped has no
card that says what was verified, and nothing loads it."""

_RELEASE_KEY = re.compile(rf"{RELEASES}/({NAME_PATTERN})/({NAME_PATTERN})/({REVISION_PATTERN})/(.+)")
_REF_KEY = re.compile(rf"{REFS}/({NAME_PATTERN})/({NAME_PATTERN})/({NAME_PATTERN})")
_MAX_LISTED = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedRelease:
    """A release that is complete and reachable.

    Attributes:
        url: The store it is in.
        path_or_uri: Its revision folder: a path, or ``s3://…``.
        revision: Its revision, 64 hex digits.
        refs: The refs that point at it now.
        num_uploaded: Files that were not there already.
    """

    url: str
    path_or_uri: str
    revision: str
    refs: tuple[str, ...]
    num_uploaded: int


@dataclass(frozen=True)
class StoredFile:
    """A file of a release that is somewhere else until its turn comes, so that a release needs no place for all of its
    weights together.

    Attributes:
        size_bytes: Its length.
        sha256: What its bytes have.
        place: Puts it at a path, on which nothing is yet.
    """

    size_bytes: int
    sha256: str
    place: Callable[[Path], None]


@dataclass(frozen=True)
class ListedRelease:
    """A finished release of a store, with the refs that point at it."""

    namespace: str
    name: str
    revision: str
    refs: tuple[str, ...]


def publish_release(
    store: ObjectStore,
    folder: Path,
    namespace: str,
    name: str,
    provenance: dict[str, Any],
    *,
    file_names: Set[str],
    verdict_passed: bool,
    stored: Mapping[str, StoredFile] = MappingProxyType({}),
    refs: tuple[str, ...] = (DEFAULT_REF,),
    seen: Mapping[str, int] = MappingProxyType({}),
    now: Callable[[], datetime] = utc_now,
) -> PublishedRelease:
    """The files of ``folder`` are a release of ``store``, and the refs point at it.

    Idempotent: see the top of this module.

    Args:
        store: Where to.
        folder: Files in their final layout; nothing else may write there meanwhile. Stored ones are put there and
            removed, one at a time.
        namespace: First part of the release's address.
        name: Second part.
        provenance: JSON values that say what the files were made from; part of the revision.
        file_names: The files of ``folder`` that whoever made it wrote there, relative to it and with slashes. What lies
            there is not taken at its word: another job or person may have added or removed something.
        verdict_passed: Whether every gate passed. A release that did not pass gets no refs.
        stored: More files of the release, by name; only those that the store does not hold are asked for.
        refs: Refs to move; empty to publish without a name that people use.
        seen: Sequences of refs when the job began, as ``move_ref`` takes them: a job that comes late moves nothing.
        now: The clock for the refs' history and the age of leftovers.

    Raises:
        StorageError: when the folder is empty, has other files or changes, or refs are asked for a release that did
            not pass.
        CorruptReleaseError: when the revision is there with another manifest.
        ConflictError: when a ref was moved by others since the job began.
        TargetUnavailableError: when the store is missing, refuses us or cannot be reached.
        DiskFullError: when the store is full.
    """
    if refs and not verdict_passed:
        raise StorageError(
            f"{namespace}/{name} did not pass its gates, so {', '.join(refs)} cannot move to it",
            code="storage.gates_not_passed",
        )
    for ref in refs:
        check_name(ref, "ref")
    files = (*_describe(folder, file_names, stored.keys()), *_described(stored))
    manifest = make_manifest(namespace, name, files, provenance, verdict_passed=verdict_passed)
    prefix = release_prefix(namespace, name, manifest.revision)
    _give_up_leftovers(store, f"{RELEASES}/{namespace}/{name}/", now() - PARTIAL_UPLOAD_AGE)
    missing = [file for file in manifest.files if not store.holds(prefix + file.path, file.size_bytes, file.sha256)]
    missing.sort(key=lambda file: UPLOADED_LAST.index(file.path) if file.path in UPLOADED_LAST else -1)
    for file in missing:
        with _at_hand(folder / file.path, stored.get(file.path)) as path:
            store.upload(path, prefix + file.path, file.sha256)
    _require_files(store, prefix, manifest)
    _write_manifest(store, prefix, manifest)
    for ref in refs:
        move_ref(store, namespace, name, ref, manifest.revision, seen_sequence=seen.get(ref), now=now)
    return PublishedRelease(store.url, f"{store.url}/{prefix.rstrip('/')}", manifest.revision, refs, len(missing))


def list_releases(store: ObjectStore) -> tuple[ListedRelease, ...]:
    """Return the finished releases of a store, by namespace, name and revision."""
    refs: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for info in store.list(f"{REFS}/"):
        if match := _REF_KEY.fullmatch(info.key):
            found = read_ref(store, match[1], match[2], match[3])
            if found is not None:
                refs[match[1], match[2], found.revision].append(match[3])
    return tuple(
        ListedRelease(match[1], match[2], match[3], tuple(refs[match[1], match[2], match[3]]))
        for info in store.list(f"{RELEASES}/")
        if (match := _RELEASE_KEY.fullmatch(info.key)) and match[4] == MANIFEST_NAME
    )


@contextmanager
def _at_hand(path: Path, stored: StoredFile | None) -> Iterator[Path]:
    """Give the path at which a file lies meanwhile."""
    if stored is None:
        yield path
        return
    stored.place(path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _described(stored: Mapping[str, StoredFile]) -> Iterator[ReleaseFile]:
    for name, file in stored.items():
        yield ReleaseFile(path=name, size_bytes=file.size_bytes, sha256=file.sha256)


def _describe(folder: Path, file_names: Set[str], elsewhere: Set[str]) -> tuple[ReleaseFile, ...]:
    """Return the files of a folder with their digests, having checked that they are those with these names, and none of
    those that are elsewhere."""
    with reading_errors(folder):
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
        _require_names(folder, found.keys(), file_names)
        if MANIFEST_NAME in elsewhere:
            raise StorageError(f"a stored file has the name of a release's manifest, {MANIFEST_NAME}")
        return tuple(
            ReleaseFile(path=name, size_bytes=path.stat().st_size, sha256=digest_file(path))
            for name, path in found.items()
        )


def _require_names(folder: Path, found: Set[str], expected: Set[str]) -> None:
    problems = [f"{name} is missing" for name in sorted(expected - found)]
    problems += [f"{name} was not written by this run" for name in sorted(found - expected)]
    if problems:
        raise StorageError(
            f"{folder} is not what was made for publishing: {', '.join(problems[:_MAX_LISTED])}",
            code="storage.changed_folder",
            hint="run the same command again when nothing else writes to that folder",
        )
    if not found:
        raise StorageError(f"{folder} has no files to publish")
    if MANIFEST_NAME in found:
        raise StorageError(f"{folder / MANIFEST_NAME} has the name of a release's manifest; rename or remove it")


def _give_up_leftovers(store: ObjectStore, prefix: str, before: datetime) -> None:
    """Free the space of dead writers before more is needed. Who may write a release may not always list uploads, and
    that is no reason not to publish it."""
    try:
        store.sweep_partial(prefix, before)
    except StorageError as error:
        _log.warning("parts of interrupted uploads stay in %s: %s", store.url, error.message)


def _require_files(store: ObjectStore, prefix: str, manifest: Manifest) -> None:
    """Look once more before the release becomes visible: somebody may have cleaned up leftovers that were reused."""
    found = {info.key.removeprefix(prefix): info.size_bytes for info in store.list(prefix)}
    for file in manifest.files:
        if found.get(file.path) != file.size_bytes:
            raise StorageError(
                f"{store.url}/{prefix}{file.path} vanished while the release was being published",
                hint="run the same command again",
            )


def _write_manifest(store: ObjectStore, prefix: str, manifest: Manifest) -> None:
    key, data = prefix + MANIFEST_NAME, manifest.to_bytes()
    try:
        store.put(key, data, if_absent=True)
    except ConflictError:
        # An earlier run, another writer of the same bytes, or our own write whose answer got lost.
        found = store.read(key)
        if found is None or found.data != data:
            raise CorruptReleaseError(
                f"{store.url}/{key} is there with other content than this release's",
                hint="remove that revision folder, then publish again",
            ) from None
