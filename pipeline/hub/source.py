"""A source: a local folder, or a repository on a hub or a folder in a bucket, pinned to one commit before anything else
of it is read.

A bucket has no commits. What stands for one is the fingerprint of its listing: names, sizes and ETags. Every later read
asks for the content with the listed ETag, so what was replaced meanwhile is an error and never a mixture. Version ids,
where a bucket has them, are left out: the same content written again is the same source.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import CorruptWeightsError, SourceNotFoundError
from pipeline.fingerprint import fingerprint
from pipeline.hub.bucket import Bucket, OpenBucket, list_files
from pipeline.hub.client import HubClient, Sleep
from pipeline.hub.repository import CopyRange, Repository, RepositoryKind, SourceFile
from pipeline.hub.selection import CARD_FILE, is_companion, require_model
from pipeline.hub.translate import not_a_name
from pipeline.settings import Settings
from pipeline.weights import INDEX_FILE, choose_weights, read_weight_map

_REPOSITORY = re.compile(r"(?P<name>(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)

BUCKET_SCHEME = "s3://"


@dataclass(frozen=True)
class Source:
    """A model that can be read: what it is called, where it is, what it holds.

    Attributes:
        name: ``org/name`` on a hub, ``s3://bucket/prefix``, or the name of a local folder.
        is_local: Whether it is a folder on this machine.
        endpoint: Base URL of the hub or of the bucket's service; None for a folder.
        commit: Commit that every read uses (40 hex digits), of a bucket the fingerprint of its listing; None for a
            folder, whose identity is known when its files are digested.
        files: Everything it holds, sorted by path; of a folder and a bucket, the files in it and in its direct
            subfolders.
        weight_files: The safetensors files that belong to the model, sorted.
        location: Absolute path of a folder, or its name.
        bucket: What reads it when it is in a bucket; else None.
    """

    name: str
    is_local: bool
    endpoint: str | None
    commit: str | None
    files: tuple[SourceFile, ...]
    weight_files: tuple[str, ...]
    location: str
    bucket: Bucket | None = None

    @property
    def is_on_hub(self) -> bool:
        """Whether it is a repository."""
        return not self.is_local and self.bucket is None

    @property
    def file_sizes(self) -> dict[str, int]:
        """Size in bytes of every file by path."""
        return {file.path: file.size_bytes for file in self.files}

    def file(self, path: str) -> SourceFile:
        """Return one of its files by path."""
        return next(file for file in self.files if file.path == path)

    @property
    def repository(self) -> Repository:
        """The hub repository; only for sources that are one."""
        assert self.is_on_hub, f"{self.name} is no repository"
        assert self.endpoint is not None, "a repository is on a hub"
        return Repository(RepositoryKind.MODEL, self.name, self.endpoint)


def pin_source(
    text: str, settings: Settings, open_bucket: OpenBucket | None = None, *, sleep: Sleep = time.sleep
) -> Source:
    """Return the source that ``text`` means, with a hub's revision pinned to its present commit and a bucket to its
    present listing.

    An existing folder wins over a repository of the same name. Reads listings and the weights index, nothing else.

    Args:
        text: A local Hugging Face folder, ``s3://bucket/prefix``, or ``org/name[@revision]``.
        settings: Endpoint and token of the hub, endpoint of buckets.
        open_bucket: Opens what is in a bucket; None where nobody can.
        sleep: Waits between attempts when the hub limits or drops us.

    Raises:
        SourceNotFoundError: when there is no such folder, bucket, repository or revision, no access, or no model in it.
        UnsafeWeightsError: when its weights are only there as pickles.
        CorruptWeightsError: when its weights index cannot be read or names a file that is not beside it.
    """
    if text.startswith(BUCKET_SCHEME) and open_bucket is not None:
        return _pin_bucket(open_bucket(text, settings), settings)
    folder = _existing(text)
    if folder is not None and folder.is_dir():
        return _pin_folder(folder.resolve(), settings)
    if folder is not None:
        raise SourceNotFoundError(
            f"source {text!r} is a file, not a folder",
            code="source.not_a_folder",
            hint=f"give the folder that holds config.json and *.safetensors, for example {folder.parent}",
        )
    if text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        missing = f"there is no folder {text!r:.200}"
        raise SourceNotFoundError(missing, code="source.no_folder", hint="check the path; to use a hub write org/name")
    match = _REPOSITORY.fullmatch(text)
    if match is None:
        raise not_a_name(text)
    return _pin_repository(match["name"], match["revision"], settings, sleep)


def read_range(source: Source, settings: Settings, path: str, start: int, end: int) -> bytes:
    """Return the bytes ``[start, end)`` of one of the source's files, at the pinned commit.

    Raises:
        SourceNotFoundError: when the file or the hub is not there or not accessible.
        CorruptWeightsError: when the file is shorter than ``end``.
    """
    if not source.is_local:
        data = bytearray()
        copier(source, settings)(source.file(path), start, end, data.extend)
        return bytes(data)
    try:
        with (Path(source.location) / path).open("rb") as handle:
            handle.seek(start)
            found = handle.read(end - start)
    except OSError as error:
        raise _unreadable(Path(source.location) / path, error) from error
    if len(found) < end - start:
        short = f"{source.location}/{path} ends before byte {end}; it changed while it was read"
        raise CorruptWeightsError(short, code="source.truncated", hint="run the command again when it is complete")
    return found


def copier(source: Source, settings: Settings, sleep: Sleep = time.sleep) -> CopyRange:
    """Return what copies ranges of a source's files, at its commit, from where they are; not for folders.

    Args:
        source: A repository or a bucket.
        settings: Token of the hub.
        sleep: Waits between attempts when the hub limits or drops us.
    """
    if source.bucket is not None:
        return source.bucket.copy_range
    assert source.commit is not None, "a repository is pinned"
    return HubClient(settings.find_hub_token(), sleep).copier(source.repository, source.commit)


def read_bytes(source: Source, settings: Settings, path: str) -> bytes:
    """Return the whole content of one of the source's files; meant for small ones.

    Raises:
        SourceNotFoundError: when the source has no such file, or it or the hub is not accessible.
    """
    if path not in source.file_sizes:
        raise SourceNotFoundError(f"{source.name} has no file {path!r}", code="source.file_not_found")
    return read_range(source, settings, path, 0, source.file_sizes[path])


def range_reader(source: Source, settings: Settings) -> Callable[[str, int, int], bytes]:
    """Return ``(path, start, end) -> bytes`` for this source, as readers of headers want it."""
    return lambda path, start, end: read_range(source, settings, path, start, end)


def needed_files(source: Source) -> tuple[SourceFile, ...]:
    """Return what a conversion needs: companions, card, weights index and the weights, sorted by path."""
    wanted = {*source.weight_files, INDEX_FILE, CARD_FILE}
    return tuple(file for file in source.files if file.path in wanted or is_companion(file.path))


def companion_files(source: Source) -> tuple[SourceFile, ...]:
    """Return the files that travel into every release as they are: configs, tokenizer, templates, licences."""
    return tuple(file for file in source.files if is_companion(file.path) and file.path not in source.weight_files)


def _existing(text: str) -> Path | None:
    """Return what ``text`` names on this machine, None when that is nothing.

    Raises:
        SourceNotFoundError: when nobody may look whether there is something.
    """
    if not text or "\0" in text:
        return None
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except RuntimeError:  # the home folder of nobody
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise _unreadable(Path(text), error) from error


def _pin_folder(folder: Path, settings: Settings) -> Source:
    try:
        files = tuple(sorted(_list_folder(folder, depth=2), key=lambda file: file.path))
    except OSError as error:
        raise _unreadable(folder, error) from error
    return _with_weights(Source(folder.name, True, None, None, files, (), str(folder)), str(folder), settings)


def _pin_repository(name: str, revision: str | None, settings: Settings, sleep: Sleep) -> Source:
    repository = Repository(RepositoryKind.MODEL, name, settings.hub_endpoint)
    commit, listed = HubClient(settings.find_hub_token(), sleep).listing(repository, revision)
    files = tuple(sorted(listed, key=lambda file: file.path))
    source = Source(name, False, settings.hub_endpoint, commit, files, (), name)
    return _with_weights(source, f"{name}@{revision or commit[:12]}", settings)


def _pin_bucket(bucket: Bucket, settings: Settings) -> Source:
    files = list_files(bucket)
    commit = fingerprint([[file.path, file.size_bytes, file.etag] for file in files])
    source = Source(bucket.url, False, bucket.endpoint, commit, files, (), bucket.url, bucket)
    return _with_weights(source, bucket.url, settings)


def _with_weights(source: Source, where: str, settings: Settings) -> Source:
    """Return the source with its weights files chosen, having required that it is a model at all."""
    sizes = source.file_sizes
    require_model(sizes, where)
    weight_map = read_weight_map(sizes, range_reader(source, settings), where)
    return replace(source, weight_files=choose_weights(sizes, weight_map, where))


def _list_folder(folder: Path, depth: int, prefix: str = "") -> Iterator[SourceFile]:
    """Yield the regular files down to ``depth`` folders; hidden ones and links to nothing do not count."""
    for item in os.scandir(folder):
        if item.name.startswith("."):
            continue
        if item.is_dir():
            if depth > 1:
                yield from _list_folder(folder / item.name, depth - 1, f"{prefix}{item.name}/")
        elif item.is_file() and stat.S_ISREG(item.stat().st_mode):
            yield SourceFile(f"{prefix}{item.name}", item.stat().st_size)


def _unreadable(path: Path, error: OSError) -> SourceNotFoundError:
    return SourceNotFoundError(
        f"{path} cannot be read: {error.strerror or error}",
        code="source.unreadable",
        hint="check that it exists and that you may read it",
    )
