"""From what a person types to a release, its files and whether they are intact.

A location is one of::

    TARGET/releases/NAMESPACE/NAME             what its ref `main` points at
    TARGET/releases/NAMESPACE/NAME@REF         what another ref points at, or a revision (64 hex digits)
    TARGET/releases/NAMESPACE/NAME/REVISION    a revision folder, with or without /manifest.json at its end
    any/folder                                 a copy of a revision folder, wherever it is

where TARGET is a directory or ``s3://bucket/prefix``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.disk import disk_errors, make_folders, save_file
from pipeline.errors import CorruptReleaseError, StorageError
from pipeline.fingerprint import digest_bytes, digest_file
from pipeline.settings import Settings
from pipeline.storage.directory import DirectoryStore
from pipeline.storage.manifest import (
    MANIFEST_NAME,
    NAME_PATTERN,
    RELEASES,
    REVISION_PATTERN,
    Manifest,
    ReleaseFile,
    parse_manifest,
    release_prefix,
)
from pipeline.storage.objects import ObjectStore, open_store
from pipeline.storage.refs import DEFAULT_REF, read_ref
from pipeline.storage.release import list_releases

_ADDRESS = re.compile(
    rf"(?:(?P<target>.*)/)?{RELEASES}/(?P<namespace>{NAME_PATTERN})/(?P<name>{NAME_PATTERN})"
    rf"(?:/(?P<revision>{REVISION_PATTERN})|@(?P<ref>{NAME_PATTERN}))?"
)
_PARTIAL = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.part")
"""What ``save_file`` writes to before a file is whole."""

_MAX_LISTED = 8
_MAX_NAMED = 3


@dataclass(frozen=True)
class LocatedRelease:
    """A finished release.

    Attributes:
        store: Where it is.
        prefix: Key prefix of its files in the store: ``releases/…/`` or empty.
        manifest: What it consists of.
    """

    store: ObjectStore
    prefix: str
    manifest: Manifest

    @property
    def namespace(self) -> str:
        """First part of its address."""
        return self.manifest.namespace

    @property
    def name(self) -> str:
        """Second part of its address."""
        return self.manifest.name

    @property
    def revision(self) -> str:
        """Its revision, 64 hex digits."""
        return self.manifest.revision

    @property
    def uri(self) -> str:
        """Its folder: a path, or ``s3://…``."""
        return f"{self.store.url}/{self.prefix}".rstrip("/")

    @property
    def local_path(self) -> Path | None:
        """Its folder when it is on a file system, else None."""
        return self.store.root / self.prefix if isinstance(self.store, DirectoryStore) else None


def locate_release(location: str, settings: Settings) -> LocatedRelease:
    """Return the release that ``location`` means; the syntax is at the top of this module.

    Raises:
        StorageError: when there is no such folder, release or ref.
        CorruptReleaseError: when the folder is not a finished release, or its manifest cannot be trusted.
        TargetUnavailableError: when the store cannot be reached.
    """
    plain = location.rstrip("/")
    if plain.split("/")[-1] == MANIFEST_NAME:
        plain = plain.removesuffix(MANIFEST_NAME).rstrip("/") or "."
    address = _address(plain)
    if address is None:
        return _load(open_store(plain, settings), "")
    target, namespace, name = address["target"], address["namespace"], address["name"]
    store = open_store("." if target is None else target or "/", settings)
    revision, ref = address["revision"], address["ref"] or DEFAULT_REF
    if revision is None and re.fullmatch(REVISION_PATTERN, ref):
        revision = ref
    if revision is None:
        found = read_ref(store, namespace, name, ref)
        if found is None:
            raise _not_found(store, f"{store.url} has no ref {namespace}/{name}@{ref}")
        revision = found.revision
    located = _load(store, release_prefix(namespace, name, revision))
    if (located.namespace, located.name, located.revision) != (namespace, name, revision):
        raise CorruptReleaseError(
            f"{located.uri} holds the manifest of {located.namespace}/{located.name} revision {located.revision}",
            hint="publish the release again",
        )
    return located


def verify_release_files(located: LocatedRelease) -> list[str]:
    """Return what is wrong with the files of a release, each problem naming its file; empty when nothing is.

    Every file is read to its end, in chunks.
    """
    return _problems(located, lambda file: _digest_object(located.store, located.prefix + file.path))


def copy_release(located: LocatedRelease, folder: Path) -> list[str]:
    """``folder`` holds the files of a release as its store gives them now; return what is wrong with them.

    Every file is transferred once, and the copy checked; the problems are those of `verify_release_files`.

    Raises:
        DiskFullError: when the disk is full.
    """

    def digest_copy(file: ReleaseFile) -> str:
        path = folder / file.path
        make_folders(path.parent)
        located.store.download(located.prefix + file.path, path)
        return digest_file(path)

    with disk_errors(str(folder), hint="free some space there, or set BITMILL_CACHE to a larger disk"):
        make_folders(folder)
        return _problems(located, digest_copy)


def read_release_file(located: LocatedRelease, path: str) -> bytes:
    """Return the content of one small file of a release, which is the one that its manifest states.

    Raises:
        CorruptReleaseError: when the release has no such file, or its content is another one.
    """
    stated = {file.path: file.sha256 for file in located.manifest.files}
    blob = located.store.read(located.prefix + path)
    if blob is None or path not in stated:
        raise CorruptReleaseError(f"{located.uri} has no {path}", hint="is this a release made by bitmill?")
    if digest_bytes(blob.data) != stated[path]:
        raise CorruptReleaseError(
            f"{located.uri}/{path} does not match the release's manifest", hint="publish the release again"
        )
    return blob.data


def _problems(located: LocatedRelease, digest: Callable[[ReleaseFile], str]) -> list[str]:
    found = {info.key.removeprefix(located.prefix): info.size_bytes for info in located.store.list(located.prefix)}
    expected = {file.path for file in located.manifest.files}
    problems = []
    for file in located.manifest.files:
        if file.path not in found:
            problems.append(f"{file.path} is missing")
        elif found[file.path] != file.size_bytes:
            problems.append(f"{file.path} has {found[file.path]} bytes, the manifest says {file.size_bytes}")
        elif (sha256 := digest(file)) != file.sha256:
            problems.append(f"{file.path} has SHA-256 {sha256}, the manifest says {file.sha256}")
    extra = sorted(set(found) - expected - {MANIFEST_NAME})
    return problems + [f"{path} is not in the manifest" for path in extra]


def require_own_files(located: LocatedRelease, folder: Path) -> None:
    """``folder`` is absent, or holds nothing but files of the release; what a killed download left of one is removed.

    Raises:
        StorageError: naming files that do not belong to the release.
    """
    own = {file.path for file in located.manifest.files} | {MANIFEST_NAME}
    foreign, partial = [], []
    with disk_errors(str(folder), hint="choose another folder"):
        # Not to the end: a mistyped folder may be a whole disk.
        for path in (Path(parent, name) for parent, _, names in os.walk(folder) for name in names):
            relative = path.relative_to(folder)
            match = _PARTIAL.fullmatch(path.name)
            if match and relative.with_name(match["name"]).as_posix() in own:
                partial.append(path)
            elif relative.as_posix() not in own:
                foreign.append(relative.as_posix())
                if len(foreign) == _MAX_NAMED:
                    break
        if foreign:
            raise StorageError(
                f"{folder} holds files that are not of {located.namespace}/{located.name}: {', '.join(foreign)}",
                code="storage.folder_in_use",
                hint="choose an empty folder, or one that is not there yet",
            )
        for path in partial:
            path.unlink(missing_ok=True)


def download_release(
    located: LocatedRelease, folder: Path, on_file: Callable[[ReleaseFile], None] = lambda file: None
) -> Path:
    """``folder`` is a copy of the release, manifest last; returns it.

    Files that are there with the right digest are kept, so an interrupted download goes on.

    Args:
        located: What to copy.
        folder: Where to; it is created where needed.
        on_file: Told each file before it is copied.

    Raises:
        CorruptReleaseError: when a downloaded file does not match the manifest.
        DiskFullError: when the disk is full.
    """
    with disk_errors(str(folder), hint="free some space there, or choose another folder"):
        make_folders(folder)
        for file in located.manifest.files:
            path = folder / file.path
            if path.is_file() and _matches(path, file):
                continue
            on_file(file)
            make_folders(path.parent)
            located.store.download(located.prefix + file.path, path)
            if not _matches(path, file):
                path.unlink()
                raise CorruptReleaseError(
                    f"{located.uri}/{file.path} does not match the release's manifest", hint="publish the release again"
                )
        save_file(folder / MANIFEST_NAME, (located.manifest.to_bytes(),))
    return folder


def _matches(path: Path, file: ReleaseFile) -> bool:
    return path.stat().st_size == file.size_bytes and digest_file(path) == file.sha256


def _address(location: str) -> re.Match[str] | None:
    """Return the parts of ``TARGET/releases/…``, or None for any other folder."""
    address = _ADDRESS.fullmatch(location)
    if address is None or address["target"] == "s3:/":  # a bucket that is called "releases"
        return None
    is_by_name = address["revision"] is None and address["ref"] is None
    if is_by_name and Path(location, MANIFEST_NAME).is_file():  # a copy that was put into such a folder
        return None
    return address


def _load(store: ObjectStore, prefix: str) -> LocatedRelease:
    folder = f"{store.url}/{prefix}".rstrip("/")
    blob = store.read(prefix + MANIFEST_NAME)
    if blob is not None:
        return LocatedRelease(store, prefix, parse_manifest(blob.data, f"{folder}/{MANIFEST_NAME}"))
    # Not by listing a local folder: a mistyped location may be a whole disk.
    is_there = Path(folder).is_dir() if isinstance(store, DirectoryStore) else any(True for _ in store.list(prefix))
    if not is_there:
        raise _not_found(store, f"{folder} does not exist or is empty")
    raise CorruptReleaseError(
        f"{folder} is not a finished release: it has no {MANIFEST_NAME}",
        code="storage.unfinished_release",
        hint=_suggestion(store) or "run the conversion again: it completes what is there",
    )


def _not_found(store: ObjectStore, message: str) -> StorageError:
    return StorageError(
        message,
        code="storage.release_not_found",
        hint=_suggestion(store) or "write it as TARGET/releases/NAMESPACE/NAME@REF or give a revision folder",
    )


def _suggestion(store: ObjectStore) -> str:
    """Return the releases that are there as locations to type, or nothing."""
    locations = [
        f"{store.url}/{RELEASES}/{found.namespace}/{found.name}@{found.refs[0] if found.refs else found.revision}"
        for found in list_releases(store)
    ]
    if not locations:
        return ""
    more = f" and {len(locations) - _MAX_LISTED} more" if len(locations) > _MAX_LISTED else ""
    return f"releases there: {', '.join(locations[:_MAX_LISTED])}{more}"


def _digest_object(store: ObjectStore, key: str) -> str:
    hasher = hashlib.sha256()
    for chunk in store.stream(key):
        hasher.update(chunk)
    return hasher.hexdigest()
