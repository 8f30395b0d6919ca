"""How well the time left is estimated: laws, and replays of recorded conversions."""

from __future__ import annotations

import pytest

from pipeline.observe.events import Phase, PhaseWork, StageFinished
from pipeline.observe.pace import BUSY_KNOWN_S, SHARE_KNOWN, UNITS_KNOWN, Pace
from pipeline.observe.tally import Tally
from tests.unit.observe.recording import RECORDINGS, read_recording


def run(
    pace: Pace,
    *,
    num_units: int,
    ratio: float = 1.0,
    cost: float = 1.0,
    phase: Phase = Phase.SOLVE,
    workers: int = 1,
    from_s: float = 0.0,
) -> float:
    """Run units side by side without a pause and return the clock at their end."""
    pace.staff(workers, from_s)
    now_s = from_s
    for number in range(num_units):
        now_s = from_s + (number // workers + 1) * ratio * cost
        pace.add(StageFinished(phase, ratio * cost, cost), now_s)
    return now_s


def left(pace: Pace, now_s: float) -> float:
    left_s = pace.left_s(now_s)
    assert left_s is not None
    return left_s


@pytest.mark.parametrize("ratio", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_machine_of_any_speed_is_learnt_from_a_tenth_of_the_work(ratio: float, workers: int) -> None:
    pace = Pace([PhaseWork(Phase.SOLVE, 400, 400.0)])
    now_s = run(pace, num_units=40, ratio=ratio, workers=workers)
    assert left(pace, now_s) == pytest.approx(360 * ratio / workers, rel=0.25)


def test_nothing_is_said_before_a_few_units_and_a_few_percent_have_run() -> None:
    pace = Pace([PhaseWork(Phase.SOLVE, 1000, 1000.0)])
    for number in range(round(SHARE_KNOWN * 1000) - 1):
        pace.add(StageFinished(Phase.SOLVE, 0.1, 1.0), number * 0.1)
        assert pace.left_s(number * 0.1) is None
    pace.add(StageFinished(Phase.SOLVE, 0.1, 1.0), 3.0)
    assert pace.left_s(3.0) is not None


def test_of_a_long_job_some_seconds_of_work_say_enough() -> None:
    pace = Pace([PhaseWork(Phase.SOLVE, 10_000, 10_000.0)])
    now_s = run(pace, num_units=UNITS_KNOWN - 1, ratio=BUSY_KNOWN_S)
    assert pace.left_s(now_s) is None
    pace.add(StageFinished(Phase.SOLVE, 1.0, 1.0), now_s + 1.0)
    assert pace.left_s(now_s + 1.0) is not None


def test_one_ratio_holds_for_phases_that_have_not_run() -> None:
    pace = Pace([PhaseWork(Phase.CALIBRATE, 20, 20.0), PhaseWork(Phase.SOLVE, 80, 80.0)])
    now_s = run(pace, num_units=20, ratio=3.0, phase=Phase.CALIBRATE)
    assert left(pace, now_s) == pytest.approx(240.0, rel=0.15)


def test_a_phase_that_runs_otherwise_gets_a_ratio_of_its_own() -> None:
    pace = Pace([PhaseWork(Phase.CALIBRATE, 50, 50.0), PhaseWork(Phase.SOLVE, 50, 50.0)])
    now_s = run(pace, num_units=50, ratio=1.0, phase=Phase.CALIBRATE)
    now_s = run(pace, num_units=25, ratio=4.0, from_s=now_s)
    assert left(pace, now_s) == pytest.approx(100.0, rel=0.2)


def test_a_phase_that_is_over_leaves_nothing_however_its_cost_was_estimated() -> None:
    pace = Pace([PhaseWork(Phase.SOLVE, 10, 10.0)])
    now_s = run(pace, num_units=10)
    assert left(pace, now_s) == 0.0


def test_reused_units_are_no_work_left_and_say_nothing_of_the_pace() -> None:
    pace = Pace([PhaseWork(Phase.SOLVE, 100, 100.0)])
    for _ in range(80):
        pace.add(StageFinished(Phase.SOLVE, 0.0, 1.0, reused=True), 0.0)
    assert pace.left_s(0.0) is None
    now_s = run(pace, num_units=10, ratio=2.0)
    assert left(pace, now_s) == pytest.approx(20.0, rel=0.15)


def test_the_start_of_the_workers_is_no_work() -> None:
    """The clock runs from when the first unit ended, however long the workers took to be there."""
    late, early = (Pace([PhaseWork(Phase.SOLVE, 100, 100.0)]) for _ in range(2))
    early_s, late_s = run(early, num_units=20), run(late, num_units=20, from_s=300.0)
    assert left(late, late_s) == pytest.approx(left(early, early_s))


@pytest.mark.parametrize("stall_s", [30.0, 3000.0])
def test_a_first_unit_that_takes_absurdly_long_says_nothing_of_the_rest(stall_s: float) -> None:
    pace = Pace([PhaseWork(Phase.PACK, 13, 0.325), PhaseWork(Phase.SOLVE, 100, 100.0)])
    pace.add(StageFinished(Phase.PACK, stall_s, 0.025), stall_s)
    now_s = run(pace, num_units=10, from_s=stall_s)
    assert left(pace, now_s) == pytest.approx(90.0, rel=0.25)


def test_a_worker_that_is_lost_doubles_the_time_left_of_two() -> None:
    pace = Pace([PhaseWork(Phase.SOLVE, 200, 200.0)])
    now_s = run(pace, num_units=100, workers=2)
    two_s = left(pace, now_s)
    now_s = run(pace, num_units=30, workers=1, from_s=now_s)
    assert left(pace, now_s) == pytest.approx(2 * two_s - 30, rel=0.1)


def test_workers_that_wait_for_each_other_do_not_count_in_full() -> None:
    pace = Pace([PhaseWork(Phase.SOLVE, 100, 100.0)])
    pace.staff(4, 0.0)
    for number in range(40):  # one at a time, though there are four workers
        pace.add(StageFinished(Phase.SOLVE, 1.0, 1.0), number + 1.0)
    assert left(pace, 40.0) == pytest.approx(60.0, rel=0.25)


def test_the_time_left_counts_down_between_units_and_stops_at_zero() -> None:
    pace = Pace([PhaseWork(Phase.SOLVE, 20, 20.0)])
    now_s = run(pace, num_units=10)
    before_s = left(pace, now_s)
    assert left(pace, now_s + 3.0) == pytest.approx(before_s - 3.0)
    assert left(pace, now_s + 1000.0) == 0.0


def test_one_odd_unit_does_not_make_it_jump() -> None:
    pace = Pace([PhaseWork(Phase.SOLVE, 100, 100.0)])
    now_s = run(pace, num_units=20)
    before_s = left(pace, now_s)
    pace.add(StageFinished(Phase.SOLVE, 1.0, 0.01), now_s + 0.1)
    assert left(pace, now_s + 0.1) == pytest.approx(before_s, rel=0.05)


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDINGS.iterdir()))
def test_in_recorded_runs_the_time_left_is_within_a_factor_of_two_and_never_absurd(name: str) -> None:
    events = read_recording(name)
    cost = sum(event.cost for _, event in events if isinstance(event, StageFinished))
    first_s = next(at_s for at_s, event in events if isinstance(event, StageFinished))
    end_s = events[-1][0]
    tally, cost_done, num_checked, wrong = Tally(0.0), 0.0, 0, []
    for at_s, event in events:
        tally.add(event, at_s)
        cost_done += event.cost if isinstance(event, StageFinished) else 0.0
        said_s, true_s = tally.eta_s(at_s), end_s - at_s
        if said_s is None:
            assert cost_done < 0.1 * cost, f"nothing is said at {at_s}"
            continue
        num_checked += 1
        assert said_s < 3 * (end_s - first_s), f"{said_s} s at {at_s}"
        # What comes last (scores, generation) takes longer for its cost: a few seconds of a short run are right enough.
        is_right = true_s / 2 <= said_s <= 2 * true_s or abs(said_s - true_s) < 0.2 * (end_s - first_s)
        if cost_done >= 0.1 * cost and not is_right:
            wrong.append((at_s, said_s, true_s))
    assert num_checked > 50
    assert wrong == []
