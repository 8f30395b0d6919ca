"""How long the rest of a job takes, learnt while it runs.

Costs are seconds on a reference machine, so what there is to learn is a ratio: seconds that units took over what they
were estimated at. It starts at 1 with little weight, and units that ran (reused ones are free) move it; each phase adds
a ratio of its own, which starts at the common one and counts the more, the more of the phase has run. Machines differ
by factors, so ratios are averaged as such::

    log ratio        = cost_run * log(busy / cost_run) / (cost_run + PRIOR * cost)             over all phases
    log ratio_phase  = (cost_run * log(busy / cost_run) + PHASE_PRIOR * cost * log ratio)
                       / (cost_run + PHASE_PRIOR * cost)                                       inside one phase
    left             = sum over phases of (cost_left * ratio_phase) / (workers * utilization)

where utilization is the share of the workers' time in which they were seen at work since the first unit ended; before
that, workers start and nothing can be learnt. What ran long ago counts less (``MEMORY``): a machine slows down, or
others come to share it. A unit that took absurdly long for its cost (the first of its kind loads a library) counts as
``OVERRUN`` times what was to be expected: what happens once says nothing about the rest.

Nothing is said before ``SHARE_KNOWN`` of the cost, or ``BUSY_KNOWN_S`` of work, has run in ``UNITS_KNOWN`` units. What
is said is counted down and moves towards the newest estimate within a tenth of the time since the first unit,
``SETTLING_S`` at most, so that it neither jumps nor turns back at every unit. Cost: a few additions per event.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.observe.events import PhaseWork, StageFinished

PRIOR = 0.005
"""Share of the job's cost that the ratio of 1 counts for at the start."""

PHASE_PRIOR = 0.1
"""Share of a phase's cost that the common ratio counts for in it."""

MEMORY = 0.25
"""Share of the job's cost after which what ran before counts for a third."""

OVERRUN = 10.0
"""Most that a unit counts for, as a multiple of what was to be expected of it."""

UTILIZATION_PRIOR_S = 1.0
"""Seconds of every worker that are taken to have been busy at the start."""

UNITS_KNOWN = 5
SHARE_KNOWN = 0.03
BUSY_KNOWN_S = 30.0
"""What must have run before an estimate is worth showing."""

SETTLING_SHARE = 0.1
SETTLING_S = 5.0
"""Share of the time since the first unit, and longest time, in which what is shown covers most of the way to a new
estimate."""


@dataclass
class _PhasePace:
    """One phase: its cost, what is left of it, and what is remembered of what ran, in cost and in seconds."""

    cost: float
    cost_left: float
    cost_run: float = 0.0
    busy_s: float = 0.0


class Pace:
    """Estimates the time left of a job.

    Args:
        work: The phases that will run.
    """

    def __init__(self, work: Iterable[PhaseWork]) -> None:
        self._phases = {item.phase: _PhasePace(item.cost, item.cost) for item in work}
        self._num_run = 0
        self._cost_run = 0.0
        self._workers = 1
        self._first_s: float | None = None
        self._staffed_until_s = 0.0
        self._staffed_s = 0.0
        self._busy_s = 0.0
        self._estimate_s: float | None = None
        self._estimated_at_s = 0.0
        self._offset_s = 0.0

    def staff(self, num_workers: int, now_s: float) -> None:
        """Take note of how many workers there are from now on."""
        self._clock_in(now_s)
        self._workers = max(1, num_workers)

    def revise(self, left: Iterable[PhaseWork]) -> None:
        """Take note of what is left of each phase, whatever was to be expected before."""
        for item in left:
            phase = self._phases.setdefault(item.phase, _PhasePace(0.0, 0.0))
            phase.cost += item.cost - phase.cost_left
            phase.cost_left = item.cost
        # Nothing to settle down from: what was shown before was of another job.
        self._estimate_s = None

    def add(self, event: StageFinished, now_s: float) -> None:
        """Take a unit that ended at a reading of the clock."""
        phase = self._phases.setdefault(event.phase, _PhasePace(0.0, 0.0))
        phase.cost_left = max(0.0, phase.cost_left - event.cost)
        if event.reused:
            phase.cost = max(0.0, phase.cost - event.cost)
            return
        self._clock_in(now_s)
        self._fade(event.cost)
        phase.busy_s += min(event.seconds, OVERRUN * event.cost * max(1.0, self._ratio()))
        phase.cost_run += event.cost
        self._cost_run += event.cost
        self._num_run += 1
        if self._first_s is None:
            self._first_s = self._staffed_until_s = now_s
        else:
            self._busy_s += min(event.seconds, now_s - self._first_s)
        if self._is_known():
            self._settle(now_s)

    def left_s(self, now_s: float) -> float | None:
        """Return the seconds until all units are done; None while too little is known."""
        if self._estimate_s is None or self._first_s is None:
            return None
        since_s = now_s - self._estimated_at_s
        settling_s = min(SETTLING_S, SETTLING_SHARE * (self._estimated_at_s - self._first_s))
        offset_s = self._offset_s * math.exp(-since_s / settling_s) if settling_s > 0 else 0.0
        return max(0.0, self._estimate_s + offset_s - since_s)

    def _clock_in(self, now_s: float) -> None:
        if self._first_s is not None:
            self._staffed_s += self._workers * (now_s - self._staffed_until_s)
            self._staffed_until_s = now_s

    def _fade(self, cost: float) -> None:
        """Let what ran before a unit of some cost count a little less."""
        if self._cost > 0:
            kept = math.exp(-cost / (MEMORY * self._cost))
            for phase in self._phases.values():
                phase.cost_run, phase.busy_s = kept * phase.cost_run, kept * phase.busy_s
            self._staffed_s, self._busy_s = kept * self._staffed_s, kept * self._busy_s

    @property
    def _cost(self) -> float:
        return sum(phase.cost for phase in self._phases.values())

    def _ratio(self) -> float:
        """Return the seconds per second of cost over all phases."""
        busy_s = sum(phase.busy_s for phase in self._phases.values())
        return _shrunk(busy_s, sum(phase.cost_run for phase in self._phases.values()), 1.0, PRIOR * self._cost)

    def _estimate(self) -> float:
        ratio = self._ratio()
        left_s = sum(
            phase.cost_left * _shrunk(phase.busy_s, phase.cost_run, ratio, PHASE_PRIOR * phase.cost)
            for phase in self._phases.values()
        )
        prior_s = UTILIZATION_PRIOR_S * self._workers
        utilization = (prior_s + self._busy_s) / (prior_s + self._staffed_s)
        return left_s / (self._workers * min(1.0, utilization))

    def _is_known(self) -> bool:
        has_share = self._cost_run >= SHARE_KNOWN * self._cost or self._busy_s >= BUSY_KNOWN_S
        return self._num_run >= UNITS_KNOWN and has_share

    def _settle(self, now_s: float) -> None:
        """Aim at a new estimate, from what is shown now."""
        shown_s = self.left_s(now_s)
        self._estimate_s, self._estimated_at_s = self._estimate(), now_s
        self._offset_s = 0.0 if shown_s is None else shown_s - self._estimate_s


def _shrunk(busy_s: float, cost: float, start: float, weight: float) -> float:
    """Return the mean of ``busy_s / cost``, weighted by its cost, and a starting value, as factors."""
    if cost <= 0 or busy_s <= 0:
        return start
    return math.exp((cost * math.log(busy_s / cost) + weight * math.log(start)) / (cost + weight))
