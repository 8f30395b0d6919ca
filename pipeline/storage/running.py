"""Which jobs run on a work directory, and the wish to cancel one.

A driver announces its job under ``jobs/`` of the work directory (a directory or S3), renews the announcement while it
runs and removes it at the end. Cancelling is one more object beside it, which the driver looks for; so it works from
any machine that reaches the work directory, and a driver that is gone leaves an announcement that grows old.

A thread of its own renews and looks, whatever the driver is busy with; the driver only asks what it has found. A store
that fails then is asked again later: what the job itself needs of it fails on its own.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import SpecError, StorageError
from pipeline.storage.objects import ObjectStore

FOLDER = "jobs"
RENEW_S = 20.0
"""Seconds between two renewals of an announcement."""

LOOK_S = 1.0
"""Seconds between two looks for a wish to cancel."""

GONE_AFTER = timedelta(seconds=120)
"""An announcement that was not renewed for so long belongs to a dead driver."""


class RunningJob(BaseModel):
    """A job that a driver announced."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    source: str
    variants: tuple[str, ...]
    host: str
    pid: int
    started_at: datetime
    seen_at: datetime

    def is_gone(self, now: datetime) -> bool:
        """Return whether its driver has not been heard of for long."""
        return now - self.seen_at > GONE_AFTER


class Announcement:
    """One driver's announcement; see ``announced``."""

    def __init__(self, store: ObjectStore, job: RunningJob, clock: Callable[[], float]) -> None:
        self._store, self._job, self._clock = store, job, clock
        self._renewed_s = clock()
        self._is_cancelled = False
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="announcement", daemon=True)
        self._write()
        self._watcher.start()

    def is_cancelled(self) -> bool:
        """Return whether somebody is known to have wished the job cancelled; asks nobody."""
        return self._is_cancelled

    def look(self) -> None:
        """What the store says of a wish to cancel is known, and the announcement is renewed when it is time.

        Raises:
            StorageError: when the store cannot be asked.
        """
        now_s = self._clock()
        if now_s - self._renewed_s > RENEW_S:
            self._write()
            self._renewed_s = now_s
        if not self._is_cancelled:
            self._is_cancelled = self._store.head(_wish(self._job.id)) is not None

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            with suppress(StorageError):
                self.look()

    def remove(self) -> None:
        """The job is not announced any more."""
        self._ended.set()
        # What it writes now would stay.
        self._watcher.join()
        for key in (_key(self._job.id), _wish(self._job.id)):
            self._store.delete(key)

    def _write(self) -> None:
        renewed = self._job.model_copy(update={"seen_at": datetime.now(UTC)})
        self._store.put(_key(self._job.id), renewed.model_dump_json(indent=1).encode())


@contextmanager
def announced(
    store: ObjectStore, source: str, variants: tuple[str, ...], clock: Callable[[], float] = time.monotonic
) -> Iterator[Announcement]:
    """Announce a job for as long as the block runs."""
    now = datetime.now(UTC)
    job = RunningJob(
        id=uuid.uuid4().hex[:12],
        source=source,
        variants=variants,
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=now,
        seen_at=now,
    )
    announcement = Announcement(store, job, clock)
    try:
        yield announcement
    finally:
        announcement.remove()


def list_jobs(store: ObjectStore, now: datetime) -> tuple[RunningJob, ...]:
    """Return the announced jobs, oldest first. Announcements of drivers that are gone are removed on the way."""
    found = []
    for info in store.list(f"{FOLDER}/"):
        if not info.key.endswith(".json"):
            continue
        blob = store.read(info.key)
        if blob is None:
            continue  # it ended meanwhile
        try:
            job = RunningJob.model_validate_json(blob.data)
        except ValidationError as error:
            raise StorageError(f"{store.url}/{info.key} is no announcement of a job", hint="remove it") from error
        if job.is_gone(now):
            store.delete(info.key)
            store.delete(_wish(job.id))
        else:
            found.append(job)
    return tuple(sorted(found, key=lambda job: (job.started_at, job.id)))


def cancel_job(store: ObjectStore, job_id: str, now: datetime) -> RunningJob:
    """The driver of a job will find the wish that it stops.

    Raises:
        SpecError: when no such job runs on this work directory.
    """
    jobs = list_jobs(store, now)
    job = next((job for job in jobs if job.id == job_id), None)
    if job is None:
        running = ", ".join(job.id for job in jobs) or "none"
        raise SpecError(f"no job {job_id!r} runs on {store.url} (running: {running})", hint="bitmill cancel lists them")
    store.put(_wish(job_id), b"")
    return job


def _key(job_id: str) -> str:
    return f"{FOLDER}/{job_id}.json"


def _wish(job_id: str) -> str:
    return f"{FOLDER}/{job_id}.cancel"
