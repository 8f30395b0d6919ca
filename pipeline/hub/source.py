"""A source: a local folder, or a repository on a hub pinned to one commit before anything else of it is read."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CorruptWeightsError, SourceNotFoundError
from pipeline.hub.client import HubClient, Sleep
from pipeline.hub.repository import Repository, RepositoryKind, SourceFile
from pipeline.hub.selection import CARD_FILE, is_companion, require_model
from pipeline.hub.translate import not_a_name
from pipeline.settings import Settings
from pipeline.weights import INDEX_FILE, choose_weights, read_weight_map

_REPOSITORY = re.compile(r"(?P<name>(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A model that can be read: what it is called, where it is, what it holds.

    Attributes:
        name: ``org/name`` on a hub, or the name of a local folder.
        is_local: Whether it is a folder on this machine.
        endpoint: Base URL of the hub; None for a folder.
        commit: Commit that every read uses (40 hex digits); None for a folder, whose identity is known when its files
            are digested.
        files: Everything it holds, sorted by path; of a folder, the files in it and in its direct subfolders.
        weight_files: The safetensors files that belong to the model, sorted.
        location: Absolute path of a folder, or the repository's name.
    """

    name: str
    is_local: bool
    endpoint: str | None
    commit: str | None
    files: tuple[SourceFile, ...]
    weight_files: tuple[str, ...]
    location: str

    @property
    def file_sizes(self) -> dict[str, int]:
        """Size in bytes of every file by path."""
        return {file.path: file.size_bytes for file in self.files}

    @property
    def repository(self) -> Repository:
        """The hub repository; only for sources that are not local."""
        assert self.endpoint is not None, "a local source has no repository"
        return Repository(RepositoryKind.MODEL, self.name, self.endpoint)


def pin_source(text: str, settings: Settings, *, sleep: Sleep = time.sleep) -> Source:
    """Return the source that ``text`` means, with a hub's revision pinned to its present commit.

    An existing folder wins over a repository of the same name. Reads listings and the weights index, nothing else.

    Args:
        text: A local Hugging Face folder, or ``org/name[@revision]``.
        settings: Endpoint and token of the hub.
        sleep: Waits between attempts when the hub limits or drops us.

    Raises:
        SourceNotFoundError: when there is no such folder, repository or revision, no access, or no model in it.
        UnsafeWeightsError: when its weights are only there as pickles.
        CorruptWeightsError: when its weights index cannot be read or names a file that is not beside it.
    """
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
        assert source.commit is not None, "a hub source is pinned"
        return HubClient(settings.find_hub_token()).read_range(source.repository, source.commit, path, start, end)
    try:
        with (Path(source.location) / path).open("rb") as handle:
            handle.seek(start)
            data = handle.read(end - start)
    except OSError as error:
        raise _unreadable(Path(source.location) / path, error) from error
    if len(data) < end - start:
        short = f"{source.location}/{path} ends before byte {end}; it changed while it was read"
        raise CorruptWeightsError(short, code="source.truncated", hint="run the command again when it is complete")
    return data


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


def _with_weights(source: Source, where: str, settings: Settings) -> Source:
    """Return the source with its weights files chosen, having required that it is a model at all."""
    sizes = source.file_sizes
    require_model(sizes, where)
    weight_map = read_weight_map(sizes, range_reader(source, settings), where)
    chosen = choose_weights(sizes, weight_map, where)
    return Source(source.name, source.is_local, source.endpoint, source.commit, source.files, chosen, source.location)


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
