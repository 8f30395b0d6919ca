"""Fits the rates of the cost model to a real conversion, and shows how far its costs were off, kind by kind.

A cost is a sum of what each rate takes, and of the fixed seconds of a unit. For each kind of unit the factors are found
by least squares that make the sum what was measured: rate / factor is the rate that was measured. Kinds that are few or
all of one size do not tell their rates apart: look at measured / predicted there.
From the repository root: ``.venv/bin/python benchmarks/rates.py [--model FOLDER]``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from conversions import Conversion, Job
from flags import add_model, job_parser, scratch_folder, the_job
from models import Shape
from report import print_header, print_table

from pipeline.graph.build import UnitInputs, build_units
from pipeline.graph.cost import CPU_RATES, CostModel, cost_model
from pipeline.graph.dag import WorkUnit, reachable_units
from pipeline.graph.forecast import planned_inputs
from pipeline.graph.job import PHASES
from pipeline.graph.outline import open_folder
from pipeline.graph.tuning import make_tuning
from pipeline.spec import build_spec

STEP = 1e-6
"""Share by which a rate is changed to see what a unit's cost owes to it; too little for a job to be cut otherwise."""

FIXED = ("unit_s", "passing_s")
FITTED = (
    *FIXED,
    "forward_flops",
    "moment_flops",
    "column_flops",
    "factor_flops",
    "grid_weights",
    "added_bytes",
    "touched_bytes",
    "weight_bytes",
    "decoded_bytes",
)

Parts = Mapping[str, float]
"""Seconds of a cost by the rate that they are owed to."""


def main() -> None:
    parser = job_parser(__doc__, variants=["gptq-w4-g64", "awq-w4-g64", "rtn-w8-g64"], samples=32, length=512)
    add_model(parser, Shape(layers=4, hidden=1024, intermediate=2816))
    args = parser.parse_args()
    print_header()
    with scratch_folder(args) as folder:
        job = the_job(args, folder)
        with Conversion(job, folder / "run", 1) as run:
            run.finish()
            events = [event for _, event in run.events if event["event"] == "stage_finished"]
        report(measured(planned(job), events))


def planned(job: Job) -> UnitInputs:
    """Return what the units of a job follow from."""
    spec = build_spec(job.spec(job.source / "nowhere"), "benchmark")
    return planned_inputs(open_folder(job.source).outline, spec, "cpu")


def parts_of(inputs: UnitInputs) -> tuple[dict[str, WorkUnit], dict[str, Parts]]:
    """Return the units of a run with one worker by key, and what their costs are made of."""
    model = cost_model("cpu")
    units = _units(inputs, model)
    parts: dict[str, dict[str, float]] = defaultdict(dict)
    for name in FITTED:
        value = getattr(model.rates, name)
        slower = replace(model.rates, **{name: value * (1 + STEP) if name in FIXED else value / (1 + STEP)})
        for key, unit in _units(inputs, replace(model, rates=slower)).items():
            parts[key][name] = (unit.cost - units[key].cost) / STEP
    return units, dict(parts)


def _units(inputs: UnitInputs, model: CostModel) -> dict[str, WorkUnit]:
    goals = build_units(inputs, make_tuning(inputs.outline, inputs.spec, 1, model), model).goals
    return {unit.key: unit for unit in reachable_units(goals)}


def measured(inputs: UnitInputs, events: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, Parts]]]:
    """Return by kind the seconds that units took, and what their costs are made of.

    An event does not say its unit: units of the same phase, place and cost are alike.
    """
    units, parts = parts_of(inputs)
    alike: dict[tuple[Any, ...], list[WorkUnit]] = defaultdict(list)
    for unit in units.values():
        block = unit.block if unit.block >= 0 else None
        place = (PHASES[unit.kind].value, block, unit.variant or None, unit.label, round(unit.cost, 9))
        alike[place].append(unit)
    found: dict[str, list[tuple[float, Parts]]] = defaultdict(list)
    for event in events:
        place = (*(event[name] for name in ("phase", "block", "variant", "group")), round(event["cost"], 9))
        unit = alike[place].pop()
        found[unit.kind.value].append((event["seconds"], parts[unit.key]))
    return dict(found)


def fit(rows: Sequence[tuple[float, Parts]]) -> dict[str, float]:
    """Return by rate the factor on what is owed to it, none of them negative, that gives the measured seconds best."""
    names = [name for name in FITTED if sum(parts[name] for _, parts in rows) > 1e-3 * sum(s for s, _ in rows)]
    seconds = np.array([seconds for seconds, _ in rows])
    while names:
        matrix = np.array([[parts[name] for name in names] for _, parts in rows])
        factors, *_ = np.linalg.lstsq(matrix, seconds, rcond=None)
        if (factors >= 0).all():
            return dict(zip(names, map(float, factors)))
        names.pop(int(factors.argmin()))
    return {}


def report(found: Mapping[str, Sequence[tuple[float, Parts]]]) -> None:
    """Print measured against predicted seconds by kind, and the rates that fit."""
    table = []
    for kind, rows in found.items():
        actual, cost = sum(seconds for seconds, _ in rows), sum(sum(parts.values()) for _, parts in rows)
        table.append([kind, str(len(rows)), f"{actual:.2f}", f"{cost:.2f}", f"{actual / cost:.2f}", _rates(fit(rows))])
    every = [row for rows in found.values() for row in rows]
    actual, cost = sum(seconds for seconds, _ in every), sum(sum(parts.values()) for _, parts in every)
    table.append(["all", str(len(every)), f"{actual:.2f}", f"{cost:.2f}", f"{actual / cost:.2f}", ""])
    print_table(["kind", "units", "measured s", "predicted s", "ratio", "rates that fit"], table)


def _rates(factors: Mapping[str, float]) -> str:
    fitted = {
        name: getattr(CPU_RATES, name) * factor if name in FIXED else getattr(CPU_RATES, name) / factor
        for name, factor in factors.items()
        if factor > 0
    }
    return ", ".join(f"{name} {value:.3g}" for name, value in fitted.items())


if __name__ == "__main__":
    main()
