"""Into how many spans a text is cut when only time counts, and that asking for smaller units gives them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from pipeline.graph.chains import HALVES, cut, shape_of
from pipeline.graph.cost import CPU_RATES, CostModel, cost_model
from pipeline.graph.shapes import ShapeOutline
from pipeline.graph.tuning import Tuning, make_tuning
from pipeline.spec import ConversionSpec, build_spec

SHAPE = ShapeOutline(
    "small",
    {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
)
FREE = CostModel(replace(CPU_RATES, weight_bytes=1e18, peer_bytes=1e18), 1024)
"""Costs at which a span has nothing to do but to compute."""


def spec(samples: int, heldout_samples: int = 4) -> ConversionSpec:
    return build_spec(
        {
            "source": "small",
            "variants": ["rtn-w8-g128"],
            "targets": ["nowhere"],
            "calibration": {"samples": samples, "length": 64, "slice_sequences": 1},
            "gates": {"heldout_samples": heldout_samples, "heldout_length": 64},
        },
        "test",
    )


def test_a_long_text_has_a_span_for_each_worker() -> None:
    assert make_tuning(SHAPE, spec(8), 12, FREE).spans == 12
    costs = cost_model("cpu")
    assert make_tuning(SHAPE, spec(4096, 4096), 12, costs) == Tuning(12, costs.rates.solve_s, 8, 12)


@pytest.mark.parametrize(("samples", "heldout_samples"), [(4096, 16), (4096, 1000), (4096, 4096), (512, 4096)])
def test_held_out_text_passes_as_fast_as_calibration_in_no_more_spans_than_it_takes(
    samples: int, heldout_samples: int
) -> None:
    costs = cost_model("cpu")
    made = make_tuning(SHAPE, spec(samples, heldout_samples), 12, costs)
    assert made.spans == 12
    block = [SHAPE.tensor_elements(name) for name in SHAPE.skeleton.block_tensors(0).values()]
    groups = [shape_of(group) for group in SHAPE.groups[0]]
    calibration_s = costs.forward_s(sum(block), 64 * samples, groups) / made.spans
    heldout_s = costs.forward_s(sum(block), 64 * heldout_samples)
    assert heldout_s / made.heldout_spans <= calibration_s or made.heldout_spans == 12
    assert made.heldout_spans == 1 or heldout_s / (made.heldout_spans - 1) > calibration_s


def test_a_text_of_which_a_span_would_take_longer_to_begin_than_to_pass_has_fewer_down_to_the_least() -> None:
    cuts = [make_tuning(SHAPE, spec(samples, samples), 12, cost_model("cpu")) for samples in (1, 4, 16, 128)]
    heldout, calibration = [made.heldout_spans for made in cuts], [made.spans for made in cuts]
    for spans, least, most in ((calibration, HALVES, 12), (heldout, 1, 8)):
        assert spans[0] == least
        assert spans == sorted(spans)
        assert spans[1] < spans[2] <= spans[3] == most


@pytest.mark.parametrize("num_slices", [1, 2, 3, 5, 8, 13, 40])
def test_smaller_units_are_half_as_long_until_they_are_single_slices(num_slices: int) -> None:
    tuning = Tuning(spans=1, solve_s=8.0)
    lengths = [num_slices]
    while lengths[-1] > 1:
        tuning = tuning.smaller()
        lengths.append(max(high - low for low, high in cut(num_slices, tuning.spans)))
    # The first half of what is no power of two is the power below it.
    assert all(after < before <= 2 * after for before, after in pairwise(lengths))
    assert tuning == Tuning(2 ** (len(lengths) - 1), 8.0 / 4 ** (len(lengths) - 1), 2 ** (len(lengths) - 1))
