"""A work store shared by processes that race and that are killed."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

from tests.contract.conftest import WorkPlace
from tests.contract.storage_actors import finish_and_die, process_context, race_to_finish

KEY = "ab" * 32


def leftovers(place: WorkPlace) -> set[str]:
    """Return what is in the private folders."""
    root = Path(place.url) if place.is_directory else place.cache() / "work-files"
    return {path.name for path in (root / ".tmp").glob("*")}


def test_a_writer_killed_anywhere_leaves_a_whole_stage_or_none(work_place: WorkPlace) -> None:
    num_killed = num_finished = 0
    for step in itertools.count(1):
        process = process_context().Process(
            target=finish_and_die,
            args=(work_place.url, str(work_place.cache()), dict(os.environ), "solve", KEY, step),
        )
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        store = work_place.open()
        record = store.lookup("solve", KEY)
        if record is not None:
            for machine in ("first", f"machine-{step}"):
                found = work_place.open(machine).open_checked("solve", KEY, "codes.bin")
                assert found.read_bytes() == b"codes" * 1000
        assert store.damaged == []
        store.sweep()
        assert store.sweep() == ()
        assert leftovers(work_place) <= {"commit"}
        if process.exitcode == 0:
            break
        num_killed += 1
        num_finished += record is not None
        store.discard("solve", KEY)
        assert list(work_place.raw.list("")) == [] or work_place.is_directory
    assert num_killed > 5
    assert 0 < num_finished < num_killed


def test_a_rerun_finishes_what_a_killed_writer_began(work_place: WorkPlace) -> None:
    for step in itertools.count(1):
        process = process_context().Process(
            target=finish_and_die,
            args=(work_place.url, str(work_place.cache()), dict(os.environ), "solve", KEY, step),
        )
        process.start()
        process.join()
        if process.exitcode == 0:
            break
    found = work_place.open("second").open_checked("solve", KEY, "codes.bin")
    assert found.read_bytes() == b"codes" * 1000


def test_of_racing_writers_all_get_the_same_record(work_place: WorkPlace) -> None:
    context = process_context()
    barrier, answers = context.Barrier(8), context.Queue()
    racers = [
        context.Process(
            target=race_to_finish,
            args=(
                work_place.url,
                str(work_place.cache(f"machine-{number % 3}")),
                dict(os.environ),
                "solve",
                KEY,
                barrier,
                answers,
            ),
        )
        for number in range(8)
    ]
    for racer in racers:
        racer.start()
    records = [answers.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert all(record == records[0] for record in records)
    store = work_place.open()
    found = store.lookup("solve", KEY)
    assert found is not None
    assert found.model_dump() == records[0]
    assert store.open_checked("solve", KEY, "codes.bin").read_bytes() == b"codes" * 1000
    assert leftovers(work_place) <= {"commit"}
