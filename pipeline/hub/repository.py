"""What is read of a hub: a repository, and a file in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class RepositoryKind(StrEnum):
    """What a repository holds."""

    MODEL = "model"
    DATASET = "dataset"


@dataclass(frozen=True)
class Repository:
    """A repository on a hub.

    Attributes:
        kind: What it holds.
        name: ``org/name``, or ``name`` alone.
        endpoint: Base URL of the hub.
    """

    kind: RepositoryKind
    name: str
    endpoint: str

    @property
    def title(self) -> str:
        """The name as messages say it: a dataset's with its kind."""
        return self.name if self.kind is RepositoryKind.MODEL else f"{self.kind} {self.name}"

    @property
    def page_url(self) -> str:
        """Address of its page for people."""
        folder = "" if self.kind is RepositoryKind.MODEL else f"{self.kind}s/"
        return f"{self.endpoint}/{folder}{self.name}"


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    Attributes:
        path: Path inside the source, with ``/``.
        size_bytes: Its size.
        sha256: Digest of its content where the hub knows it (large files), else None.
        git_sha1: Git blob id of its content where the hub knows it (small files), else None.
        etag: What a bucket calls this content of it, else None. It tells whether the object was replaced, and proves
            nothing about the bytes that come.
    """

    path: str
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None
    etag: str | None = None

    @property
    def is_announced(self) -> bool:
        """Whether a digest of its content is known before it is read."""
        return self.sha256 is not None or self.git_sha1 is not None


CopyRange = Callable[[SourceFile, int, int, Callable[[bytes], object]], None]
"""Called as ``copy(file, start, end, sink)``; gives the bytes ``[start, end)`` of a file to ``sink`` in order."""


@dataclass(frozen=True)
class Place:
    """What a request is about: a repository, at a revision, or a file in it.

    Attributes:
        repository: The repository.
        revision: Branch, tag or commit that was asked for; None for the main branch.
        path: The file that was asked for; None for the repository as a whole.
    """

    repository: Repository
    revision: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"{self.repository.name}/{self.path}"
        return f"{self.repository.name}@{self.revision}" if self.revision else self.repository.name
