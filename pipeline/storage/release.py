"""How a folder becomes a release, and how releases and their leftovers are listed.

Publishing goes: files, manifest (created, never replaced), refs (compare-and-swap). A process killed at any point
leaves either files without a manifest, which nothing reads and a rerun completes, or a complete release whose ref
still points elsewhere. A rerun uploads only what is not there with the right size and SHA-256, finds an equal manifest
where the first run got that far, and ends with the same bytes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
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
from pipeline.storage.objects import ObjectInfo, ObjectStore
from pipeline.storage.refs import move_ref, read_ref, utc_now

UPLOADED_LAST = ("config.json", "README.md")
"""What engines and people open first, in the order in which it follows the other files: an upload that stopped has no
card that says what was verified, and nothing loads it."""

_RELEASE_KEY = re.compile(rf"{RELEASES}/({NAME_PATTERN})/({NAME_PATTERN})/({REVISION_PATTERN})/(.+)")
_REF_KEY = re.compile(rf"{REFS}/({NAME_PATTERN})/({NAME_PATTERN})/({NAME_PATTERN})")


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
class ListedRelease:
    """A finished release of a store, with the refs that point at it."""

    namespace: str
    name: str
    revision: str
    refs: tuple[str, ...]


@dataclass(frozen=True)
class UnfinishedRelease:
    """Files of a publication that has no manifest.

    Attributes:
        prefix: Their common key prefix.
        num_files: How many there are.
        size_bytes: Their size together.
        modified_at: When the latest of them was written.
    """

    prefix: str
    num_files: int
    size_bytes: int
    modified_at: datetime


@dataclass(frozen=True)
class Sweep:
    """What a sweep removed, or would remove."""

    releases: tuple[UnfinishedRelease, ...]
    partial_uploads: tuple[str, ...]


def publish_release(
    store: ObjectStore,
    folder: Path,
    namespace: str,
    name: str,
    provenance: dict[str, Any],
    *,
    verdict_passed: bool,
    refs: tuple[str, ...] = ("main",),
    now: Callable[[], datetime] = utc_now,
) -> PublishedRelease:
    """The files of ``folder`` are a release of ``store``, and the refs point at it.

    Idempotent: see the top of this module.

    Args:
        store: Where to.
        folder: Files in their final layout; nothing may write there meanwhile.
        namespace: First part of the release's address.
        name: Second part.
        provenance: JSON values that say what the files were made from; part of the revision.
        verdict_passed: Whether every gate passed. A release that did not pass gets no refs.
        refs: Refs to move; empty to publish without a name that people use.
        now: The clock for the refs' history.

    Raises:
        StorageError: when the folder is empty or changes, or refs are asked for a release that did not pass.
        CorruptReleaseError: when the revision is there with another manifest.
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
    manifest = make_manifest(namespace, name, _describe(folder), provenance, verdict_passed=verdict_passed)
    prefix = release_prefix(namespace, name, manifest.revision)
    missing = [file for file in manifest.files if not store.holds(prefix + file.path, file.size_bytes, file.sha256)]
    missing.sort(key=lambda file: UPLOADED_LAST.index(file.path) if file.path in UPLOADED_LAST else -1)
    for file in missing:
        store.upload(folder / file.path, prefix + file.path, file.sha256)
    _require_files(store, prefix, manifest)
    _write_manifest(store, prefix, manifest)
    for ref in refs:
        move_ref(store, namespace, name, ref, manifest.revision, now=now)
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


def sweep_unfinished(store: ObjectStore, *, before: datetime, dry_run: bool = False) -> Sweep:
    """Files of publications that never finished, and parts of interrupted uploads, are removed.

    Args:
        store: Where.
        before: Only what was last written before this time (UTC, by the store's clock). It must lie further back than
            any publication that may still be running takes.
        dry_run: Only say what would be removed.
    """
    folders: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in store.list(f"{RELEASES}/"):
        if match := _RELEASE_KEY.fullmatch(info.key):
            folders[release_prefix(match[1], match[2], match[3])].append(info)
    swept = []
    for prefix, infos in folders.items():
        latest = max(info.modified_at for info in infos)
        if latest >= before or any(info.key == prefix + MANIFEST_NAME for info in infos):
            continue
        swept.append(UnfinishedRelease(prefix, len(infos), sum(info.size_bytes for info in infos), latest))
        if not dry_run:
            for info in infos:
                store.delete(info.key)
    return Sweep(tuple(swept), store.sweep_partial(before, dry_run=dry_run))


def _describe(folder: Path) -> tuple[ReleaseFile, ...]:
    """Return the files of a folder with their digests."""
    try:
        paths = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
        files = tuple(
            ReleaseFile(
                path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, sha256=digest_file(path)
            )
            for path in paths
        )
    except OSError as error:
        raise StorageError(f"cannot read {error.filename or folder} to publish it: {error.strerror}") from error
    if not files:
        raise StorageError(f"{folder} has no files to publish")
    if any(file.path == MANIFEST_NAME for file in files):
        raise StorageError(f"{folder / MANIFEST_NAME} has the name of a release's manifest; rename or remove it")
    return files


def _require_files(store: ObjectStore, prefix: str, manifest: Manifest) -> None:
    """Look once more before the release becomes visible: a sweep may have taken old leftovers that were reused."""
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
