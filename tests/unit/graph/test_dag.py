"""Order, resume and failure of work units, on the real work store."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import GraphError
from pipeline.fingerprint import fingerprint
from pipeline.graph.convert import Janitor
from pipeline.graph.dag import InlineExecutor, Kind, WorkUnit, required_units, run_units
from pipeline.storage.work import StageRecord, WorkStore


def unit(name: str, *needs: WorkUnit) -> WorkUnit:
    return WorkUnit(Kind.SOLVE, fingerprint(name), {"name": name}, needs)


A = unit("a")
B, C = unit("b", A), unit("c", A)
D = unit("d", B, C)


class Runner:
    """Writes one file for each unit and remembers what ran; fails at a name."""

    def __init__(self, work: WorkStore, fails_at: str = "") -> None:
        self.work, self.fails_at = work, fails_at
        self.ran: list[str] = []

    def __call__(self, wanted: WorkUnit) -> StageRecord:
        name = wanted.params["name"]
        if name == self.fails_at:
            raise GraphError(f"{name} fails")
        self.ran.append(name)
        with self.work.writing(wanted.kind.value, wanted.key) as writer:
            writer.path("out").write_text(name)
            return writer.finish({"name": name})


def run(work: WorkStore, runner: Runner, goal: WorkUnit = D) -> list[tuple[str, bool]]:
    seen: list[tuple[str, bool]] = []
    run_units([goal], work, InlineExecutor(runner), lambda u, r, s, reused: seen.append((u.params["name"], reused)))
    return seen


def test_needs_run_before_what_needs_them_and_once(tmp_path: Path) -> None:
    runner = Runner(WorkStore(tmp_path))
    run(runner.work, runner)
    assert runner.ran == ["a", "b", "c", "d"]


def test_a_rerun_after_a_failure_runs_only_what_is_missing(tmp_path: Path) -> None:
    work = WorkStore(tmp_path)
    with pytest.raises(GraphError, match="c fails"):
        run(work, Runner(work, fails_at="c"))
    again = Runner(work)
    seen = run(work, again)
    assert sorted(seen[:2]) == [("a", True), ("b", True)]
    assert seen[2:] == [("c", False), ("d", False)]
    assert again.ran == ["c", "d"]


def test_needs_of_a_finished_unit_are_not_wanted(tmp_path: Path) -> None:
    work = WorkStore(tmp_path)
    run(work, Runner(work))
    for stale in (A, B, C):
        work.discard(stale.kind.value, stale.key)
    order, present = required_units([D], work)
    assert order == []
    assert list(present) == [D.key]


def test_janitor_names_a_unit_after_its_last_reader() -> None:
    janitor = Janitor([A], [A, B, C, D])
    assert janitor.after(B) == []
    assert janitor.after(C) == [A]
    assert janitor.after(D) == []
