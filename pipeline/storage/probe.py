"""Whether a store honours conditional writes, found out before anything depends on it.

Releases are safe because their manifest is created with If-None-Match and their refs move with If-Match. Some stores
accept both headers and ignore them: every one of several racing writers is told that it won. That shows only by
trying.
"""

from __future__ import annotations

import uuid

from pipeline.errors import ConditionalWriteError, ConflictError
from pipeline.storage.objects import ObjectStore

PROBE_FOLDER = ".bitmill-probe"


def probe(store: ObjectStore) -> None:
    """The store has proved that it can be written to and that it honours If-None-Match and If-Match.

    Writes one small object of its own and deletes it again; a killed probe leaves that object, which nothing reads.

    Raises:
        ConditionalWriteError: when it ignores a condition, or refuses one that holds.
        TargetUnavailableError: when it cannot be reached or written to.
    """
    key = f"{PROBE_FOLDER}/{uuid.uuid4().hex}"
    etag = _put(store, key, b"first", "it refused to create an object that did not exist (If-None-Match)")
    try:
        _try_conditions(store, key, etag)
    finally:
        store.delete(key)


def _try_conditions(store: ObjectStore, key: str, first: str) -> None:
    if _accepts(store, key, b"second", if_absent=True):
        raise _unfit(store, "it overwrote an object that should only have been created (If-None-Match)")
    refusal = "it refused a write on top of the content it had just stored (If-Match)"
    current = _put(store, key, b"third", refusal, if_match=first)
    if current == first:
        raise _unfit(store, "it gave two contents the same ETag")
    if _accepts(store, key, b"fourth", if_match=first):
        raise _unfit(store, "it overwrote an object that somebody had changed in between (If-Match)")
    found = store.read(key)
    if found is None or found.data != b"third":
        raise _unfit(store, "a write that it refused changed the object all the same")


def _put(store: ObjectStore, key: str, data: bytes, refusal: str, *, if_match: str | None = None) -> str:
    """Write what nobody else writes, on condition that it is not there or is what it was, and return its etag.

    Raises:
        ConditionalWriteError: saying ``refusal`` when the store refused it.
    """
    try:
        return store.put(key, data, if_absent=if_match is None, if_match=if_match)
    except ConflictError as error:
        # A write whose answer got lost is repeated, and refused then.
        found = store.read(key)
        if found is None or found.data != data:
            raise _unfit(store, refusal) from error
        return found.etag


def _accepts(
    store: ObjectStore, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
) -> bool:
    try:
        store.put(key, data, if_absent=if_absent, if_match=if_match)
    except ConflictError:
        return False
    return True


def _unfit(store: ObjectStore, what_it_did: str) -> ConditionalWriteError:
    return ConditionalWriteError(
        f"{store.url} does not honour conditional writes: {what_it_did}. Two jobs could overwrite each other's release",
        hint="publish to a store that does (AWS S3, SeaweedFS, MinIO), or to a directory",
        context={"store": store.url},
    )
