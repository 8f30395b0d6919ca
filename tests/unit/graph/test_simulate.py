"""The simulator: its clock and links, and that the schedule that it finds is one that could run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.fingerprint import fingerprint
from pipeline.graph.build import UnitInputs, build_units
from pipeline.graph.cost import CPU_RATES, CostModel, cost_model
from pipeline.graph.dag import Kind, WorkUnit, reachable_units
from pipeline.graph.driver import Driver, Observer
from pipeline.graph.executor import Finished
from pipeline.graph.forecast import planned_inputs
from pipeline.graph.prediction import Cluster, Limit, Ran, critical_waits
from pipeline.graph.shapes import ShapeOutline
from pipeline.graph.simulate import EmptyStore, Link, SimulatedExecutor, simulate
from pipeline.graph.traffic import Route, Traffic
from pipeline.graph.tuning import make_tuning
from pipeline.spec import build_spec

CONFIG = {
    "num_hidden_layers": 6,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
SHAPE = ShapeOutline("small", CONFIG)
FREE = replace(
    CPU_RATES,
    store_bytes=float("inf"),
    peer_bytes=float("inf"),
    network_bytes=float("inf"),
    weight_bytes=1e15,
)
"""Rates of CPU workers whose links carry everything at once."""


def inputs(
    samples: int = 32,
    variants: Sequence[str] = ("gptq-w4-g128", "awq-w4-g128", "rtn-w8-g128"),
    slice_sequences: int = 2,
) -> UnitInputs:
    calibration = {"samples": samples, "length": 512, "slice_sequences": slice_sequences}
    spec = build_spec(
        {"source": "small", "variants": list(variants), "targets": ["nowhere"], "calibration": calibration}, "test"
    )
    return planned_inputs(SHAPE, spec, "cpu")


def unit(name: str, needs: Sequence[WorkUnit] = (), kind: Kind = Kind.FACTOR, **fields: object) -> WorkUnit:
    base: Mapping[str, object] = {"cost": 1.0, "out_bytes": 0.0, "is_durable": False, "label": name}
    return WorkUnit(kind, fingerprint(name), {"group": 0}, tuple(needs), **{**base, **fields})  # type: ignore[arg-type]


def executor(rates: object = CPU_RATES, nodes: int = 2, workers: int = 2) -> SimulatedExecutor:
    return SimulatedExecutor(Cluster(nodes, workers), CostModel(rates, 1024), Traffic(SHAPE))  # type: ignore[arg-type]


def end(simulated: SimulatedExecutor) -> tuple[float, str, str]:
    """Return when the next unit ends, which, and where."""
    event = simulated.wait(1.0)
    assert isinstance(event, Finished)
    return simulated.now_s, event.unit.label, event.worker


def run(units: UnitInputs, cluster: Cluster, model: CostModel) -> SimulatedExecutor:
    simulated = SimulatedExecutor(cluster, model, Traffic(units.outline))
    driver = Driver(
        lambda cut: build_units(units, cut, model).goals,
        make_tuning(units.outline, units.spec, cluster.num_workers, model),
        EmptyStore(),
        simulated,
        Observer(),
        clock=lambda: simulated.now_s,
    )
    driver.run()
    return simulated


def test_the_clock_goes_from_end_to_end() -> None:
    simulated = executor(FREE)
    first, second, third, _ = simulated.workers
    simulated.submit(unit("long", cost=5.0), first, {})
    simulated.submit(unit("short", cost=1.0), second, {})
    simulated.submit(unit("queued", cost=3.0), second, {})
    assert simulated.wait(0.0) is not None
    simulated.submit(unit("later", cost=0.5), third, {})
    assert [end(simulated) for _ in range(3)] == [
        (1.5, "later", third),
        (4.0, "queued", second),
        (5.0, "long", first),
    ]
    assert simulated.wait(1.0) is None


def test_a_link_carries_one_thing_after_the_other() -> None:
    link = Link(100.0)
    assert [link.carry(0.0, 200.0), link.carry(1.0, 100.0), link.carry(9.0, 100.0)] == [2.0, 3.0, 10.0]
    assert link.busy_s == 4.0
    # What takes no time to speak of does not wait.
    assert link.carry(9.0, 0.5) == pytest.approx(9.005)


def test_outputs_come_from_other_nodes_one_after_the_other_and_within_a_node_quickly() -> None:
    rates = replace(FREE, network_bytes=100.0, peer_bytes=1000.0)
    simulated = executor(rates, nodes=2, workers=3)
    here, near, _, far, other, _ = simulated.workers
    made = unit("made", out_bytes=200.0)
    simulated.submit(made, here, {})
    end(simulated)
    for name, worker in (("near", near), ("far", far), ("other", other)):
        simulated.submit(unit(name, [made]), worker, {made.key: here})
    assert [end(simulated)[:2] for _ in range(3)] == [
        (pytest.approx(1 + 0.2 + 1), "near"),
        (pytest.approx(1 + 2 + 1), "far"),
        (pytest.approx(1 + 4 + 1), "other"),
    ]
    assert simulated.moved == {(Kind.FACTOR, Route.PEER): 200.0, (Kind.FACTOR, Route.NETWORK): 400.0}


def test_a_node_reads_a_thing_once_and_ahead_of_the_unit_that_needs_it() -> None:
    block = Traffic(SHAPE).block_bytes(0)
    simulated = executor(replace(FREE, store_bytes=block / 2.0), nodes=1, workers=2)  # 2 s for a block
    first, second = simulated.workers
    scales = [unit(f"scales {i}", kind=Kind.SCALES, block=0, cost=1.0) for i in range(2)]
    simulated.submit(unit("long", cost=1.5), first, {})
    simulated.submit(scales[0], first, {})
    simulated.submit(scales[1], second, {})
    # Asked for at 0, there at 2: for both, though one of them had to wait for its worker until 1.5.
    assert [end(simulated)[0] for _ in range(3)] == [1.5, 3.0, 3.0]
    assert simulated.moved == {(Kind.SCALES, Route.WEIGHTS): block}


def test_a_stored_output_is_there_when_it_has_passed_the_link() -> None:
    simulated = executor(replace(FREE, store_bytes=100.0), nodes=1, workers=2)
    first, second = simulated.workers
    for name, worker in (("a", first), ("b", second)):
        simulated.submit(unit(name, is_durable=True, out_bytes=300.0), worker, {})
    # A unit's cost has writing in it, so that goes on while its output passes the link.
    assert [end(simulated)[0] for _ in range(2)] == [3.0, 6.0]


def test_what_a_worker_holds_counts_until_it_is_forgotten() -> None:
    simulated = executor(FREE)
    worker = simulated.workers[0]
    for name in ("a", "b", "c"):
        simulated.submit(made := unit(name, out_bytes=10.0), worker, {})
        end(simulated)
        if name == "b":
            simulated.forget(worker, [made.key])
    assert simulated.prediction(Cluster(2, 2)).held_bytes == 20.0


def test_weights_of_continuations_stay_as_far_as_memory_goes() -> None:
    parameters = sum(SHAPE.tensor_elements(name) for name in SHAPE.skeleton.block_tensors(0).values())
    rates = replace(FREE, weight_bytes=4.0 * parameters, resident_bytes=8.0 * parameters)  # 1 s a block, two stay
    simulated = executor(rates, nodes=1, workers=1)
    (worker,) = simulated.workers
    params = [{"first": block, "last": block + 1, "step": 0, "is_idle": block == 3} for block in range(4)]
    order = [0, 1, 0, 1, 2, 1, 0, 3]
    ends = []
    for i, block in enumerate(order):
        step = replace(unit(f"{i}", kind=Kind.CONTINUE, home=f"continue::{block}", cost=0.5), params=params[block])
        simulated.submit(step, worker, {})
        ends.append(end(simulated)[0])
    taken = [1.5, 1.5, 0.5, 0.5, 1.5, 0.5, 1.5, 0.5]  # what is likely idle takes nothing in
    assert ends == pytest.approx([sum(taken[: i + 1]) for i in range(len(taken))])


@pytest.mark.parametrize("cluster", [Cluster(1, 1), Cluster(1, 3), Cluster(4, 4)])
def test_the_simulated_order_respects_needs_homes_and_the_workers(cluster: Cluster) -> None:
    simulated = run(inputs(), cluster, cost_model("cpu"))
    ran = simulated.ran
    homes: dict[str, str] = {}
    for one in ran.values():
        assert one.begin_s <= one.compute_s <= one.computed_s <= one.end_s
        assert one.computed_s - one.compute_s == pytest.approx(one.unit.cost)
        assert all(ran[need.key].end_s <= one.begin_s for need in one.unit.needs)
        assert all(ran[key].end_s <= one.begin_s for key in one.unit.after)
        if one.unit.home:
            assert homes.setdefault(one.unit.home, one.worker) == one.worker
    for worker in simulated.workers:
        own = sorted((one.begin_s, one.end_s) for one in ran.values() if one.worker == worker)
        assert all(before[1] <= after[0] for before, after in pairwise(own))
    tuning = make_tuning(SHAPE, inputs().spec, cluster.num_workers, cost_model("cpu"))
    assert ran.keys() == {made.key for made in reachable_units(build_units(inputs(), tuning).goals)}


def test_one_worker_takes_the_sum_of_the_costs() -> None:
    model = CostModel(FREE, 1024)
    simulated = run(inputs(), Cluster(1, 1), model)
    assert simulated.now_s == pytest.approx(sum(one.unit.cost for one in simulated.ran.values()))
    assert simulated.prediction(Cluster(1, 1)).busy_share == pytest.approx(1.0)


def test_the_waits_of_the_end_add_up_to_the_whole() -> None:
    for cluster in (Cluster(1, 1), Cluster(2, 4)):
        prediction = simulate(inputs(), cluster)
        assert sum(prediction.waits.values()) == pytest.approx(prediction.seconds)
        assert prediction.bottleneck == max(prediction.waits, key=lambda name: prediction.waits[name])


def test_the_end_waited_for_what_was_slow() -> None:
    def ran(name: str, kind: Kind, times: tuple[float, float, float, float], *before: Ran) -> Ran:
        return Ran(
            unit(name, [one.unit for one in before], kind=kind), "w", *times, waited_for=Limit.NETWORK, before=()
        )

    first = ran("first", Kind.CALIBRATE, (0.0, 0.0, 4.0, 4.0))
    beside = ran("beside", Kind.SOLVE, (0.0, 0.0, 3.0, 3.0))
    last = ran("last", Kind.MERGE, (4.0, 6.0, 7.0, 7.5), first, beside)
    waits = critical_waits({one.unit.key: one for one in (first, beside, last)})
    assert waits == {Limit.FORWARD: 4.0, Limit.NETWORK: 2.0, Limit.REDUCTION: 1.0, Limit.STORE: 0.5}


def test_spans_are_added_up_where_they_are() -> None:
    """Of 16 spans on two nodes, what crosses the network is at most one sum for each linear group and block."""
    units = inputs(variants=["rtn-w8-g128"])
    model = CostModel(replace(CPU_RATES, weight_bytes=1e12, peer_bytes=1e12), 1024)
    simulated = run(units, Cluster(2, 8), model)
    adds = [one for one in simulated.ran.values() if one.unit.kind is Kind.ADD]
    assert len(adds) == 6 * 2
    sums = sum(4.0 * group.in_features**2 for block in SHAPE.groups for group in block)
    assert (Kind.ADD, Route.NETWORK) not in simulated.moved
    assert simulated.moved[Kind.ADD, Route.PEER] == pytest.approx(2 * 7 * sums)
    assert simulated.moved.get((Kind.MERGE, Route.NETWORK), 0.0) <= 2 * sums


@given(workers=st.integers(1, 12), nodes=st.integers(1, 3), samples=st.integers(4, 40))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_more_workers_are_never_much_slower(workers: int, nodes: int, samples: int) -> None:
    units = inputs(samples)
    fewer = simulate(units, Cluster(nodes, workers)).seconds
    more = simulate(units, Cluster(nodes, workers + 1)).seconds
    alone = simulate(units, Cluster(1, 1)).seconds
    # Spans are powers of two, so one worker more can leave one with more to do than before.
    assert more <= 1.5 * fewer
    assert fewer <= 1.05 * alone


def test_a_block_is_solved_while_the_next_one_is_calibrated_where_workers_have_no_span() -> None:
    simulated = run(inputs(256, ["gptq-w4-g128"], slice_sequences=128), Cluster(1, 4), cost_model("cpu"))
    ran = {kind: [one for one in simulated.ran.values() if one.unit.kind is kind] for kind in Kind}
    for block in range(5):
        solves = [one for one in ran[Kind.SOLVE] if one.unit.block == block]
        calibrates = [one for one in ran[Kind.CALIBRATE] if one.unit.block == block + 1]
        assert len(calibrates) == 2
        assert any(one.begin_s < other.end_s and other.begin_s < one.end_s for one in solves for other in calibrates)


def test_workers_are_of_use_where_there_is_work_for_them() -> None:
    units = inputs(256)
    one, many = (simulate(units, Cluster(1, number)).seconds for number in (1, 8))
    assert one / many > 0.8 * 8
