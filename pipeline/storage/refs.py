"""Names that move: ``refs/<namespace>/<name>/<ref>`` says which revision is meant by ``main``.

A ref is one JSON object that carries its own history, so that a move and its record are one conditional write: a
history beside it could get out of step when a writer is killed in between. The history is bounded; ``sequence`` keeps
counting. A move is a compare-and-swap with bounded retries, and moving a ref to where it already points is nothing,
so a rerun after a lost answer or a kill is harmless.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConflictError, CorruptReleaseError, StorageError
from pipeline.storage.manifest import (
    MANIFEST_NAME,
    REFS,
    Sha256,
    check_name,
    parse_manifest,
    release_prefix,
)
from pipeline.storage.objects import ObjectStore

DEFAULT_REF = "main"
"""The ref that moves with every release unless others are named."""

MAX_HISTORY = 100
MAX_MOVES_TRIED = 20
_MAX_PAUSE_S = 0.5
FENCED = "storage.fenced"
"""Code of the error of a job that comes to publish after another one did."""


class RefMove(BaseModel):
    """One position of a ref."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence: Annotated[int, Field(ge=1)]
    """1 for the first position, and one more with every move."""
    revision: Sha256
    updated_at: datetime


class Ref(BaseModel):
    """Where a ref points, and where it pointed before."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    sequence: Annotated[int, Field(ge=1)]
    revision: Sha256
    updated_at: datetime
    previous: Sha256 | None
    """The revision before this one; None for the first."""
    history: tuple[RefMove, ...]
    """Earlier positions, latest first, at most `MAX_HISTORY`."""

    def moved_to(self, revision: str, now: datetime) -> Ref:
        """Return the ref after one more move."""
        left = RefMove(sequence=self.sequence, revision=self.revision, updated_at=self.updated_at)
        return Ref(
            sequence=self.sequence + 1,
            revision=revision,
            updated_at=now,
            previous=self.revision,
            history=(left, *self.history)[:MAX_HISTORY],
        )

    def to_bytes(self) -> bytes:
        """Return the ref as JSON in UTF-8."""
        return f"{self.model_dump_json(indent=2)}\n".encode()


def utc_now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


def read_ref(store: ObjectStore, namespace: str, name: str, ref: str) -> Ref | None:
    """Return a ref, or None when there is none of that name.

    Raises:
        CorruptReleaseError: when the object is not a ref.
    """
    found = _load(store, ref_key(namespace, name, ref))
    return found[0] if found else None


def move_ref(
    store: ObjectStore,
    namespace: str,
    name: str,
    ref: str,
    revision: str,
    *,
    seen_sequence: int | None = None,
    now: Callable[[], datetime] = utc_now,
) -> Ref:
    """The ref points at a finished release that passed its gates.

    Args:
        store: Where.
        namespace: First part of the release's address.
        name: Second part.
        ref: Which name moves.
        revision: Where it moves to.
        seen_sequence: The ref's sequence when the job began that wants it moved (0 when there was no ref). If others
            have moved it since, this job is late, and what they published stays. None moves it in any case.
        now: The clock for the ref's history.

    Raises:
        StorageError: when that revision is not finished or did not pass.
        ConflictError: when others kept moving the ref at the same time, or moved it since the job began.
    """
    key = ref_key(namespace, name, ref)
    _require_publishable(store, namespace, name, revision)
    for attempt in range(MAX_MOVES_TRIED):
        found = _load(store, key)
        try:
            if found is None:
                first = Ref(sequence=1, revision=revision, updated_at=now(), previous=None, history=())
                store.put(key, first.to_bytes(), if_absent=True)
                return first
            current, etag = found
            if current.revision == revision:
                return current
            if seen_sequence is not None and current.sequence > seen_sequence:
                raise _fenced(store, key, current, revision)
            moved = current.moved_to(revision, now())
            store.put(key, moved.to_bytes(), if_match=etag)
            return moved
        except ConflictError as error:
            if error.code == FENCED:
                raise
            time.sleep(random.uniform(0, min(_MAX_PAUSE_S, 0.01 * 2**attempt)))
    raise ConflictError(
        f"{store.url}/{key} was moved by others {MAX_MOVES_TRIED} times while it should move to {revision}",
        hint="run the same command again; the files are published already",
    )


def _fenced(store: ObjectStore, key: str, current: Ref, revision: str) -> ConflictError:
    return ConflictError(
        f"{store.url}/{key} was moved to {current.revision[:12]} since this job began, so it is not moved to "
        f"{revision[:12]}",
        code=FENCED,
        hint="another job published in the meantime; run the same command again to publish on top of it",
    )


def ref_key(namespace: str, name: str, ref: str) -> str:
    """Return the key of a ref.

    Raises:
        SpecError: when a part cannot be in a release's address.
    """
    check_name(namespace, "namespace")
    check_name(name, "name")
    return f"{REFS}/{namespace}/{name}/{check_name(ref, 'ref')}"


def _load(store: ObjectStore, key: str) -> tuple[Ref, str] | None:
    blob = store.read(key)
    if blob is None:
        return None
    try:
        return Ref.model_validate_json(blob.data), blob.etag
    except ValidationError as error:
        raise CorruptReleaseError(
            f"{store.url}/{key} is not a ref: {error.errors(include_url=False)[0]['msg']}",
            hint="remove that object, then publish the release again",
        ) from error


def _require_publishable(store: ObjectStore, namespace: str, name: str, revision: str) -> None:
    key = release_prefix(namespace, name, revision) + MANIFEST_NAME
    blob = store.read(key)
    if blob is None:
        raise StorageError(
            f"no ref can point at {store.url}/{key.rpartition('/')[0]}: it is not a finished release",
            code="storage.unfinished_release",
            hint="publish it first",
        )
    if not parse_manifest(blob.data, f"{store.url}/{key}").verdict_passed:
        raise StorageError(
            f"no ref can point at {store.url}/{key.rpartition('/')[0]}: it did not pass its gates",
            code="storage.gates_not_passed",
        )
