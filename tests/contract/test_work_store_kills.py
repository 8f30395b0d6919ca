"""A work store shared by processes that race and that are killed."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

from pipeline.storage.work import WorkStore
from tests.contract.storage_actors import finish_and_die, process_context, race_to_finish

KEY = "ab" * 32


def test_a_writer_killed_anywhere_leaves_a_whole_stage_or_none(tmp_path: Path) -> None:
    num_killed = 0
    for step in itertools.count(1):
        root = tmp_path / f"work-{step}"
        process = process_context().Process(target=finish_and_die, args=(str(root), "solve", KEY, step))
        process.start()
        process.join()
        store = WorkStore(root)
        record = store.lookup("solve", KEY)
        if record is not None:
            assert store.open_checked("solve", KEY, "codes.bin").read_bytes() == b"codes" * 1000
        assert store.damaged == []
        assert process.exitcode in (0, -signal.SIGKILL)
        store.sweep()
        assert store.sweep() == ()
        private = [path.name for path in (root / ".tmp").glob("*")]
        assert set(private) <= {"commit"}
        if process.exitcode == 0:
            break
        num_killed += 1
    assert num_killed > 5


def test_of_racing_writers_all_get_the_same_record(tmp_path: Path) -> None:
    context = process_context()
    barrier, answers = context.Barrier(8), context.Queue()
    racers = [
        context.Process(target=race_to_finish, args=(str(tmp_path / "work"), "solve", KEY, barrier, answers))
        for _ in range(8)
    ]
    for racer in racers:
        racer.start()
    records = [answers.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert all(record == records[0] for record in records)
    store = WorkStore(tmp_path / "work")
    found = store.lookup("solve", KEY)
    assert found is not None
    assert found.model_dump() == records[0]
    assert [path.name for path in (tmp_path / "work" / ".tmp").iterdir()] == ["commit"]
