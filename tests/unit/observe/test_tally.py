"""What is done, what is left, and how long it takes."""

from __future__ import annotations

import pytest

from pipeline.observe.events import (
    Degraded,
    Failed,
    JobStarted,
    Phase,
    PhaseWork,
    Published,
    StageFinished,
    VariantJudged,
)
from pipeline.observe.tally import Tally, VariantState


def start(*work: PhaseWork, variants: tuple[str, ...] = ("a",)) -> Tally:
    tally = Tally(0.0)
    tally.add(JobStarted("acme/tiny", variants, 10, work), 100.0)
    return tally


def test_nothing_is_known_of_the_time_left_before_the_first_unit() -> None:
    assert start(PhaseWork(Phase.SOLVE, 10, 10.0)).eta_s(105.0) is None


def test_the_time_left_follows_cost_not_the_number_of_units() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 2, 10.0))
    tally.add(StageFinished(Phase.SOLVE, seconds=2.0, cost=1.0), 102.0)
    assert tally.eta_s(102.0) == pytest.approx(18.0)


def test_units_side_by_side_divide_the_time_left() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 8, 8.0))
    for _ in range(4):
        tally.add(StageFinished(Phase.SOLVE, seconds=10.0, cost=1.0), 110.0)
    assert tally.eta_s(110.0) == pytest.approx(10.0)


def test_each_phase_has_its_own_pace() -> None:
    tally = start(PhaseWork(Phase.CALIBRATE, 2, 2.0), PhaseWork(Phase.SOLVE, 2, 200.0))
    tally.add(StageFinished(Phase.CALIBRATE, seconds=10.0, cost=1.0), 110.0)
    tally.add(StageFinished(Phase.SOLVE, seconds=5.0, cost=100.0), 115.0)
    # One calibration unit at 10 s and one solve at 5 s are left, one at a time.
    assert tally.eta_s(115.0) == pytest.approx(15.0)


def test_a_phase_that_has_not_run_takes_the_mean_pace() -> None:
    tally = start(PhaseWork(Phase.CALIBRATE, 1, 4.0), PhaseWork(Phase.SOLVE, 1, 6.0))
    tally.add(StageFinished(Phase.CALIBRATE, seconds=8.0, cost=4.0), 108.0)
    assert tally.eta_s(108.0) == pytest.approx(12.0)


def test_reused_units_do_not_make_the_rest_look_fast() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 10, 10.0))
    for _ in range(8):
        tally.add(StageFinished(Phase.SOLVE, seconds=0.0, cost=1.0, reused=True), 100.0)
    assert tally.eta_s(100.0) is None
    tally.add(StageFinished(Phase.SOLVE, seconds=5.0, cost=1.0), 105.0)
    assert tally.eta_s(105.0) == pytest.approx(5.0)
    assert tally.phases[Phase.SOLVE].num_reused == 8


def test_without_measured_seconds_elapsed_time_is_scaled() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 4, 4.0))
    tally.add(StageFinished(Phase.SOLVE, seconds=0.0, cost=1.0), 106.0)
    assert tally.eta_s(106.0) == pytest.approx(18.0)


def test_the_time_left_counts_down_between_units_and_stops_at_zero() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 2, 2.0))
    tally.add(StageFinished(Phase.SOLVE, seconds=10.0, cost=1.0), 110.0)
    assert tally.eta_s(113.0) == pytest.approx(7.0)
    assert tally.eta_s(200.0) == 0.0


def test_more_units_than_planned_raise_the_plan() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 1, 1.0))
    for _ in range(2):
        tally.add(StageFinished(Phase.SOLVE, seconds=1.0, cost=1.0), 101.0)
    phase = tally.phases[Phase.SOLVE]
    assert (phase.num_done, phase.num_units, phase.cost_left) == (2, 2, 0.0)


def test_a_variant_advances_and_never_goes_back() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 2, 2.0), PhaseWork(Phase.EVALUATE, 1, 1.0))
    variant = tally.variants["a"]
    states = [variant.state]
    for event in (
        StageFinished(Phase.SOLVE, 1.0, 1.0, block=3, variant="a", loss=0.5, relative_error=0.2),
        StageFinished(Phase.EVALUATE, 1.0, 1.0, variant="a"),
        StageFinished(Phase.SOLVE, 1.0, 1.0, block=4, variant="a", loss=0.4, relative_error=0.1),
        VariantJudged("a", True, figures={"kl": 0.1}),
        Published("a", "acme/tiny-a", "r1", "/srv", 1),
    ):
        tally.add(event, 101.0)
        states.append(variant.state)
    assert states == [
        VariantState.WAITING,
        VariantState.QUANTIZING,
        VariantState.EVALUATING,
        VariantState.EVALUATING,
        VariantState.PASSED,
        VariantState.PUBLISHED,
    ]
    assert (variant.block, variant.loss, variant.worst_relative_error, variant.figures) == (4, 0.4, 0.2, {"kl": 0.1})


def test_a_job_is_complete_when_its_work_is_done_and_every_variant_is_judged() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 1, 1.0), variants=("a", "b"))
    tally.add(StageFinished(Phase.SOLVE, 1.0, 1.0, variant="a"), 101.0)
    tally.add(VariantJudged("a", True), 102.0)
    assert not tally.is_complete
    tally.add(VariantJudged("b", False), 103.0)
    assert tally.is_complete


def test_degradations_are_counted_and_a_failure_is_kept() -> None:
    tally = start()
    failure = Failed("graph.failed", "a worker died")
    tally.add(Degraded("a", "m", "r"), 101.0)
    tally.add(Degraded("a", "n", "r"), 101.0)
    tally.add(failure, 102.0)
    assert tally.variants["a"].num_degradations == 2
    assert tally.failure == failure
