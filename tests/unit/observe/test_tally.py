"""What is done, what is left, and how long it takes."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.observe.events import (
    Degraded,
    Failed,
    JobRevised,
    JobStarted,
    Phase,
    PhaseWork,
    Published,
    StageFinished,
    VariantJudged,
    WorkersReady,
    WorkersStarting,
)
from pipeline.observe.tally import Tally, VariantState


def start(*work: PhaseWork, variants: tuple[str, ...] = ("a",), num_blocks: int = 10) -> Tally:
    tally = Tally(0.0)
    tally.add(JobStarted("acme/tiny", variants, num_blocks, work), 100.0)
    return tally


def reused(phase: Phase, block: int, **changes: Any) -> StageFinished:
    return StageFinished(phase, 0.0, 1.0, block=block, reused=True, **changes)


def test_the_clock_runs_from_the_start_of_the_command_through_that_of_the_workers() -> None:
    tally = Tally(10.0)
    tally.add(WorkersStarting(2), 13.0)
    tally.add(WorkersReady(1, 2), 30.0)
    tally.add(JobStarted("acme/tiny", ("a",), 1, ()), 31.0)
    assert tally.elapsed_s(40.0) == 30.0
    assert (tally.num_workers, tally.num_workers_wanted) == (1, 2)


def test_the_time_left_is_that_of_the_workers_there_are() -> None:
    tally = Tally(0.0)
    tally.add(WorkersReady(2, 2), 0.0)
    tally.add(JobStarted("acme/tiny", (), 1, (PhaseWork(Phase.SOLVE, 200, 200.0),)), 0.0)
    for number in range(100):
        tally.add(StageFinished(Phase.SOLVE, 1.0, 1.0), number // 2 + 1.0)
    assert tally.eta_s(50.0) == pytest.approx(50.0, rel=0.1)


def test_what_is_left_can_be_known_anew() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 100, 100.0))
    for number in range(20):
        tally.add(StageFinished(Phase.SOLVE, 1.0, 1.0), 101.0 + number)
    tally.add(JobRevised((PhaseWork(Phase.SOLVE, 30, 30.0), PhaseWork(Phase.PACK, 4, 4.0))), 120.0)
    assert tally.phases[Phase.SOLVE].num_units == 50
    assert tally.phases[Phase.PACK].num_units == 4
    tally.add(StageFinished(Phase.SOLVE, 1.0, 1.0), 121.0)
    assert tally.eta_s(121.0) == pytest.approx(33.0, rel=0.35)
    for phase, number in ((Phase.SOLVE, 29), (Phase.PACK, 4)):
        for _ in range(number):
            tally.add(StageFinished(phase, 1.0, 1.0), 150.0)
    assert all(phase.is_complete for phase in tally.phases.values())


def test_a_phase_shows_the_furthest_block_whatever_ends_last() -> None:
    tally = start(PhaseWork(Phase.CALIBRATE, 3, 3.0))
    for block in (0, 2, 1):
        tally.add(StageFinished(Phase.CALIBRATE, 1.0, 1.0, block=block), 101.0)
    assert tally.phases[Phase.CALIBRATE].block == 2


def test_a_run_that_finds_all_done_shows_all_blocks_of_every_variant() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 12, 12.0), PhaseWork(Phase.PACK, 6, 6.0), num_blocks=6)
    for block in range(6):
        for phase in (Phase.PACK, Phase.SOLVE, Phase.SOLVE):
            error = 0.1 + 0.01 * block if phase is Phase.PACK else None
            tally.add(reused(phase, block, variant="a", relative_error=error), 100.0)
    variant = tally.variants["a"]
    assert (variant.num_packed, variant.state) == (6, VariantState.EVALUATING)
    assert variant.worst_relative_error == pytest.approx(0.15)
    assert variant.loss is None


def test_blocks_that_end_out_of_order_are_counted_and_the_loss_is_the_furthest_s() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 4, 4.0), PhaseWork(Phase.PACK, 3, 3.0), num_blocks=3)
    for block, loss in ((0, 0.1), (2, 0.5), (1, 0.3)):
        tally.add(StageFinished(Phase.SOLVE, 1.0, 1.0, block=block, variant="a", loss=loss), 101.0)
    tally.add(StageFinished(Phase.PACK, 1.0, 1.0, block=1, variant="a"), 102.0)
    assert (tally.variants["a"].loss, tally.variants["a"].num_packed) == (0.5, 1)


def test_a_block_that_is_packed_again_counts_once() -> None:
    tally = start(PhaseWork(Phase.PACK, 2, 2.0), num_blocks=2)
    for _ in range(2):
        tally.add(StageFinished(Phase.PACK, 1.0, 1.0, block=0, variant="a"), 101.0)
    assert tally.variants["a"].num_packed == 1


def test_a_variant_is_quantizing_until_its_last_block_is_packed() -> None:
    """Held-out text runs through the first blocks while the last ones are solved."""
    tally = start(PhaseWork(Phase.PACK, 2, 2.0), PhaseWork(Phase.EVALUATE, 2, 2.0), num_blocks=2)
    tally.add(StageFinished(Phase.PACK, 1.0, 1.0, block=0, variant="a"), 101.0)
    tally.add(StageFinished(Phase.EVALUATE, 1.0, 1.0, block=0, variant="a"), 102.0)
    assert tally.variants["a"].state is VariantState.QUANTIZING
    tally.add(StageFinished(Phase.PACK, 1.0, 1.0, block=1, variant="a"), 103.0)
    assert tally.variants["a"].state is VariantState.EVALUATING


def test_a_variant_whose_work_was_another_s_has_all_blocks_once_it_is_judged() -> None:
    tally = start(variants=("a", "same-as-a"), num_blocks=2)
    assert (tally.variants["same-as-a"].num_packed, tally.variants["same-as-a"].state) == (0, VariantState.WAITING)
    tally.add(VariantJudged("same-as-a", True), 102.0)
    assert tally.variants["same-as-a"].num_packed == 2


def test_more_units_than_planned_raise_the_plan() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 1, 1.0))
    for _ in range(2):
        tally.add(StageFinished(Phase.SOLVE, seconds=1.0, cost=1.0), 101.0)
    phase = tally.phases[Phase.SOLVE]
    assert (phase.num_done, phase.num_units) == (2, 2)


def test_a_variant_advances_and_never_goes_back() -> None:
    tally = start(PhaseWork(Phase.SOLVE, 2, 2.0), PhaseWork(Phase.PACK, 1, 1.0), num_blocks=1)
    variant = tally.variants["a"]
    states = [variant.state]
    for event in (
        StageFinished(Phase.SOLVE, 1.0, 1.0, block=3, variant="a", loss=0.5, relative_error=0.2),
        StageFinished(Phase.PACK, 1.0, 1.0, block=0, variant="a", relative_error=0.1),
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
    assert (variant.furthest, variant.loss, variant.worst_relative_error, variant.figures) == (4, 0.4, 0.2, {"kl": 0.1})


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
