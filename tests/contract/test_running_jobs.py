"""Jobs are announced, found, cancelled and forgotten on every store."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.errors import SpecError, TargetUnavailableError
from pipeline.storage import running
from pipeline.storage.objects import ObjectStore
from pipeline.storage.running import FOLDER, GONE_AFTER, RENEW_S, announced, cancel_job, list_jobs
from tests.contract.conftest import WorkPlace


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def now() -> datetime:
    return datetime.now(UTC)


def test_a_job_is_listed_while_it_runs_and_no_longer(store: ObjectStore) -> None:
    with announced(store, "org/model", ("a", "b")):
        (job,) = list_jobs(store, now())
        assert (job.source, job.variants) == ("org/model", ("a", "b"))
    assert list_jobs(store, now()) == ()
    assert list(store.list(f"{FOLDER}/")) == []


def test_a_failed_job_is_not_left_behind(store: ObjectStore) -> None:
    with pytest.raises(RuntimeError), announced(store, "org/model", ("a",)):
        raise RuntimeError
    assert list_jobs(store, now()) == ()


def test_a_wish_to_cancel_reaches_its_job_alone(store: ObjectStore) -> None:
    with announced(store, "org/one", ("a",)) as one, announced(store, "org/two", ("a",)) as two:
        first = next(job for job in list_jobs(store, now()) if job.source == "org/one")
        assert cancel_job(store, first.id, now()) == first
        for announcement in (one, two):
            announcement.look()
        assert one.is_cancelled()
        assert not two.is_cancelled()
    assert list(store.list(f"{FOLDER}/")) == []


def test_a_wish_is_found_while_the_driver_is_busy(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "LOOK_S", 0.01)
    with announced(store, "org/model", ("a",)) as announcement:
        assert not announcement.is_cancelled()
        cancel_job(store, list_jobs(store, now())[0].id, now())
        deadline = time.monotonic() + 10
        while not announcement.is_cancelled():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_store_that_fails_for_a_while_ends_no_job(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "LOOK_S", 0.01)
    asked = []

    def fail(self: ObjectStore, key: str) -> None:
        asked.append(key)
        if len(asked) < 3:
            raise TargetUnavailableError("not now")

    with announced(store, "org/model", ("a",)):
        monkeypatch.setattr(type(store), "head", fail)
        deadline = time.monotonic() + 10
        while len(asked) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_job_that_does_not_run_cannot_be_cancelled(store: ObjectStore) -> None:
    with announced(store, "org/model", ("a",)):
        (job,) = list_jobs(store, now())
        with pytest.raises(SpecError, match=job.id):
            cancel_job(store, "feedfacefeed", now())


def test_an_announcement_is_renewed_and_a_dead_driver_s_grows_old(store: ObjectStore) -> None:
    clock = Clock()
    with announced(store, "org/model", ("a",), clock) as announcement:
        (before,) = list_jobs(store, now())
        clock.now_s += RENEW_S + 0.1
        announcement.look()
        (after,) = list_jobs(store, now())
        assert after.seen_at > before.seen_at
        later = after.seen_at + GONE_AFTER + timedelta(seconds=1)
        assert list_jobs(store, later) == ()
        assert list(store.list(f"{FOLDER}/")) == []


def test_a_job_is_announced_where_no_work_directory_was(work_place: WorkPlace) -> None:
    place = replace(work_place, url=f"{work_place.url}/deep/work")
    place.open().prepare()
    with announced(place.raw, "org/model", ("a",)):
        assert len(list_jobs(place.raw, now())) == 1
