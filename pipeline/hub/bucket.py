"""A folder in a bucket as a source: what is asked of whoever can read buckets, and which of its objects count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from pipeline.errors import SourceError, SourceNotFoundError
from pipeline.hub.repository import SourceFile
from pipeline.hub.selection import is_safe_path
from pipeline.settings import Settings

MAX_OBJECTS = 10_000
"""Of one model, trainer's leavings included. Whoever names a whole bucket by mistake learns it after ten requests."""

MAX_DEPTH = 2


class Bucket(Protocol):
    """The objects below a prefix of a bucket. Travels to workers, so it holds no connection then."""

    @property
    def url(self) -> str:
        """``s3://bucket/prefix``."""

    @property
    def endpoint(self) -> str | None:
        """Base URL of the service; None for AWS."""

    def listing(self) -> Iterator[tuple[str, int, str]]:
        """Yield key below the prefix, size in bytes and ETag of each object, page by page, in any order.

        Raises:
            SourceNotFoundError: when the bucket or the service is not there or not accessible.
        """

    def copy_range(self, file: SourceFile, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        """Give the bytes ``[start, end)`` of an object to ``sink`` in order, each byte once, as long as its content is
        the one that was listed.

        Raises:
            SourceNotFoundError: when the bucket or the service is not there or not accessible.
            CorruptWeightsError: when the object is gone or has another content now.
        """


OpenBucket = Callable[[str, Settings], Bucket]
"""Opens ``s3://bucket/prefix``; sends nothing."""


def list_files(bucket: Bucket) -> tuple[SourceFile, ...]:
    """Return the objects that would be the files of a local folder and of its direct subfolders, sorted by path; hidden
    ones do not count.

    Raises:
        SourceNotFoundError: when there is none, or the bucket or the service is not there or not accessible.
        SourceError: when there are too many, or one could leave the folder that it will be written to.
    """
    files = []
    for count, (key, size_bytes, etag) in enumerate(bucket.listing(), 1):
        if count > MAX_OBJECTS:
            raise SourceError(
                f"{bucket.url} holds more than {MAX_OBJECTS} objects, which no model does",
                code="source.too_many_files",
                hint="give the prefix of one model, for example s3://bucket/models/my-model",
            )
        parts = key.split("/")
        if len(parts) > MAX_DEPTH or any(part.startswith(".") for part in parts):
            continue
        if not is_safe_path(key):
            hostile = f"{bucket.url} holds an object called {key!r:.200}, which is no path inside a folder"
            raise SourceError(hostile, code="source.unsafe_path", hint="remove it, or give another prefix")
        files.append(SourceFile(key, size_bytes, etag=etag))
    if not files:
        raise SourceNotFoundError(
            f"there is nothing at {bucket.url}",
            code="source.no_folder",
            hint=f"check the prefix: aws s3 ls {bucket.url.rpartition('/')[0]}/"
            + (f" --endpoint-url {bucket.endpoint}" if bucket.endpoint else ""),
        )
    return tuple(sorted(files, key=lambda file: file.path))
