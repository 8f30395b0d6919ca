"""The driver's decisions: order, places, cancelling, and units that are cut smaller; on units that cost nothing.

Driver, workers, shelves and work store are the real ones; only what a unit computes is a toy. That the same holds for
real units is shown in ``test_driver_faults.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import GraphError, PipelineError
from pipeline.graph.dag import WorkUnit
from pipeline.graph.driver import UNITS_AHEAD, Driver, Observer
from pipeline.graph.executor import InlineExecutor, WorkerId
from pipeline.graph.stages.call import JobContext
from pipeline.graph.tuning import Tuning
from pipeline.graph.worker import Worker
from pipeline.storage.work_directory import DirectoryWorkStore
from tests.scripted_executor import ScriptedExecutor
from tests.unit.graph.bench import TUNING, Bench, once
from tests.unit.graph.toys import expected, in_parts, passing, random_goals, unit

pytestmark = pytest.mark.usefixtures("toy_stages")


def test_a_job_runs_every_unit_once_and_returns_its_durable_goals(tmp_path: Path) -> None:
    a, p = unit("a"), passing("p")
    goals = [unit("d", a, p), p, unit("e", p)]
    bench = Bench(tmp_path, goals, workers=2)
    assert bench.run() == expected(goals)
    assert sorted(bench.ran()) == ["a", "d", "e", "p"]
    assert sorted(bench.noted.done) == ["a", "d", "e", "p"]
    assert bench.noted.reasons == []


@pytest.mark.parametrize("seed", range(40))
def test_any_number_of_workers_comes_to_the_same(tmp_path: Path, seed: int) -> None:
    goals = random_goals(seed)
    bench = Bench(tmp_path, goals, workers=1 + seed % 5, seed=seed)
    assert bench.run() == expected(goals)
    assert len(bench.ran()) == len(set(bench.ran())), "nothing is done twice"
    assert bench.executor.held() == set(), "nobody reads any of it any more"
    assert bench.noted.reasons == []


def test_finished_work_is_found_and_its_needs_are_not_run(tmp_path: Path) -> None:
    goals = random_goals(1)
    Bench(tmp_path, goals).run()
    again = Bench(tmp_path, goals, workers=2)
    assert again.run() == expected(goals)
    assert again.ran() == []


def test_of_what_can_run_the_lowest_rank_does(tmp_path: Path) -> None:
    goals = [unit("late", rank=3), unit("middle", rank=2), unit("early", rank=1)]
    bench = Bench(tmp_path, goals)
    bench.run()
    assert bench.ran() == ["early", "middle", "late"]


def test_of_equal_ones_a_worker_takes_what_it_holds_the_inputs_of(tmp_path: Path) -> None:
    parts = [passing(f"p{number}", rank=0, out_bytes=1) for number in range(4)]
    readers = [unit(f"r{number}", part, rank=1) for number, part in enumerate(parts)]
    bench = Bench(tmp_path, readers[::-1], workers=2, seed=3)
    bench.run()
    local = sum(bench.ran_on(f"p{number}") == bench.ran_on(f"r{number}") for number in range(4))
    assert local >= 3


def spans_of_a_text(number: int, blocks: int) -> tuple[list[WorkUnit], list[list[str]]]:
    """Return what ends so many spans of a text, each with a home of its own, and the labels of each one's units."""
    goals, chains = [], []
    for span in range(number):
        labels = [f"{span}.{block}" for block in range(blocks)]
        last = passing(labels[0], home=f"c:{span}")
        for label in labels[1:]:
            last = passing(label, last, home=f"c:{span}")
        goals.append(unit(f"end{span}", last))
        chains.append(labels)
    return goals, chains


def test_units_of_a_home_run_on_one_worker_and_homes_are_spread(tmp_path: Path) -> None:
    goals, chains = spans_of_a_text(4, blocks=5)
    bench = Bench(tmp_path, goals, workers=4, seed=1)
    bench.run()
    owners = [{name for label in labels for name in bench.ran_on(label)} for labels in chains]
    assert all(len(owner) == 1 for owner in owners)
    assert len(set.union(*owners)) == 4


def test_a_worker_is_given_no_more_than_it_needs_to_stay_busy(tmp_path: Path) -> None:
    goals = [unit(str(number)) for number in range(10)]
    most = 0

    def watch(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        nonlocal most
        most = max(most, *(len(executor.queued(worker)) for worker in executor.alive))

    Bench(tmp_path, goals, workers=2, fault=watch).run()
    assert most == UNITS_AHEAD


@pytest.mark.parametrize(("pace_cost", "most"), [(1.0, UNITS_AHEAD), (1e-9, 1)])
def test_nothing_is_queued_behind_a_unit_that_is_long_at_the_pace_so_far(
    pace_cost: float, most: int, tmp_path: Path
) -> None:
    """By their cost all are short; what the first one took says that they are not."""
    goals = [unit("pace", cost=pace_cost, rank=-1), *(unit(str(number), cost=1.0) for number in range(10))]
    queued: list[int] = []

    def watch(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        if wanted.label != "pace":
            queued.append(len(executor.queued(name)))

    Bench(tmp_path, goals, workers=1, fault=watch).run()
    assert queued[0] == most  # those after it are as short as they cost, and the pace is of all


def test_a_worker_that_joins_is_given_work(tmp_path: Path) -> None:
    goals = [unit(str(number)) for number in range(20)]
    bench = Bench(tmp_path, goals, fault=once("3", lambda executor, name, wanted: executor.join() and None))
    assert bench.run() == expected(goals)
    assert {name for name, _ in bench.executor.log} == {"w1", "w2"}


def test_a_worker_that_joins_is_left_its_part_of_the_chains_that_others_have_begun(tmp_path: Path) -> None:
    goals, chains = spans_of_a_text(4, blocks=9)
    bench = Bench(
        tmp_path, goals, workers=1, fault=once("3.0", lambda executor, name, wanted: executor.join() and None)
    )
    assert bench.run() == expected(goals)
    owners = [[name for label in labels for name in bench.ran_on(label)] for labels in chains]
    assert all(owner[0] == "w1" for owner in owners), "all had begun"
    assert sorted(owner[-1] for owner in owners) == ["w1", "w1", "w2", "w2"]
    # A span that has moved stays where it is.
    assert all(owner == sorted(owner) for owner in owners)


def test_a_cancelled_job_stops_within_a_unit_and_loses_nothing(tmp_path: Path) -> None:
    goals = [unit(str(number)) for number in range(10)]
    cancelled = False

    def cancel(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        nonlocal cancelled
        cancelled = wanted.label == "3"

    bench = Bench(tmp_path, goals, fault=cancel, is_cancelled=lambda: cancelled)
    with pytest.raises(GraphError, match="was cancelled") as caught:
        bench.run()
    assert caught.value.code == "graph.cancelled"
    assert bench.ran() == ["0", "1", "2", "3"]
    again = Bench(tmp_path, goals, workers=2)
    assert again.run() == expected(goals)
    assert sorted(again.ran()) == ["4", "5", "6", "7", "8", "9"]


@pytest.mark.parametrize("is_signal", [False, True])
def test_units_that_run_when_a_job_is_stopped_may_end_and_no_other_begins(tmp_path: Path, is_signal: bool) -> None:
    goals = [unit(str(number)) for number in range(20)]
    is_cancelled = False

    def stop(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        nonlocal is_cancelled
        if wanted.label == "5" and not executor.begun:
            executor.begun = {other for other in executor.alive if other != name}
            if is_signal:
                raise KeyboardInterrupt
            is_cancelled = True

    bench = Bench(tmp_path, goals, workers=3, fault=stop, is_cancelled=lambda: is_cancelled)
    with pytest.raises(KeyboardInterrupt if is_signal else GraphError):
        bench.run()
    ran = bench.ran()
    assert bench.noted.done == ran, "what ended was told"
    assert {name for name, _ in bench.executor.log[-2:]} == bench.executor.begun
    again = Bench(tmp_path, goals)
    assert again.run() == expected(goals)
    assert sorted([*ran, *again.ran()], key=int) == [str(number) for number in range(20)]


@pytest.mark.parametrize("is_death", [False, True], ids=["an error", "a death"])
def test_units_are_cut_smaller_when_memory_runs_out(tmp_path: Path, is_death: bool) -> None:
    def fault(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> PipelineError | None:
        if not wanted.label.endswith(("of 1", "of 2")):
            return None
        if not is_death:
            return GraphError("no memory", code="graph.out_of_memory")
        executor.lose(name, out_of_memory=True)
        executor.join()
        return None

    bench = Bench(tmp_path, in_parts(TUNING), workers=2, fault=fault, make_goals=in_parts)
    four = in_parts(Tuning(4, 1.0))
    assert bench.run() == expected(four)
    assert bench.ran().count("before") == bench.ran().count("merged") == 1
    assert sum("cut smaller" in reason for reason in bench.noted.reasons) >= 2
    assert bench.executor.held() == set()


def test_units_that_cannot_be_cut_smaller_end_the_job(tmp_path: Path) -> None:
    def fault(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> PipelineError | None:
        return GraphError("merged needs too much", code="graph.out_of_memory") if wanted.label == "merged" else None

    bench = Bench(tmp_path, in_parts(TUNING), fault=fault, make_goals=in_parts)
    with pytest.raises(GraphError, match="as small as they can be") as caught:
        bench.run()
    assert caught.value.code == "graph.out_of_memory"
    assert "fewer --workers" in caught.value.hint


def test_an_old_cut_s_unit_that_still_runs_takes_nothing_from_the_new(tmp_path: Path) -> None:
    """What a unit reads is dropped after its last reader; one that was cut away is no reader any more."""
    ran: list[str] = []

    def fault(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> PipelineError | None:
        ran.append(wanted.label)
        if wanted.label == "part0 of 2":
            return GraphError("no memory", code="graph.out_of_memory")
        return None

    for seed in range(10):
        ran.clear()
        bench = Bench(
            tmp_path / str(seed),
            [],
            workers=2,
            seed=seed,
            fault=fault,
            make_goals=lambda tuning: in_parts(replace(tuning, spans=2 * tuning.spans)),
        )
        assert bench.run() == expected(in_parts(Tuning(4, 1.0)))
        assert ran.count("factor") == 1
        assert bench.executor.held() == set()


def test_an_inline_executor_gives_what_many_workers_do(tmp_path: Path) -> None:
    goals = random_goals(7)
    context = JobContext(str(tmp_path), "", "", (), "cpu", shelf_bytes=0)
    executor = InlineExecutor(Worker(context))
    records = Driver(lambda tuning: goals, TUNING, DirectoryWorkStore(tmp_path), executor, Observer()).run()
    assert {key: record.summary["digest"] for key, record in records.items()} == expected(goals)
    executor.close()
    assert not [path for path in tmp_path.glob(".tmp/*") if path.is_dir()], "what was spilled is gone"
