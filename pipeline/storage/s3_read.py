"""Bodies of S3's answers, read to their end over broken connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import urllib3
from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

from pipeline.errors import StorageError, TargetUnavailableError
from pipeline.storage.objects import CHUNK_BYTES
from pipeline.storage.s3_errors import S3Place

# botocore translates most of what urllib3 reports while a body is read, but not a broken TLS record.
_BREAKS = (HTTPClientError, IncompleteReadError, urllib3.exceptions.HTTPError)


def read_body(
    place: S3Place,
    key: str,
    answer: dict[str, Any],
    start: int,
    reopen: Callable[[int, int], dict[str, Any]],
    max_attempts: int,
) -> Iterator[bytes]:
    """Yield the body of an answer in chunks of about 1 MiB; where it breaks, go on with another answer.

    Args:
        place: Bucket and endpoint, for messages.
        key: The object, for messages.
        answer: What GetObject returned.
        start: Byte of the object at which the answer begins.
        reopen: Asks for the bytes ``[start, end)`` of the same content.
        max_attempts: Breaks in a row without a byte between them that are one too many.

    Raises:
        TargetUnavailableError: when the connection keeps breaking.
        StorageError: at the end, when the bytes do not have the checksum that came with them.
    """
    failures = 0
    end = start + int(answer["ContentLength"])
    while True:
        before = start
        try:
            for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                start += len(chunk)
                yield chunk
            return
        except FlexibleChecksumError as error:
            raise StorageError(
                f"{place}: reading {key} failed: {error}",
                code="storage.damaged_answer",
                hint="run it again; if it stays so, the object or the way to the store is damaged",
            ) from error
        except _BREAKS as error:
            failures = 1 if start > before else failures + 1
            if failures == max_attempts:
                raise TargetUnavailableError(
                    f"{place}: reading {key} broke {failures} times, last at byte {start}: {error}",
                    hint="run it again when the connection is stable",
                ) from error
        if start >= end:
            return
        answer = reopen(start, end)
