"""What botocore reports, as this project's errors: each names the bucket, the endpoint, the reason and a next step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from pipeline.errors import (
    ConditionalWriteError,
    ConflictError,
    DiskFullError,
    StorageError,
    TargetUnavailableError,
)

_FULL = {
    "InsufficientStorage",
    "InsufficientStorageSpace",
    "InsufficientCapacity",
    "NoSpaceLeftOnDevice",
    "QuotaExceeded",
    "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",
}
_CONFLICT = {"PreconditionFailed", "ConditionalRequestConflict", "OperationAborted"}
_WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_MISSING = {"NoSuchKey", "404", "NotFound"}


@dataclass(frozen=True)
class S3Place:
    """The bucket and the endpoint that an error is about.

    Attributes:
        bucket: Name of the bucket.
        endpoint: Base URL of the S3 service that was asked.
        is_aws: Whether that is AWS itself, so that commands need no endpoint flag.
    """

    bucket: str
    endpoint: str
    is_aws: bool

    def __str__(self) -> str:
        return f"bucket {self.bucket!r} at {self.endpoint}"

    def command(self, action: str) -> str:
        """Return an ``aws`` command line for this bucket, for example for ``"s3 ls"``."""
        return f"aws {action} s3://{self.bucket}" + ("" if self.is_aws else f" --endpoint-url {self.endpoint}")


@contextmanager
def s3_errors(place: S3Place, what: str, *, is_conditional: bool = False) -> Iterator[None]:
    """Turn a botocore error of the block into a StorageError.

    Args:
        place: Bucket and endpoint.
        what: What was done to which object, for the message, for example ``"writing a/b.json"``.
        is_conditional: Whether the request carried If-Match or If-None-Match.
    """
    try:
        yield
    except ClientError as error:
        raise _from_answer(error, place, what, is_conditional) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise TargetUnavailableError(
            f"{place}: {what} failed: no credentials ({error})",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        ) from error
    except (ConnectionError, HTTPClientError) as error:
        raise TargetUnavailableError(
            f"{place}: {what} failed: {error}",
            hint="check that the endpoint answers and that AWS_ENDPOINT_URL_S3 names it; then run it again",
        ) from error
    except BotoCoreError as error:
        raise StorageError(f"{place}: {what} failed: {error}", hint=f"try: {place.command('s3 ls')}") from error


def is_missing(error: ClientError) -> bool:
    """Return whether the answer says that there is no such object (and nothing about the bucket)."""
    return error_code(error) in _MISSING


def error_code(error: ClientError) -> str:
    """Return the S3 error code; the HTTP status where an answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def error_status(error: ClientError) -> int:
    """Return the HTTP status of the answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _from_answer(error: ClientError, place: S3Place, what: str, is_conditional: bool) -> StorageError:
    code, status = error_code(error), error_status(error)
    said = f"{place}: {what} failed: HTTP {status} {error.response.get('Error', {}).get('Message') or code}"
    if status == 412 or code in _CONFLICT or (is_conditional and code in _MISSING):
        return ConflictError(f"{place}: {what} failed: somebody else wrote first (HTTP {status})")
    if code == "NoSuchBucket":
        return TargetUnavailableError(f"{place}: no such bucket", hint=f"create it: {place.command('s3 mb')}")
    if status == 507 or code in _FULL:
        return DiskFullError(f"no space left in {said}", hint="free some space in the store, then run it again")
    if code in _WRONG_REGION or status == 301:
        return TargetUnavailableError(said, hint="set AWS_REGION to the bucket's region")
    if status in (401, 403):
        return TargetUnavailableError(
            said, hint=f"check the credentials and the bucket's policy: {place.command('s3 ls')}"
        )
    if status == 501 and is_conditional:
        return ConditionalWriteError(
            f"{place} does not know conditional writes: {said}",
            hint="use a store with If-None-Match and If-Match (AWS S3, SeaweedFS, MinIO), or a directory",
        )
    if status >= 500 or code == "SlowDown":
        return TargetUnavailableError(said, hint="the store keeps failing; run it again later")
    return StorageError(said, hint=f"try: {place.command('s3 ls')}")
