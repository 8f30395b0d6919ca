"""Multipart uploads: a few parts at a time, all or nothing."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from botocore.exceptions import BotoCoreError, ClientError

MAX_PARTS = 10_000
"""The most parts that an S3 object can have."""
_PARTS_IN_FLIGHT = 4


def upload_parts(client: Any, request: dict[str, Any], handle: IO[bytes], part_bytes: int, sha256: str) -> str:
    """Upload what can be read from ``handle`` and return its SHA-256. The object appears only when that is the
    expected one; otherwise, and when anything fails, the parts are given up.

    Memory: ``_PARTS_IN_FLIGHT + 1`` parts.

    Args:
        client: A boto3 S3 client; its errors pass through.
        request: Bucket, Key and Metadata of the object.
        handle: Open for reading at its beginning.
        part_bytes: Size of each part but the last; at least 5 MiB, and large enough for `MAX_PARTS` to suffice.
        sha256: The SHA-256 that the bytes must have.
    """
    started = client.create_multipart_upload(**request, ChecksumAlgorithm="CRC32")
    upload = {"Bucket": request["Bucket"], "Key": request["Key"], "UploadId": started["UploadId"]}
    is_complete = False
    try:
        parts, found = _send_all(client, upload, handle, part_bytes)
        if found == sha256:
            client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
            is_complete = True
    finally:
        if not is_complete:
            _abort(client, upload)
    return found


def _send_all(
    client: Any, upload: dict[str, Any], handle: IO[bytes], part_bytes: int
) -> tuple[list[dict[str, Any]], str]:
    hasher = hashlib.sha256()
    parts: list[dict[str, Any]] = []
    pending: deque[Future[dict[str, Any]]] = deque()
    with ThreadPoolExecutor(_PARTS_IN_FLIGHT) as pool:
        number = 0
        while data := handle.read(part_bytes):
            number += 1
            hasher.update(data)
            if len(pending) == _PARTS_IN_FLIGHT:
                parts.append(pending.popleft().result())
            pending.append(pool.submit(_send, client, upload, number, data))
        parts.extend(future.result() for future in pending)
    return parts, hasher.hexdigest()


def _send(client: Any, upload: dict[str, Any], number: int, data: bytes) -> dict[str, Any]:
    answer = client.upload_part(**upload, PartNumber=number, Body=data, ChecksumAlgorithm="CRC32")
    part = {"PartNumber": number, "ETag": answer["ETag"]}
    # Not every server repeats the checksum; those that do want to see it again.
    return part | ({"ChecksumCRC32": answer["ChecksumCRC32"]} if "ChecksumCRC32" in answer else {})


def _abort(client: Any, upload: dict[str, Any]) -> None:
    """Give the parts' space back. The first failure is the one to report, so a second one is dropped: what remains
    is found by `S3Store.sweep_partial` when the release is published again."""
    try:
        client.abort_multipart_upload(**upload)
    except (BotoCoreError, ClientError):
        return
