"""What the driver does when workers die and outputs are lost or damaged; on units that cost nothing.

Driver, workers, shelves and work store are the real ones; only what a unit computes is a toy. That the same holds for
real units is shown in ``test_driver_faults.py``.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from pipeline.errors import GraphError, PipelineError, StorageError
from pipeline.graph.dag import WorkUnit
from pipeline.graph.driver import MAX_LOSSES, MAX_RECOVERIES, SUSPECT_LOSSES
from pipeline.graph.executor import WorkerId
from pipeline.graph.tuning import Tuning
from pipeline.graph.worker import lost_output
from tests.scripted_executor import ScriptedExecutor
from tests.unit.graph.bench import TUNING, Bench, die, once
from tests.unit.graph.toys import expected, hidden, in_parts, passing, random_goals, unit

pytestmark = pytest.mark.usefixtures("toy_stages")


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


def test_a_unit_that_was_under_two_workers_deaths_is_cut_smaller_when_it_can_be(tmp_path: Path) -> None:
    """Whom the system kills for memory dies without a word of it."""
    deaths: list[str] = []

    def kill(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        if wanted.label.endswith(("of 1", "of 2")):
            deaths.append(wanted.label)
            executor.lose(name)
            executor.join()

    bench = Bench(tmp_path, in_parts(TUNING), fault=kill, make_goals=in_parts)
    assert bench.run() == expected(in_parts(Tuning(4, 1.0)))
    assert deaths[:2] == ["part0 of 1"] * 2
    assert len(deaths) == 2 * SUSPECT_LOSSES
    assert sum("cut smaller" in reason for reason in bench.noted.reasons) == 2


def test_nothing_is_cut_for_deaths_under_a_unit_that_cannot_be(tmp_path: Path) -> None:
    def kill(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        if wanted.label == "merged":
            executor.lose(name)
            executor.join()

    bench = Bench(tmp_path, in_parts(TUNING), fault=kill, make_goals=in_parts)
    with pytest.raises(GraphError, match=rf"merged lost its worker {MAX_LOSSES} times"):
        bench.run()
    assert not [reason for reason in bench.noted.reasons if "cut smaller" in reason]


def test_deaths_under_different_units_cut_nothing(tmp_path: Path) -> None:
    seen: set[str] = set()

    def kill(executor: ScriptedExecutor, name: WorkerId, wanted: WorkUnit) -> None:
        if wanted.key not in seen:
            seen.add(wanted.key)
            executor.lose(name)
            executor.join()

    bench = Bench(tmp_path, in_parts(Tuning(2, 1.0)), fault=kill)
    assert bench.run() == expected(bench.goals)
    assert len(seen) == 5


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
