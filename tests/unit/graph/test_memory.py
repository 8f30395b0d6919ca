"""What a worker needs in memory, and how a job is cut to fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import PlanError
from pipeline.graph.build import build_units
from pipeline.graph.cost import CPU_RATES, H100_RATES, CostModel, cost_model
from pipeline.graph.dag import Kind, reachable_units
from pipeline.graph.forecast import planned_inputs
from pipeline.graph.memory import SHELF_BYTES, MemoryPlan, WorkerMemory, plan_memory, worker_memory
from pipeline.graph.shape import ModelShape
from pipeline.graph.shapes import ShapeOutline, named_shape
from pipeline.graph.tuning import Tuning, make_tuning
from pipeline.heap import FREED_BYTES, LEAST_FREED_BYTES
from pipeline.spec import ConversionSpec, build_spec

MakeSpec = Callable[..., ConversionSpec]

GIGABYTE = 10**9
COSTS = cost_model("cpu")

TINY_LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
"""The sizes of TinyLlama 1.1B, with two of its blocks: all are equal, and a worker has one at a time."""

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}

NARROW = {**SMALL, "hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 512}


def large_spec(make_spec: MakeSpec, **fields: object) -> ConversionSpec:
    calibration = {"samples": 128, "length": 512, "slice_sequences": 8}
    return make_spec(source="llama-3.1-8b", variants=["gptq-w4-g128"], calibration=calibration, **fields)


def test_shorter_spans_need_less_for_partial_sums_and_hidden_states(make_spec: MakeSpec) -> None:
    """Until there is one slice in each."""
    shape, spec = named_shape("llama-3.1-8b"), large_spec(make_spec)
    cuts = [Tuning(spans, 20.0) for spans in (2, 4, 8, 16, 32)]
    needed = [worker_memory(shape, spec, cut).units["calibrate on a block"] for cut in cuts]
    moments = max(4 * sum(group.in_features**2 for group in block) for block in shape.groups)
    hidden = [4 * 4096 * 8 * 512 * slices for slices in (4, 2, 1)]
    assert [before - after for before, after in pairwise(needed)] == [*(moments + states for states in hidden), 0]


def roomy(needed: WorkerMemory) -> WorkerMemory:
    """Return the memory of a worker that keeps as much as it wants to of what it has freed."""
    return replace(needed, process=needed.process + FREED_BYTES - LEAST_FREED_BYTES)


def test_a_job_is_cut_until_it_fits_and_the_shelf_gets_the_rest(make_spec: MakeSpec) -> None:
    shape, spec = named_shape("llama-3.1-8b"), large_spec(make_spec)
    soonest = make_tuning(shape, spec, 2, COSTS)
    whole = plan_memory(shape, spec, 2, COSTS, None)
    assert whole == MemoryPlan(roomy(worker_memory(shape, spec, soonest)), soonest, SHELF_BYTES, FREED_BYTES)
    assert soonest.spans == 2
    assert plan_memory(shape, spec, 2, COSTS, 64 * GIGABYTE) == whole
    limit = worker_memory(shape, spec, soonest).total
    cramped = plan_memory(shape, spec, 2, COSTS, limit)
    assert cramped == MemoryPlan(worker_memory(shape, spec, soonest), soonest, 0, LEAST_FREED_BYTES)
    tight = plan_memory(shape, spec, 2, COSTS, limit - 1)
    assert tight.tuning == replace(soonest, spans=4), "held-out text needs less anyway"
    assert tight.needed.units == worker_memory(shape, spec, tight.tuning).units
    assert tight.needed.total + tight.shelf_bytes <= limit - 1
    least = worker_memory(shape, spec, replace(soonest, spans=16)).total
    assert plan_memory(shape, spec, 2, COSTS, least).shelf_bytes == 0


def test_held_out_text_is_cut_where_it_needs_most(make_spec: MakeSpec) -> None:
    gates = {"heldout_samples": 4096, "heldout_length": 512}
    spec = large_spec(make_spec, gates=gates)
    shape = named_shape("llama-3.1-8b")
    whole = plan_memory(shape, spec, 1, COSTS, None)
    assert whole.needed.largest == "embed tokens"
    tight = plan_memory(shape, spec, 1, COSTS, whole.needed.total // 2)
    assert tight.needed.total <= whole.needed.total // 2
    assert tight.tuning.heldout_spans > 1
    assert tight.tuning.spans < tight.tuning.heldout_spans


def longest(outline: ModelShape, spec: ConversionSpec, plan: MemoryPlan, costs: CostModel) -> dict[Kind, int]:
    """Return by kind the most slices that one of the units made by a plan holds."""
    found: dict[Kind, int] = {}
    goals = build_units(planned_inputs(outline, spec, "cpu"), plan.tuning, costs).goals
    for unit in reachable_units(goals):
        if unit.kind in (Kind.EMBED, Kind.CALIBRATE, Kind.FORWARD):
            found[unit.kind] = max(found.get(unit.kind, 0), unit.params["high"] - unit.params["low"])
    return found


def test_a_short_text_is_cut_as_planned_though_it_would_be_sooner_done_in_fewer_spans() -> None:
    outline = ShapeOutline("tiny", TINY_LLAMA)
    spec = build_spec(
        {
            "source": "tiny",
            "variants": ["gptq-w4-g64"],
            "targets": ["nowhere"],
            "calibration": {"samples": 16, "length": 64, "slice_sequences": 1},
        },
        "test",
    )
    soonest = make_tuning(outline, spec, 2, COSTS)
    limit = worker_memory(outline, spec, soonest).total - 1
    plan = plan_memory(outline, spec, 2, COSTS, limit)
    assert plan.tuning.spans > soonest.spans
    made = longest(outline, spec, plan, COSTS)[Kind.CALIBRATE]
    assert made == -(-16 // plan.tuning.spans)
    assert worker_memory(outline, spec, replace(plan.tuning, spans=-(-16 // made))).total <= limit


@given(
    config=st.sampled_from([TINY_LLAMA, SMALL, NARROW]),
    samples=st.integers(1, 70),
    length=st.sampled_from([16, 64, 512]),
    sequences=st.integers(1, 9),
    heldout_samples=st.integers(1, 40),
    workers=st.integers(1, 9),
    rates=st.sampled_from([CPU_RATES, H100_RATES]),
    tightness=st.floats(0.0, 1.0),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_units_hold_no_more_slices_than_their_worker_has_memory_for(
    config: dict[str, int],
    samples: int,
    length: int,
    sequences: int,
    heldout_samples: int,
    workers: int,
    rates: object,
    tightness: float,
) -> None:
    outline, costs = ShapeOutline("any", config), CostModel(rates, 1024)  # type: ignore[arg-type]
    spec = build_spec(
        {
            "source": "any",
            "variants": ["gptq-w4-g128"],
            "targets": ["nowhere"],
            "calibration": {"samples": samples, "length": length, "slice_sequences": sequences},
            "gates": {"heldout_samples": heldout_samples, "heldout_length": length},
        },
        "test",
    )
    most = plan_memory(outline, spec, workers, costs, None).needed.total
    single = Tuning(samples, 20.0, heldout_samples, workers)
    least = worker_memory(outline, spec, single).total
    plan = plan_memory(outline, spec, workers, costs, int(least + tightness * (most - least)))
    assert plan.needed.total + plan.shelf_bytes <= max(least, most)
    made = longest(outline, spec, plan, costs)
    # What the units that were made need, by the same estimate: spans of just so many slices.
    num_slices, num_heldout = -(-samples // spec.calibration.sequences_in_slice), -(-heldout_samples // 2)
    as_made = Tuning(-(-num_slices // made[Kind.CALIBRATE]), 20.0, -(-num_heldout // made[Kind.FORWARD]), workers)
    assert worker_memory(outline, spec, as_made).units == plan.needed.units
    assert made[Kind.EMBED] == max(made[Kind.CALIBRATE], made[Kind.FORWARD])


def test_what_cannot_be_cut_to_fit_is_refused_with_what_it_is_for_and_what_would_do(make_spec: MakeSpec) -> None:
    shape, spec = named_shape("llama-3.1-8b"), large_spec(make_spec)
    least = worker_memory(shape, spec, Tuning(16, 20.0, 16, workers=2))
    with pytest.raises(PlanError, match=rf"for itself, .* and .* to {least.largest}; --max-memory is 1 GB") as caught:
        plan_memory(shape, spec, 2, COSTS, GIGABYTE)
    assert caught.value.code == "plan.memory"
    assert "give workers at least" in caught.value.hint
    plan_memory(shape, spec, 2, COSTS, least.total)


def test_freed_memory_is_kept_where_the_next_unit_leaves_room_for_it(make_spec: MakeSpec) -> None:
    """With what a unit needs it is never more than the largest one is given."""
    shape = ShapeOutline("small", {**SMALL, "vocab_size": 50_000})
    spec = make_spec(variants=["gptq-w4-g64"], calibration={"samples": 32, "length": 512})
    for limit in (None, 3 * GIGABYTE // 2):
        plan = plan_memory(shape, spec, 1, COSTS, limit)
        own, more = plan.needed, plan.more_freed_bytes
        block = own.units["calibrate on a block"]
        assert own.largest == "score held-out text"
        assert block < own.units[own.largest]
        assert more[Kind.SCORE] == 0
        assert more[Kind.CALIBRATE] == max(0, min(2 * block - plan.freed_bytes, own.units[own.largest] - block))
        assert more[Kind.MERGE] >= more[Kind.CALIBRATE] > 0
        outside = own.process + own.handing_over
        assert all(more[kind] + own.of(kind) <= outside + own.units[own.largest] for kind in Kind)
        assert all(0 <= more[kind] <= 2 * block for kind in Kind)


def test_methods_that_are_not_asked_for_need_nothing(make_spec: MakeSpec) -> None:
    shape = named_shape("llama-3.1-8b")
    kinds = {
        method: set(worker_memory(shape, make_spec(variants=[f"{method}-w4-g128"]), Tuning(1, 20.0)).units)
        for method in ("rtn", "gptq", "awq")
    }
    assert kinds["gptq"] - kinds["rtn"] == {"factor statistics"}
    assert kinds["awq"] - kinds["rtn"] == {"search scales"}
