"""Objects in an S3 bucket, on AWS or any endpoint that knows conditional writes.

Files are uploaded with their SHA-256 as metadata, so that a rerun can tell what is there already without reading it
back; botocore adds a CRC32 to every request, which the server checks. Files above one part go up as multipart
uploads, whose parts become an object only when the upload is completed. Requests are retried a bounded number of
times with bounded timeouts. A conditional write whose answer got lost is reported as a conflict by its retry: callers
read again and find their own content there.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    FlexibleChecksumError,
    InvalidRegionError,
    ProfileNotFound,
)

from pipeline.disk import disk_errors, save_file
from pipeline.errors import ConflictError, StorageError, TargetUnavailableError
from pipeline.fingerprint import digest_bytes
from pipeline.storage.objects import (
    Blob,
    ObjectInfo,
    changed_file,
    check_key,
    missing_object,
    reading_errors,
    short_object,
)
from pipeline.storage.s3_errors import S3Place, error_code, error_status, is_missing, s3_errors
from pipeline.storage.s3_read import read_body
from pipeline.storage.s3_upload import MAX_PARTS, upload_parts

PART_BYTES = 16 << 20
PAGE_SIZE = 1000
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
MAX_ATTEMPTS = 4
_DIGEST = "sha256"


def connect_s3(bucket: str, prefix: str, endpoint: str | None, attempts: int | None = None) -> S3Store:
    """Return the store at ``s3://bucket/prefix``; keys and region are read by boto3 as everywhere. Sends nothing.

    Args:
        bucket: Name of the bucket.
        prefix: Put before every key with a slash; empty for the whole bucket.
        endpoint: Base URL of the service, or None for AWS.
        attempts: Attempts of each request; botocore waits up to 1, 2, 4, ... 20 seconds between them.
            None for the usual ones.

    Raises:
        TargetUnavailableError: when the endpoint, region or profile cannot be meant.
    """
    attempts = attempts or MAX_ATTEMPTS
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": attempts, "mode": "standard"},
        # Names like bucket.127.0.0.1 resolve nowhere, and few self-hosted stores are set up for them.
        s3={"addressing_style": "path"} if endpoint else {},
    )
    try:
        session = boto3.session.Session()
        # A region is only a signature's ingredient for other endpoints; without one botocore refuses to sign.
        region = session.region_name or ("us-east-1" if endpoint else None)
        client = session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except (ValueError, InvalidRegionError, ProfileNotFound) as error:
        raise TargetUnavailableError(
            f"cannot reach s3://{bucket} at {endpoint or 'AWS'}: {error}",
            hint="check AWS_ENDPOINT_URL_S3 (http://host:port), AWS_REGION and AWS_PROFILE",
        ) from error
    place = S3Place(bucket, str(client.meta.endpoint_url), is_aws=endpoint is None)
    return S3Store(client, place, prefix, attempts=attempts)


class S3Store:
    """An `ObjectStore` in a bucket.

    Attributes:
        place: Bucket and endpoint, for messages.
        prefix: Put before every key with a slash; may be empty.
        part_bytes: Files larger than this are uploaded in parts of at least this size.
        page_size: Objects asked for in one request of a listing.
    """

    def __init__(
        self, client: Any, place: S3Place, prefix: str, part_bytes: int = PART_BYTES, attempts: int = MAX_ATTEMPTS
    ) -> None:
        self.place = place
        self.prefix = prefix
        self.part_bytes = part_bytes
        self.page_size = PAGE_SIZE
        self._attempts = attempts
        self._client = client
        self._bucket_is_known = False

    @property
    def url(self) -> str:
        """``s3://bucket/prefix``."""
        return f"s3://{self.place.bucket}/{self.prefix}".rstrip("/")

    def head(self, key: str) -> ObjectInfo | None:
        """Return the object's facts, or None when there is no such object."""
        answer = self._head(key)
        return (
            None
            if answer is None
            else ObjectInfo(key, int(answer["ContentLength"]), answer["LastModified"].astimezone(UTC))
        )

    def read(self, key: str) -> Blob | None:
        """Return the whole content, or None when there is no such object; a damaged answer is asked for again.

        Raises:
            StorageError: when the answers stay damaged.
        """
        failures = 0
        while (answer := self._open(key)) is not None:
            try:
                return Blob(b"".join(self._chunks(key, answer)), str(answer["ETag"]))
            except StorageError as error:
                failures += 1
                if not isinstance(error.__cause__, FlexibleChecksumError) or failures == MAX_ATTEMPTS:
                    raise
        return None

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Return bytes ``start`` to ``end`` (exclusive).

        Raises:
            StorageError: when the object is missing or shorter than ``end``.
        """
        if start == end:
            return b""
        try:
            answer = self._open(key, Range=f"bytes={start}-{end - 1}")
        except StorageError as error:
            if isinstance(error.__cause__, ClientError) and error_status(error.__cause__) == 416:
                raise short_object(self.url, key, end) from error
            raise
        if answer is None:
            raise missing_object(self.url, key)
        data = b"".join(self._chunks(key, answer, start))
        if len(data) != end - start:
            raise short_object(self.url, key, end)
        return data

    def stream(self, key: str) -> Iterator[bytes]:
        """Return the content in chunks; a broken connection is taken up where it broke.

        Raises:
            StorageError: when the object is missing, is replaced while it is read, or came with a wrong checksum, which
                shows at its end.
        """
        answer = self._open(key)
        if answer is None:
            raise missing_object(self.url, key)
        yield from self._chunks(key, answer)

    def stream_range(self, key: str, start: int, end: int, etag: str, *, is_whole: bool = False) -> Iterator[bytes]:
        """Yield bytes ``start`` to ``end`` (exclusive) of the content with this ETag; a broken connection is taken up
        where it broke.

        Args:
            key: The object.
            start: First byte.
            end: One past the last byte; more than ``start``.
            etag: Of the content that is meant.
            is_whole: Whether that is all of it: then a checksum that the server has of it is compared, at the end.

        Raises:
            ConflictError: when the object has another content now.
            StorageError: when it is missing, or came with a wrong checksum.
        """
        answer = self._open(key, IfMatch=etag, **({} if is_whole else {"Range": f"bytes={start}-{end - 1}"}))
        if answer is None:
            raise missing_object(self.url, key)
        if answer["ETag"].strip('"') != etag.strip('"'):  # a server that ignores the condition
            raise ConflictError(f"{self.place}: {key} has another content now")
        if int(answer["ContentLength"]) != end - start:
            raise short_object(self.url, key, end)
        yield from self._chunks(key, answer, start)

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a file, which appears whole or not at all.

        Raises:
            StorageError: when the object is missing.
            DiskFullError: when the file's disk is full.
        """
        with disk_errors(str(path.parent), hint="free some space there, or choose another folder"):
            save_file(path, self.stream(key))

    def holds(self, key: str, size_bytes: int, sha256: str) -> bool:
        """Return whether the object is there with this size, uploaded by us with this SHA-256."""
        answer = self._head(key)
        if answer is None or int(answer["ContentLength"]) != size_bytes:
            return False
        return bool(answer.get("Metadata", {}).get(_DIGEST) == sha256)

    def upload(self, path: Path, key: str, sha256: str) -> None:
        """Write a file of any size to ``key``, replacing what is there.

        Raises:
            StorageError: when the file cannot be read, or its bytes do not have the SHA-256; nothing appears then.
        """
        request = self._object(key) | {"Metadata": {_DIGEST: sha256}}
        with reading_errors(path), path.open("rb") as handle, s3_errors(self.place, f"writing {key}"):
            size_bytes = path.stat().st_size
            if size_bytes <= self.part_bytes:
                data = handle.read()
                found = digest_bytes(data)
                if found == sha256:
                    self._client.put_object(**request, Body=data)
            else:
                part_bytes = max(self.part_bytes, -(-size_bytes // MAX_PARTS))
                try:
                    found = upload_parts(self._client, request, handle, part_bytes, sha256)
                except ClientError as error:
                    # Completing it succeeded and its answer got lost: the retry finds no such upload any more.
                    if error_code(error) == "NoSuchUpload" and self.holds(key, size_bytes, sha256):
                        return
                    raise
        if found != sha256:
            raise changed_file(path, sha256, found)

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write a small object and return its etag.

        Raises:
            ConflictError: when the condition does not hold; nothing was written.
        """
        request = self._object(key) | {"Body": data}
        if if_absent:
            request["IfNoneMatch"] = "*"
        if if_match is not None:
            request["IfMatch"] = if_match
        is_conditional = if_absent or if_match is not None
        with s3_errors(self.place, f"writing {key}", is_conditional=is_conditional):
            return str(self._client.put_object(**request)["ETag"])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Return the objects whose keys start with ``prefix``, in the order of their keys."""
        # SeaweedFS lists folder by folder, which is another order than that of the keys.
        yield from sorted(self.entries(prefix), key=lambda info: info.key.encode())

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with ``prefix``, page by page, in the server's order."""
        pages = self._client.get_paginator("list_objects_v2")
        with s3_errors(self.place, f"listing {prefix or 'everything'}"):
            for page in pages.paginate(
                Bucket=self.place.bucket, Prefix=self._full(prefix), PaginationConfig={"PageSize": self.page_size}
            ):
                for entry in page.get("Contents", ()):
                    # Keys that end in a slash are the folders that some consoles make.
                    if not entry["Key"].endswith("/"):
                        key = entry["Key"][len(self._full("")) :]
                        modified_at = entry["LastModified"].astimezone(UTC)
                        yield ObjectInfo(key, int(entry["Size"]), modified_at, str(entry.get("ETag", "")))

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there stays so."""
        with s3_errors(self.place, f"deleting {key}"):
            self._client.delete_object(**self._object(key))

    def sweep_partial(self, prefix: str, before: datetime) -> tuple[str, ...]:
        """Abort the multipart uploads to keys in the folder ``prefix`` that began before a time; return their keys.

        Raises:
            StorageError: also for an empty prefix, which would give up other people's uploads.
        """
        swept = []
        folder = self._full(check_key(prefix.removesuffix("/"))) + "/"
        pages = self._client.get_paginator("list_multipart_uploads")
        with s3_errors(self.place, f"listing unfinished uploads under {prefix}"):
            for page in pages.paginate(Bucket=self.place.bucket, Prefix=folder):
                for entry in page.get("Uploads", ()):
                    # Looked at again here: a server that ignores the prefix would have us abort what is not ours.
                    if entry["Key"].startswith(folder) and entry["Initiated"] < before:
                        self._client.abort_multipart_upload(
                            Bucket=self.place.bucket, Key=entry["Key"], UploadId=entry["UploadId"]
                        )
                        swept.append(str(entry["Key"])[len(self._full("")) :])
        return tuple(swept)

    def _full(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _object(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.place.bucket, "Key": self._full(check_key(key))}

    def _head(self, key: str) -> dict[str, Any] | None:
        with s3_errors(self.place, f"looking for {key}"):
            try:
                answer: dict[str, Any] = self._client.head_object(**self._object(key))
            except ClientError as error:
                if not is_missing(error):
                    raise
                self._require_bucket()
                return None
        return answer

    def _require_bucket(self) -> None:
        """Answers to HEAD carry no error code: a missing object and a missing bucket are both a bare 404."""
        if self._bucket_is_known:
            return
        try:
            self._client.head_bucket(Bucket=self.place.bucket)
        except ClientError as error:
            if error_status(error) == 404:
                error.response["Error"]["Code"] = "NoSuchBucket"
            raise
        self._bucket_is_known = True

    def _open(self, key: str, **extra: str) -> dict[str, Any] | None:
        with s3_errors(self.place, f"reading {key}"):
            try:
                answer: dict[str, Any] = self._client.get_object(**self._object(key), **extra)
            except ClientError as error:
                if is_missing(error):
                    return None
                raise
        return answer

    def _chunks(self, key: str, answer: dict[str, Any], start: int = 0) -> Iterator[bytes]:
        """Return the body of an answer that began at byte ``start``; the same content is reopened where it breaks."""

        def reopen(start: int, end: int) -> dict[str, Any]:
            again = self._open(key, Range=f"bytes={start}-{end - 1}", IfMatch=answer["ETag"])
            if again is None:
                raise missing_object(self.url, key)
            return again

        return read_body(self.place, key, answer, start, reopen, self._attempts)
