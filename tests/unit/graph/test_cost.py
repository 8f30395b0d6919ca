"""Costs: linear in what is fitted, and ranges of rows that follow from them."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from pipeline.graph.cost import CPU_RATES, H100_RATES, CostModel, GroupShape, Rates, cost_model
from pipeline.precision import Precision

GROUP = GroupShape(4096, 1024)
SHAPES = (GROUP, GroupShape(1024, 1024))
RATES = [
    item.name
    for item in fields(Rates)
    if item.name.endswith(("_flops", "_weights", "_bytes"))
    and item.name not in ("store_bytes", "peer_bytes", "network_bytes", "held_bytes", "resident_bytes")
]


def costs(model: CostModel) -> list[float]:
    """Return one cost of each kind of unit."""
    return [
        model.forward_s(1e6, 1e4, SHAPES),
        model.add_s(SHAPES, 8),
        model.merge_s(GROUP, 3),
        model.factor_s(GROUP),
        model.scales_s(GROUP),
        model.solve_s(GROUP, True),
        model.solve_s(GROUP, False),
        model.pack_s(1e6),
        model.generate_s(1e6, 3, 32),
        model.continue_s(1e6, 3, 32),
        model.score_s(1e6, 32),
        model.embed_s(1e6),
        model.copy_s(1e6),
    ]


def only(rates: Rates, name: str) -> Rates:
    """Return rates of which all but one take no time."""
    free = dict.fromkeys(RATES, float("inf"))
    return replace(rates, **{**free, "unit_s": 0.0, "passing_s": 0.0, name: getattr(rates, name)})


@pytest.mark.parametrize("rates", [CPU_RATES, H100_RATES])
def test_costs_are_sums_of_what_each_rate_takes(rates: Rates) -> None:
    parts = [costs(CostModel(only(rates, name), 1024)) for name in [*RATES, "unit_s", "passing_s"]]
    for together, *alone in zip(costs(CostModel(rates, 1024)), *parts, strict=True):
        assert together == pytest.approx(sum(alone), rel=1e-12)
    assert all(max(column) > 0 for column in parts)


def test_rows_are_cut_into_whole_tiles_that_cover_them_once() -> None:
    model = CostModel(CPU_RATES, 1024)
    (whole,) = model.row_ranges(GROUP, True, longest_s=1e9)
    assert whole == (0, 4096)
    ranges = model.row_ranges(GroupShape(5000, 1024), True, longest_s=1e-9)
    assert ranges == [(0, 1024), (1024, 2048), (2048, 3072), (3072, 4096), (4096, 5000)]
    half = model.solve_s(GROUP, True) / 2 + model.rates.unit_s
    assert model.row_ranges(GROUP, True, longest_s=half) == [(0, 2048), (2048, 4096)]


def test_assumed_rates_say_so() -> None:
    assert CPU_RATES.is_measured
    assert not H100_RATES.is_measured
    assert "never measured" in H100_RATES.hardware
    assert cost_model("cuda").rates is H100_RATES


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_passes_in_float32_take_longer_and_nothing_else_does(device: str) -> None:
    usual, exact = cost_model(device), cost_model(device, Precision.FLOAT32)
    assert exact.forward_s(1e6, 1e6) > 2 * usual.forward_s(1e6, 1e6)
    assert exact.factor_s(GROUP) == usual.factor_s(GROUP)


def test_workers_that_share_a_device_have_a_part_of_it_each() -> None:
    alone, shared = cost_model("cuda"), cost_model("cuda").shared_by(4)
    assert alone.shared_by(1) == alone
    for name in ("forward_flops", "resident_bytes"):
        assert getattr(shared.rates, name) == getattr(alone.rates, name) / 4
    assert shared.rates.store_bytes == alone.rates.store_bytes
    assert not shared.rates.is_measured
