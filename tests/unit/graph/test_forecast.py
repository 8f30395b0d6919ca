"""Forecasts: clusters in words, memory that is kept or refused, prices, and that plans use the same simulation."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from jobs.cli.forecast import render_forecast
from pipeline.errors import PlanError, SpecError
from pipeline.graph.cost import cost_model
from pipeline.graph.forecast import (
    PRICED_ROUTES,
    ClusterRequest,
    forecast,
    forecast_shape,
    parse_cluster,
    planned_inputs,
)
from pipeline.graph.memory import plan_memory
from pipeline.graph.outline import open_folder
from pipeline.graph.plan import plan_conversion
from pipeline.graph.prediction import Cluster
from pipeline.graph.simulate import simulate
from pipeline.heap import FREED_BYTES, LEAST_FREED_BYTES
from pipeline.settings import Settings
from pipeline.spec import ConversionSpec

MakeSpec = Callable[..., ConversionSpec]


def test_clusters_are_read_from_words() -> None:
    request = parse_cluster("nodes=8, gpus=4,samples=512,length=2048,slice=2")
    assert (request.cluster, request.device) == (Cluster(8, 4), "cuda")
    assert request.calibration == {"samples": 512, "length": 2048, "slice_sequences": 2}
    assert parse_cluster("cpus=16").cluster == Cluster(1, 16)
    assert parse_cluster("nodes=3").device == "cpu"


@pytest.mark.parametrize(
    "text", ["", "8", "nodes=0", "nodes=-1", "gpus=two", "tpus=8", "gpus=8,gpus=4", "gpus=8,cpus=4"]
)
def test_what_describes_no_cluster_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_cluster(text)
    assert caught.value.code == "spec.cluster"
    assert "gpus" in caught.value.message + caught.value.hint


def test_a_forecast_compares_with_one_worker_and_says_the_price(llama: Path, make_spec: MakeSpec) -> None:
    outline = open_folder(llama).outline
    request = parse_cluster("nodes=2,gpus=2,samples=64")
    (found,) = forecast(outline, make_spec(cluster={"prices": {"gpu_hour": 9.0}}), [request])
    assert found.tokens == 64 * 32
    spec = make_spec(calibration={"samples": 64})
    inputs = planned_inputs(outline, spec, "cuda")
    assert found.prediction == simulate(inputs, Cluster(2, 2))
    assert found.one_worker_s == simulate(inputs, Cluster(1, 1)).seconds
    assert found.efficiency == pytest.approx(found.one_worker_s / (4 * found.prediction.seconds))
    assert found.price == pytest.approx(9.0 * 4 * found.prediction.seconds / 3600)
    assert forecast(outline, make_spec(), [request])[0].price is None


def test_the_price_is_that_of_the_kind_of_worker_and_of_the_bytes_that_moved(llama: Path, make_spec: MakeSpec) -> None:
    outline = open_folder(llama).outline
    table = {"gpu_hour": 9.0, "cpu_hour": 3.0, "weights_gb": 5.0, "read_gb": 6.0, "written_gb": 7.0, "network_gb": 8.0}
    requests = [parse_cluster("nodes=2,cpus=2"), parse_cluster("gpus=1")]
    many, one = forecast(outline, make_spec(cluster={"prices": table}), requests)
    assert many.prices["cpu_hour"] == pytest.approx(3.0 * 4 * many.prediction.seconds / 3600)
    for name, route in PRICED_ROUTES.items():
        moved = many.prediction.moved_bytes(route)
        assert moved > 0, name
        assert many.prices[name] == pytest.approx(table[name] * moved / 1e9)
    # By stage only what works is paid for; all together, who waits is paid for too.
    waited_s = many.prediction.seconds * (1 - many.prediction.busy_share) * 4
    by_stage = sum(row.price or 0.0 for row in many.stages)
    assert many.price == pytest.approx(by_stage + 3.0 * waited_s / 3600)
    assert many.price == pytest.approx(sum(many.prices.values()))
    assert one.prices["gpu_hour"] == pytest.approx(9.0 * one.prediction.seconds / 3600)
    assert "network_gb" not in one.prices
    # What is not in the table is not part of the price; without the worker's own there is none.
    (cheap,) = forecast(outline, make_spec(cluster={"prices": {"cpu_hour": 3.0}}), requests[:1])
    assert list(cheap.prices) == ["cpu_hour"]
    (unknown,) = forecast(outline, make_spec(cluster={"prices": {"gpu_hour": 9.0, "read_gb": 1.0}}), requests[:1])
    assert unknown.price is None


def test_a_plan_s_time_is_that_of_its_units_on_so_many_workers(
    llama: Path, make_spec: MakeSpec, settings: Settings
) -> None:
    report, (other,) = plan_conversion(make_spec(), settings, 3, requests=[parse_cluster("cpus=3")])
    assert (report.seconds, report.bottleneck) == (other.prediction.seconds, other.prediction.bottleneck)
    assert report.held_bytes == other.prediction.held_bytes > 0


def test_a_worker_without_the_memory_is_refused_with_what_it_is_for(
    llama: Path, make_spec: MakeSpec, settings: Settings
) -> None:
    plan = plan_memory(open_folder(llama).outline, make_spec(), 1, cost_model("cpu"), None)
    report, _ = plan_conversion(make_spec(), settings, 1, plan.least_bytes)
    assert report.worker_bytes == plan.least_bytes < plan.needed.total
    with pytest.raises(
        PlanError, match=rf"a worker needs .* for itself, .* and .* to {plan.needed.largest}; --max-memory is"
    ) as caught:
        plan_conversion(make_spec(), settings, 1, plan.least_bytes - 1)
    assert caught.value.code == "plan.memory"
    assert "slice_sequences" in caught.value.hint


def test_memory_is_kept_or_refused_on_other_clusters_too(make_spec: MakeSpec) -> None:
    calibration = {"samples": 64, "length": 512, "slice_sequences": 1}
    spec = make_spec(source="llama-3.1-8b", variants=["rtn-w8-g128"], calibration=calibration)
    request = parse_cluster("cpus=2")
    (roomy,) = forecast_shape("llama-3.1-8b", spec, [request])
    limit = roomy.memory.total - FREED_BYTES + LEAST_FREED_BYTES - 1
    (tight,) = forecast_shape("llama-3.1-8b", spec, [request], limit)
    assert tight.memory.total <= limit
    assert tight.prediction.num_units > roomy.prediction.num_units, "it is cut smaller"
    with pytest.raises(PlanError, match=r"--max-memory is 1 GB"):
        forecast_shape("llama-3.1-8b", spec, [request], 10**9)


def test_prices_change_no_release(make_spec: MakeSpec) -> None:
    with pytest.raises(SpecError, match=r"cluster\.prices\.gpu_hour"):
        make_spec(cluster={"prices": {"gpu_hour": -1}})
    assert make_spec().cluster.prices.gpu_hour is None


CALIBRATION = {"samples": 512, "length": 2048}
"""So much that computing takes most of the time."""


def test_workers_that_share_a_gpu_compute_by_turns_and_cost_a_part_of_it(make_spec: MakeSpec) -> None:
    prices = {"prices": {"gpu_hour": 9.0}}
    spec = make_spec(source="llama-3.1-8b", variants=["gptq-w4-g128"], calibration=CALIBRATION, cluster=prices)
    whole, halves = (
        ClusterRequest(Cluster(1, workers), "cuda", {}, sharing=sharing) for workers, sharing in ((2, 1), (4, 2))
    )
    alone, shared = forecast_shape("llama-3.1-8b", spec, [whole, halves])
    assert shared.prediction.hardware == f"{alone.prediction.hardware}; 2 workers share it"
    # Two GPUs are two GPUs: halves win what more hands do on the host, and what the schedule makes of them.
    assert 0.7 < shared.prediction.seconds / alone.prediction.seconds < 1.3
    assert shared.prices["gpu_hour"] == pytest.approx(9.0 * 2 * shared.prediction.seconds / 3600)


def test_workers_for_whom_there_is_no_room_now_are_said(make_spec: MakeSpec) -> None:
    spec = make_spec(source="llama-3.1-8b", variants=["rtn-w8-g128"], calibration={"samples": 64})
    requests = [ClusterRequest(Cluster(1, 4), "cpu", {}, "head:6379", free_workers=free) for free in (1, 4)]
    texts = []
    for found in forecast_shape("llama-3.1-8b", spec, requests):
        console = Console(width=200, record=True, file=StringIO())
        render_forecast(found, console)
        texts.append(console.export_text())
    assert "room for 1 of 4 workers at the moment" in texts[0]
    assert "at the moment" not in texts[1]


def test_a_shape_is_forecast_without_a_source(make_spec: MakeSpec) -> None:
    spec = make_spec(source="llama-3.1-8b", variants=["rtn-w8-g128"], calibration={"samples": 64, "length": 512})
    (found,) = forecast_shape("llama-3.1-8b", spec, [parse_cluster("gpus=8")])
    assert found.prediction.seconds < found.one_worker_s
    assert "never measured" in found.prediction.hardware


def test_machines_with_different_numbers_of_workers(llama: Path, make_spec: MakeSpec) -> None:
    cluster = Cluster.of([0, 1, 3])
    assert (cluster.nodes, cluster.workers, cluster.by_node, cluster.num_workers) == (2, 3, (3, 1), 4)
    assert Cluster.of([2, 2]) == Cluster(2, 2)
    inputs = planned_inputs(open_folder(llama).outline, make_spec(calibration={"samples": 64}), "cpu")
    found = simulate(inputs, cluster)
    assert len(found.busy_shares) == 4
    assert all(found.busy_shares)


def test_memory_that_workers_of_a_real_cluster_lack_is_said(llama: Path, make_spec: MakeSpec) -> None:
    outline, spec = open_folder(llama).outline, make_spec()
    real = [ClusterRequest(Cluster(1, 2), "cpu", {}, "head:6379", size) for size in (10**8, 10**12, 0)]
    found = forecast(outline, spec, real)
    assert [item.short_bytes for item in found] == [
        found[0].memory.total - FREED_BYTES + LEAST_FREED_BYTES - 10**8,
        0,
        0,
    ]
    assert {item.address for item in found} == {"head:6379"}
