"""What a worker needs in memory, and how a job is cut to fit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from pipeline.errors import PlanError
from pipeline.graph.memory import SHELF_BYTES, plan_memory, worker_memory
from pipeline.graph.shapes import named_shape
from pipeline.spec import ConversionSpec

MakeSpec = Callable[..., ConversionSpec]

GIGABYTE = 10**9


def large_spec(make_spec: MakeSpec, **fields: object) -> ConversionSpec:
    calibration = {"samples": 128, "length": 512, "slice_sequences": 8}
    return make_spec(source="llama-3.1-8b", variants=["gptq-w4-g128"], calibration=calibration, **fields)


def test_shorter_spans_need_less_for_partial_sums_until_there_is_one_slice_in_each(make_spec: MakeSpec) -> None:
    shape, spec = named_shape("llama-3.1-8b"), large_spec(make_spec)
    needed = [worker_memory(shape, spec, spans).units["calibrate on a block"] for spans in (1, 2, 4, 8, 16, 32)]
    moments = max(4 * sum(group.in_features**2 for group in block) for block in shape.groups)
    assert [before - after for before, after in pairwise(needed)] == [*4 * [moments], 0]


def test_a_job_is_cut_until_it_fits_and_the_shelf_gets_the_rest(make_spec: MakeSpec) -> None:
    shape, spec = named_shape("llama-3.1-8b"), large_spec(make_spec)
    whole = plan_memory(shape, spec, 2, None)
    assert (whole.spans, whole.shelf_bytes) == (2, SHELF_BYTES)
    roomy = plan_memory(shape, spec, 2, 64 * GIGABYTE)
    assert (roomy.spans, roomy.shelf_bytes) == (2, SHELF_BYTES)
    tight = plan_memory(shape, spec, 2, whole.needed.total - 1)
    assert tight.spans == 4
    assert tight.needed.total + tight.shelf_bytes <= whole.needed.total - 1
    least = worker_memory(shape, spec, 16).total
    assert plan_memory(shape, spec, 2, least).shelf_bytes == 0


def test_what_cannot_be_cut_to_fit_is_refused_with_what_it_is_for_and_what_would_do(make_spec: MakeSpec) -> None:
    shape, spec = named_shape("llama-3.1-8b"), large_spec(make_spec)
    least = worker_memory(shape, spec, 16)
    with pytest.raises(PlanError, match=rf"for itself, .* and .* to {least.largest}; --max-memory is 1 GB") as caught:
        plan_memory(shape, spec, 2, GIGABYTE)
    assert caught.value.code == "plan.memory"
    assert "give workers at least" in caught.value.hint
    plan_memory(shape, spec, 2, least.total)


def test_methods_that_are_not_asked_for_need_nothing(make_spec: MakeSpec) -> None:
    shape = named_shape("llama-3.1-8b")
    kinds = {
        method: set(worker_memory(shape, make_spec(variants=[f"{method}-w4-g128"]), 1).units)
        for method in ("rtn", "gptq", "awq")
    }
    assert kinds["gptq"] - kinds["rtn"] == {"factor statistics"}
    assert kinds["awq"] - kinds["rtn"] == {"search scales"}
