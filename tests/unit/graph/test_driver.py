"""The driver's decisions: order, places, faults, and when it gives up; on units that cost nothing.

Driver, workers, shelves and work store are the real ones; only what a unit computes is a toy. That the same holds for
real units is shown in ``test_driver_faults.py``.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import GraphError, PipelineError, StorageError
from pipeline.graph import worker as worker_module
from pipeline.graph.dag import Kind, WorkUnit
from pipeline.graph.driver import (
    MAX_LOSSES,
    MAX_RECOVERIES,
    STRAGGLER_FLOOR_S,
    UNITS_AHEAD,
    Driver,
    Observer,
    Tuning,
)
from pipeline.graph.executor import InlineExecutor, WorkerId
from pipeline.graph.stages.call import JobContext
from pipeline.graph.worker import Worker, lost_output
from pipeline.storage.work import StageRecord
from pipeline.storage.work_directory import DirectoryWorkStore
from tests.scripted_executor import Clock, Fault, ScriptedExecutor
from tests.unit.graph.toys import expected, hidden, passing, random_goals, run_toy, unit

TUNING = Tuning(spans=1, solve_s=1.0)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SimpleNamespace(expect_block=lambda index: None)
    monkeypatch.setattr(worker_module, "open_source", lambda *arguments: source)
    monkeypatch.setattr(worker_module, "STAGES", dict.fromkeys(Kind, run_toy))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # power cuts are not tried here


class Noted(Observer):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.reasons: list[str] = []

    def finished(self, unit: WorkUnit, record: StageRecord | None, seconds: float, peak_bytes: int) -> None:
        self.done.append(unit.label)

    def recovered(self, reason: str) -> None:
        self.reasons.append(reason)


class Bench:
    """A driver over scripted workers."""

    def __init__(
        self,
        folder: Path,
        goals: Sequence[WorkUnit],
        workers: int = 1,
        *,
        seed: int = 0,
        fault: Fault | None = None,
        make_goals: Callable[[Tuning], Sequence[WorkUnit]] | None = None,
        **options: Any,
    ) -> None:
        self.goals, self.clock, self.noted = goals, Clock(), Noted()
        self.work = DirectoryWorkStore(folder)
        context = JobContext(str(folder), "", "", (), "cpu", shelf_bytes=200)
        self.executor = ScriptedExecutor(context, workers, seed, fault)
        self.driver = Driver(
            make_goals or (lambda tuning: goals),
            TUNING,
            self.work,
            self.executor,
            self.noted,
            clock=self.clock,
            **options,
        )

    def run(self) -> dict[str, str]:
        """Run to the end and return what the goals came to."""
        return {key: record.summary["digest"] for key, record in self.driver.run().items()}

    def tick_when_idle(self) -> None:
        """Have the clock go on when all workers are stuck."""

        def tick(timeout_s: float) -> None:
            self.clock.now_s += timeout_s
            assert self.clock.now_s < 2000, "nobody does what is stuck"

        self.executor.on_idle = tick

    def ran(self) -> list[str]:
        return [done.label for _, done in self.executor.log]

    def ran_on(self, label: str) -> list[WorkerId]:
        return [name for name, done in self.executor.log if done.label == label]


def once(label: str, act: Callable[[ScriptedExecutor, WorkerId, WorkUnit], PipelineError | None]) -> Fault:
    """Return a fault that strikes when the unit of this label first comes to its turn."""
    struck: list[str] = []

    def fault(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> PipelineError | None:
        if wanted.label == label and not struck:
            struck.append(name)
            return act(executor, name, wanted)
        return None

    return fault


def die(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
    executor.lose(name)


# Order and places.


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


def test_units_of_a_home_run_on_one_worker_and_homes_are_spread(tmp_path: Path) -> None:
    goals, chains = [], {}
    for span in range(4):
        last = passing(f"{span}.0", home=f"c:{span}")
        for block in range(1, 5):
            last = passing(f"{span}.{block}", last, home=f"c:{span}")
        chains[span] = [f"{span}.{block}" for block in range(5)]
        goals.append(unit(f"end{span}", last))
    bench = Bench(tmp_path, goals, workers=4, seed=1)
    bench.run()
    owners = [{name for label in labels for name in bench.ran_on(label)} for labels in chains.values()]
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


def test_a_worker_that_joins_is_given_work(tmp_path: Path) -> None:
    goals = [unit(str(number)) for number in range(20)]
    bench = Bench(tmp_path, goals, fault=once("3", lambda executor, name, wanted: executor.join() and None))
    assert bench.run() == expected(goals)
    assert {name for name, _ in bench.executor.log} == {"w1", "w2"}


# What is lost.


@pytest.mark.parametrize("seed", range(120))
def test_a_job_survives_any_faults_with_the_same_results(tmp_path: Path, seed: int) -> None:
    """Workers die before and after their work, join and stall; stored files vanish or lose a byte."""
    goals, rng = random_goals(seed), random.Random(-seed - 1)
    budget = 3 + seed % 6

    def damage(executor: ScriptedExecutor) -> None:
        files = sorted(tmp_path.glob("*/*/*/output.safetensors"))
        if not files:
            return
        victim = rng.choice(files)
        if rng.random() < 0.5:
            shutil.rmtree(victim.parent)
        else:
            data = bytearray(victim.read_bytes())
            data[-1] ^= 1
            victim.write_bytes(data)

    def fault(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        nonlocal budget
        if budget == 0 or rng.random() > 0.15:
            return
        budget -= 1
        match rng.randrange(6):
            case 0:
                executor.lose(name)
            case 1:
                executor.lose(name, after_work=True)
            case 2:
                executor.lose(rng.choice(list(executor.alive)))
            case 3 | 4:
                damage(executor)
            case _:
                executor.stalled.add(name)
        while len(executor.alive) - len(executor.stalled) < 2 or rng.random() < 0.3:
            executor.join()

    bench = Bench(tmp_path, goals, workers=1 + seed % 4, seed=seed, fault=fault)
    bench.tick_when_idle()
    assert bench.run() == expected(goals)
    assert bench.executor.held() == set()


def test_only_what_a_worker_held_is_computed_again(tmp_path: Path) -> None:
    a, b = passing("a", home="c:0"), passing("b", home="c:1")
    goals = [unit("x", unit("y", a), a), unit("z", unit("w", b), b)]
    bench = Bench(tmp_path, goals, workers=2, fault=once("x", die))
    assert bench.run() == expected(goals)
    twice = [label for label in set(bench.ran()) if bench.ran().count(label) > 1]
    assert twice == ["a"]
    assert "worker" in bench.noted.reasons[0]
    assert "killed by the test" in bench.noted.reasons[0]


def test_saved_states_shorten_what_is_computed_again(tmp_path: Path) -> None:
    chain = [passing("0")]
    for number in range(1, 6):
        saves = (hidden(str(number)),) if number == 3 else ()
        stand_ins = {chain[-1].key: chain[-1].saves} if chain[-1].saves else {}
        chain.append(passing(str(number), chain[-1], saves=saves, stand_ins=stand_ins))
    goals = [unit("end", chain[-1])]

    def lose(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        executor.lose(name)
        executor.join()

    bench = Bench(tmp_path, goals, fault=once("5", lose))
    assert bench.run() == expected(goals)
    assert bench.ran() == ["0", "1", "2", "3", "4", "4", "5", "end"]


def test_saved_states_that_are_gone_are_computed_again(tmp_path: Path) -> None:
    """Another run in the same work directory cleans up its own, which were this one's too."""
    first = passing("first", saves=(hidden("saved"),))
    Bench(tmp_path, [unit("before", first)]).run()
    second = passing("second", first, stand_ins={first.key: first.saves})
    goals = [unit("end", second)]
    bench = Bench(
        tmp_path,
        goals,
        fault=once("second", lambda executor, name, wanted: bench.work.discard(*hidden("saved"))),
    )
    assert bench.run() == expected(goals)
    assert bench.ran() == ["first", "second", "end"]
    assert len(bench.noted.reasons) == 1


def test_states_that_the_job_itself_dropped_are_not_counted_on(tmp_path: Path) -> None:
    """Saved states are obsolete two saves later. When the later ones are lost all the same, everything is done anew."""
    a = passing("a", saves=(hidden("a"),))
    b = passing("b", a, stand_ins={a.key: a.saves}, saves=(hidden("b"),), obsoletes=(hidden("a"),))
    c = passing("c", b, stand_ins={b.key: b.saves})

    deaths: list[str] = []

    def lose(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        if wanted.label in ("b", "c") and wanted.label not in deaths:
            deaths.append(wanted.label)
            bench.work.discard(*hidden("b"))
            executor.lose(name)
            executor.join()

    bench = Bench(tmp_path, [unit("end", c)], fault=lose)
    assert bench.run() == expected(bench.goals)
    assert bench.ran() == ["a", "b", "a", "b", "c", "end"]
    assert len(bench.noted.reasons) == 2, "two workers died, and nothing else was missed"


def test_one_lost_output_that_many_wait_for_is_one_loss(tmp_path: Path) -> None:
    many = 4 * MAX_RECOVERIES
    factor = passing("factor")
    goals = [unit(f"r{number}", factor) for number in range(many)]

    def die_holding(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        executor.lose(bench.ran_on("factor")[0])

    bench = Bench(tmp_path, goals, workers=many // 2 + 1, fault=once("r20", die_holding), seed=2)
    assert bench.run() == expected(goals)
    assert 1 < bench.ran().count("factor") < MAX_RECOVERIES
    assert bench.executor.held() == set()


def test_a_damaged_output_that_many_wait_for_is_one_loss(tmp_path: Path) -> None:
    many = 4 * MAX_RECOVERIES
    merged = unit("merged")
    goals = [unit(f"r{number}", merged) for number in range(many)]
    bench = Bench(
        tmp_path,
        goals,
        workers=many // 2,
        fault=once("r5", lambda executor, name, wanted: bench.work.discard(*merged.place)),
    )
    assert bench.run() == expected(goals)
    assert bench.ran().count("merged") == 2


def test_an_output_that_is_lost_again_and_again_ends_the_job(tmp_path: Path) -> None:
    merged = unit("merged")
    goals = [unit("reader", merged)]
    tries = 0

    def spoil(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        nonlocal tries
        if wanted.label == "reader":
            tries += 1
            path = bench.work.stage_dir(*merged.place) / "output.safetensors"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    bench = Bench(tmp_path, goals, fault=spoil)
    with pytest.raises(StorageError, match="is damaged") as caught:
        bench.run()
    assert caught.value.code == "storage.damaged_stage"
    assert tries == MAX_RECOVERIES + 1


def test_a_passing_output_that_cannot_be_handed_over_ends_the_job(tmp_path: Path) -> None:
    """For example when firewalls keep the nodes of a cluster apart."""
    part = passing("part", home="c:0")
    goals = [unit("reader", part, home="d:0")]
    tries = 0

    def refuse(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> PipelineError | None:
        nonlocal tries
        if wanted.label != "reader":
            return None
        tries += 1
        return lost_output(part.key)

    with pytest.raises(GraphError, match="held by no worker"):
        Bench(tmp_path, goals, workers=2, fault=refuse).run()
    assert tries == MAX_RECOVERIES + 1


@pytest.mark.parametrize("code", ["storage.damaged_stage", "storage.missing_stage"])
def test_a_report_of_damage_that_is_out_of_date_costs_nothing_but_the_unit(tmp_path: Path, code: str) -> None:
    merged = unit("merged")
    context = merged.place._asdict()
    goals = [unit("reader", merged)]
    fault = once("reader", lambda executor, name, wanted: StorageError("was damaged", code=code, context=context))
    bench = Bench(tmp_path, goals, fault=fault)
    assert bench.run() == expected(goals)
    assert bench.ran() == ["merged", "reader"]


def test_damage_found_on_the_way_by_a_unit_that_succeeds_is_repaired(tmp_path: Path) -> None:
    """A worker that looks at a stage whose files have the wrong size discards it; others may still need it."""
    merged, other = unit("merged"), unit("other", rank=1)
    goals = [unit("early", merged), unit("late", merged, other, rank=2)]

    def shorten(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        (bench.work.stage_dir(*merged.place) / "output.safetensors").write_bytes(b"short")
        assert executor.alive[name]._work.lookup(*merged.place) is None

    bench = Bench(tmp_path, goals, fault=once("other", shorten))
    assert bench.run() == expected(goals)
    assert "merged" in bench.ran()[2:]
    assert any("was damaged" in reason for reason in bench.noted.reasons)


def test_a_failure_that_nothing_can_be_done_about_ends_the_job(tmp_path: Path) -> None:
    error = PipelineError("the weights are not finite", code="source.not_finite")
    bench = Bench(tmp_path, [unit("a", unit("b"))], fault=once("a", lambda *arguments: error))
    with pytest.raises(PipelineError) as caught:
        bench.run()
    assert caught.value is error


# Workers that die.


def test_a_unit_that_kills_its_workers_ends_the_job(tmp_path: Path) -> None:
    def kill(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        if wanted.label == "deadly":
            executor.lose(name)
            executor.join()

    bench = Bench(tmp_path, [unit("deadly", rank=1), unit("behind", rank=2)], fault=kill)
    with pytest.raises(GraphError, match=rf"solve, deadly lost its worker {MAX_LOSSES} times: killed") as caught:
        bench.run()
    assert caught.value.code == "graph.worker_lost"
    assert "fewer --workers" in caught.value.hint


def test_what_was_queued_behind_a_deadly_unit_is_not_blamed(tmp_path: Path) -> None:
    deaths = {f"d{number}": 0 for number in range(3)}

    def kill(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        if deaths.get(wanted.label, MAX_LOSSES) < MAX_LOSSES - 1:
            deaths[wanted.label] += 1
            executor.lose(name)
            executor.join()

    goals = [unit("d0", rank=0), unit("d1", rank=0), unit("d2", rank=0), unit("behind", rank=1)]
    bench = Bench(tmp_path, goals, fault=kill)
    assert bench.run() == expected(goals)
    assert sum(deaths.values()) == 3 * (MAX_LOSSES - 1)


def test_a_lone_worker_that_dies_is_waited_for_when_another_is_to_come(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [unit("b", unit("a"))], fault=once("b", die))
    bench.executor.is_expecting = True
    waits: list[float] = []

    def later(timeout_s: float) -> None:
        waits.append(timeout_s)
        if len(waits) == 3:
            bench.executor.join()

    bench.executor.on_idle = later
    assert bench.run() == expected(bench.goals)
    assert len(waits) == 3
    assert all(0 < wait <= 1 for wait in waits)


def test_no_worker_left_is_an_error_that_says_what_was_to_be_done(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [unit("b", unit("a")), unit("c")], fault=once("a", die))
    with pytest.raises(GraphError, match="no worker is left, and 3 work units are to be done") as caught:
        bench.run()
    assert caught.value.code == "graph.no_workers"


# Workers that are slow.


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


# Cancelling, and memory.


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


def test_a_wish_to_cancel_is_looked_at_while_workers_are_busy(tmp_path: Path) -> None:
    bench, _ = stalled_bench(tmp_path, [unit("stuck")], "stuck", workers=1)
    bench.driver._is_cancelled = lambda: bench.clock.now_s > 5
    with pytest.raises(GraphError, match="was cancelled"):
        bench.run()
    assert bench.clock.now_s <= 7


def in_parts(tuning: Tuning) -> list[WorkUnit]:
    """Return a sum over parts as numerous as the tuning's spans, up to four, and what came before it."""
    merged = unit("merged")
    factor = passing("factor", merged)
    number = min(tuning.spans, 4)
    return [unit("before"), *(unit(f"part{n} of {number}", merged, factor) for n in range(number))]


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
