"""What the driver does about workers that are slow or hang; on units that cost nothing.

Driver, workers, shelves and work store are the real ones; only what a unit computes is a toy. That the same holds for
real units is shown in ``test_driver_faults.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.errors import GraphError, PipelineError
from pipeline.graph.dag import WorkUnit
from pipeline.graph.driver import STRAGGLER_FLOOR_S, UNITS_AHEAD
from pipeline.graph.executor import WorkerId
from tests.scripted_executor import ScriptedExecutor
from tests.unit.graph.bench import Bench
from tests.unit.graph.toys import expected, passing, unit

pytestmark = pytest.mark.usefixtures("toy_stages")


class Stall:
    """A fault: the worker that comes to the unit of a label first stops there, and the clock goes on when all wait."""

    def __init__(self, label: str) -> None:
        self.label, self.worker = label, ""

    def __call__(self, executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        if wanted.label == self.label and not self.worker:
            self.worker = name
            executor.stalled.add(name)


def stalled_bench(folder: Path, goals: Sequence[WorkUnit], label: str, workers: int = 2) -> tuple[Bench, Stall]:
    stall = Stall(label)
    bench = Bench(folder, goals, workers, fault=stall)

    bench.tick_when_idle()
    return bench, stall


def paced(*goals: WorkUnit) -> list[WorkUnit]:
    """Return goals after some that show how long a unit takes."""
    return [*(unit(f"pace{number}", cost=1.0, rank=-1) for number in range(4)), *goals]


def test_a_straggler_is_started_elsewhere_and_the_first_result_wins(tmp_path: Path) -> None:
    bench, stall = stalled_bench(tmp_path, paced(unit("stuck", cost=1.0)), "stuck")
    assert bench.run() == expected(bench.goals)
    (winner,) = bench.ran_on("stuck")
    assert winner != stall.worker
    assert STRAGGLER_FLOOR_S < bench.clock.now_s <= STRAGGLER_FLOOR_S + 3
    assert any(f"takes long on {stall.worker}" in reason for reason in bench.noted.reasons)


def test_a_straggler_is_looked_for_while_others_are_busy(tmp_path: Path) -> None:
    """Where something happens every moment, nobody waits long enough to call it quiet."""
    chain = passing("0", home="c:0")
    for number in range(1, 200):
        chain = passing(str(number), chain, home="c:0")
    goals = paced(unit("stuck", cost=1.0), unit("end", chain))
    bench, stall = stalled_bench(tmp_path, goals, "stuck", workers=3)

    def fault(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        bench.clock.now_s += 0.5
        stall(executor, name, wanted)

    bench.executor._fault = fault
    assert bench.run() == expected(bench.goals)
    assert bench.ran().index("stuck") < bench.ran().index("100")


def test_a_unit_that_waits_its_turn_is_no_straggler(tmp_path: Path) -> None:
    """One worker has long units, the other is idle most of the time: nothing is done twice."""
    first = passing("0", home="c:0", cost=30.0, rank=-1)
    chain, others = [first], []
    for number in range(1, 5):
        chain.append(passing(str(number), chain[-1], home="c:0", cost=30.0))
        others.append(unit(f"short{number}", chain[-2], home="c:0", cost=0.1, rank=1))
    goals = [unit("end", chain[-1], cost=1.0), *others]

    def work(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        bench.clock.now_s += wanted.cost

    bench = Bench(tmp_path, goals, workers=2, fault=work)
    assert bench.run() == expected(goals)
    assert len(bench.ran()) == len(set(bench.ran()))
    assert bench.noted.reasons == []


def test_what_waits_behind_a_straggler_is_started_elsewhere_with_it(tmp_path: Path) -> None:
    goals = paced(unit("stuck", cost=1.0, rank=5), unit("behind1", rank=6), unit("behind2", rank=6))
    bench, stall = stalled_bench(tmp_path, goals, "stuck")
    assert bench.run() == expected(bench.goals)
    assert bench.clock.now_s <= STRAGGLER_FLOOR_S + 3
    assert len(bench.executor.queued(stall.worker)) == UNITS_AHEAD


def test_a_straggler_that_ends_after_all_leaves_nothing_behind(tmp_path: Path) -> None:
    goals = paced(unit("end", passing("stuck", cost=1.0), rank=5), unit("last", unit("slow", rank=6), rank=7))
    bench, stall = stalled_bench(tmp_path, goals, "stuck")

    def fault(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        stall(executor, name, wanted)
        if wanted.label == "slow" and executor.stalled:
            executor.stalled.clear()
            executor.step_now(stall.worker)

    bench.executor._fault = fault
    assert bench.run() == expected(bench.goals)
    assert sorted(bench.ran_on("stuck")) == ["w1", "w2"]
    assert bench.executor.held() == set()
    assert bench.noted.done.count("stuck") == 1


def test_a_straggler_that_fails_after_all_is_not_heard(tmp_path: Path) -> None:
    """Not even when its unit is under way once more, on a third worker."""
    part = passing("stuck", cost=1.0)
    goals = paced(unit("end", part, rank=5))
    bench, stall = stalled_bench(tmp_path, goals, "stuck", workers=3)
    seen: list[str] = []

    def fault(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> PipelineError | None:
        stall(executor, name, wanted)
        if wanted.label == "end" and not seen:
            seen.append(name)
            executor.lose(bench.ran_on("stuck")[0])  # with the only copy of the result
        elif wanted.label == "stuck" and seen and len(seen) == 1:
            seen.append(name)
            executor.stalled.clear()
            executor._fault = lambda *arguments: PipelineError("a late failure")
            executor.step_now(stall.worker)
            executor._fault = None
        return None

    bench.executor._fault = fault
    assert bench.run() == expected(bench.goals)
    assert len(seen) == 2
    assert bench.executor.held() == set()


def test_a_worker_that_hangs_is_given_no_more_and_its_homes_move(tmp_path: Path) -> None:
    goals: list[WorkUnit] = []
    for span in range(6):
        last = passing(f"{span}.0", home=f"c:{span}", cost=1.0)
        for block in range(1, 4):
            last = passing(f"{span}.{block}", last, home=f"c:{span}", rank=block, cost=1.0)
        goals.append(unit(f"end{span}", last, rank=9, cost=1.0))
    bench, stall = stalled_bench(tmp_path, paced(*goals), "0.1", workers=3)
    assert bench.run() == expected(bench.goals)
    assert 0 < len(bench.executor.queued(stall.worker)) <= UNITS_AHEAD
    assert bench.clock.now_s < 4 * STRAGGLER_FLOOR_S
    assert bench.executor.held() == set()


def test_a_wish_to_cancel_is_looked_at_while_workers_are_busy(tmp_path: Path) -> None:
    bench, _ = stalled_bench(tmp_path, [unit("stuck")], "stuck", workers=1)
    bench.driver._is_cancelled = lambda: bench.clock.now_s > 5
    with pytest.raises(GraphError, match="was cancelled"):
        bench.run()
    assert bench.clock.now_s <= 7
