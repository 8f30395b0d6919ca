"""How a conversion would go on clusters that are described in words, and what it would need there: by simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from pipeline.calibrate.tokens import TokenBatch
from pipeline.errors import SpecError
from pipeline.fingerprint import fingerprint
from pipeline.graph.build import UnitInputs, make_variant_plan
from pipeline.graph.cost import cost_model
from pipeline.graph.memory import WorkerMemory, plan_memory
from pipeline.graph.prediction import Cluster, Prediction, Stage
from pipeline.graph.shape import ModelShape
from pipeline.graph.shapes import named_shape
from pipeline.graph.simulate import simulate
from pipeline.graph.traffic import Route
from pipeline.spec import ConversionSpec, PriceSpec

if TYPE_CHECKING:
    from pipeline.graph.cluster import Room

CLUSTER_KEYS = {
    "nodes": "machines, default 1",
    "gpus": "GPUs of each; or",
    "cpus": "processors of each, default 1",
    "samples": "calibration sequences",
    "length": "tokens in each",
    "slice": "sequences in a token slice",
}
"""What a cluster is described by."""

PRICED_ROUTES = {
    "weights_gb": Route.WEIGHTS,
    "read_gb": Route.READ,
    "written_gb": Route.WRITTEN,
    "network_gb": Route.NETWORK,
}
"""What is paid for by the gigabyte: entries of the price table."""

GIGABYTE = 1e9

_CALIBRATION = {"samples": "samples", "length": "length", "slice": "slice_sequences"}


@dataclass(frozen=True)
class ClusterRequest:
    """A cluster to predict a conversion for.

    Attributes:
        cluster: The machines.
        device: ``cpu`` or ``cuda``.
        calibration: Keys of the spec's ``calibration`` that are other than there.
        address: Where it is, if it is a real one.
        worker_bytes: Memory that a machine of it has for each of its workers at least; 0 when it is not known.
        sharing: Workers that one GPU is shared by.
        free_workers: For how many workers there is room at the moment; None when that is not known.
    """

    cluster: Cluster
    device: str
    calibration: Mapping[str, int]
    address: str = ""
    worker_bytes: int = 0
    sharing: int = 1
    free_workers: int | None = None


@dataclass(frozen=True)
class StageRow:
    """What one stage of a conversion takes.

    Attributes:
        stage: Its time, and what it moves.
        worker_bytes: Memory of a worker while it runs the largest unit of the stage; 0 where it needs next to none.
        price: What its compute time and its bytes cost; None when it is not known. Workers that wait are paid too: the
            conversion costs more than its stages together.
    """

    stage: Stage
    worker_bytes: int
    price: float | None


def stage_rows(
    prediction: Prediction, memory: WorkerMemory, prices: PriceSpec, hourly: float | None
) -> tuple[StageRow, ...]:
    """Return a conversion stage by stage; ``hourly`` is the price of a worker for an hour, None when there is none."""

    def price(stage: Stage) -> float | None:
        if hourly is None:
            return None
        moved = sum(getattr(prices, name) * stage.moved_bytes.get(route, 0.0) for name, route in PRICED_ROUTES.items())
        return hourly * stage.compute_s / 3600 + float(moved) / GIGABYTE

    return tuple(StageRow(stage, memory.of(stage.kind), price(stage)) for stage in prediction.stages)


def hourly_price(prices: PriceSpec, device: str, sharing: int = 1) -> float | None:
    """Return the price for an hour of one of ``sharing`` workers on a device, or None when there is none."""
    price = prices.gpu_hour if device == "cuda" else prices.cpu_hour
    return None if price is None else price / sharing


@dataclass(frozen=True)
class Forecast:
    """A conversion on one cluster.

    Attributes:
        prediction: How it would go.
        tokens: Calibration tokens.
        one_worker_s: How long one such worker would take, alone.
        memory: What a worker needs.
        prices: What the conversion would cost, by entry of the spec's ``cluster.prices``; empty when the table has no
            price of such a worker.
        stages: The same stage by stage.
        address: Of the cluster, if it is a real one.
        short_bytes: Memory that workers lack where they are most crowded; 0 when it is not known that they lack any.
        free_workers: For how many workers there is room at the moment; None when that is not known.
    """

    prediction: Prediction
    tokens: int
    one_worker_s: float
    memory: WorkerMemory
    prices: Mapping[str, float]
    stages: tuple[StageRow, ...]
    address: str = ""
    short_bytes: int = 0
    free_workers: int | None = None

    @property
    def price(self) -> float | None:
        """What the conversion would cost; None when it is not known."""
        return sum(self.prices.values()) if self.prices else None

    @property
    def efficiency(self) -> float:
        """One worker's time over the time that all workers spend."""
        return self.one_worker_s / (self.prediction.cluster.num_workers * self.prediction.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast as JSON values."""
        own = {"efficiency": self.efficiency, "price": self.price, "worker_bytes": self.memory.total}
        found = asdict(self)
        del found["prediction"]["stages"]  # they are among the rows
        return {**found, **own}


def parse_cluster(text: str) -> ClusterRequest:
    """Return the cluster that for example ``nodes=8,gpus=8,samples=512,length=2048`` describes.

    Raises:
        SpecError: naming the part that cannot be meant.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in CLUSTER_KEYS or not value.isdecimal() or int(value) < 1 or key in found:
            legal = ", ".join(f"{name} ({meaning})" for name, meaning in CLUSTER_KEYS.items())
            raise SpecError(
                f"--simulate {text!r}: {part!r} is not key=number; keys: {legal}",
                code="spec.cluster",
                hint="for example --simulate nodes=8,gpus=8",
            )
        found[key] = int(value)
    if "gpus" in found and "cpus" in found:
        raise SpecError(f"--simulate {text!r}: workers have gpus or cpus, not both", code="spec.cluster")
    cluster = Cluster(found.get("nodes", 1), found.get("gpus", found.get("cpus", 1)))
    calibration = {_CALIBRATION[key]: value for key, value in found.items() if key in _CALIBRATION}
    return ClusterRequest(cluster, "cuda" if "gpus" in found else "cpu", calibration)


def request_for(address: str, room: Room) -> ClusterRequest:
    """Return the cluster at ``address``, which has that room for workers."""
    cluster = Cluster.of(room.by_node)
    return ClusterRequest(cluster, room.device, {}, address, room.worker_bytes, room.sharing, room.free_workers)


def forecast_shape(
    name: str, spec: ConversionSpec, requests: Sequence[ClusterRequest], max_memory_bytes: int | None = None
) -> tuple[Forecast, ...]:
    """Return a forecast of the conversion of a well-known model for each cluster.

    Raises:
        PlanError: when there is no such shape, a variant cannot be made from it, or a worker cannot do with its memory.
    """
    return forecast(named_shape(name, spec.calibration.experts), spec, requests, max_memory_bytes)


def forecast(
    outline: ModelShape,
    spec: ConversionSpec,
    requests: Sequence[ClusterRequest],
    max_memory_bytes: int | None = None,
) -> tuple[Forecast, ...]:
    """Return a forecast of a conversion for each cluster, whose workers may use ``max_memory_bytes`` each.

    Raises:
        PlanError: when a variant cannot be made from the source, or a worker cannot do with its memory.
    """
    inputs = planned_inputs(outline, spec, "cpu")
    alone: dict[Any, float] = {}
    found = []
    for request in requests:
        calibration = spec.calibration.model_copy(update=dict(request.calibration))
        own = spec.model_copy(update={"calibration": calibration})
        asked = replace(inputs, spec=own, calibration=_tokens(calibration.samples, calibration.length))
        asked = replace(asked, device=request.device)
        costs = cost_model(request.device, spec.precision)
        memory = plan_memory(outline, own, request.cluster.num_workers, costs, max_memory_bytes)
        # A job is cut before it is known who shares a GPU with whom.
        prediction = simulate(asked, request.cluster, costs.shared_by(request.sharing), memory.tuning)
        hourly = hourly_price(spec.cluster.prices, request.device, request.sharing)
        key = request.device, calibration
        if key not in alone:
            tuning = plan_memory(outline, own, 1, costs, max_memory_bytes).tuning
            alone[key] = simulate(asked, Cluster(1, 1), costs, tuning).seconds
        found.append(
            Forecast(
                prediction=prediction,
                tokens=calibration.samples * calibration.length,
                one_worker_s=alone[key],
                memory=memory.needed,
                prices=prices_of(spec.cluster.prices, hourly, prediction, request.device),
                stages=stage_rows(prediction, memory.needed, spec.cluster.prices, hourly),
                address=request.address,
                free_workers=request.free_workers,
                short_bytes=max(0, memory.least_bytes - request.worker_bytes) if request.worker_bytes else 0,
            )
        )
    return tuple(found)


def prices_of(table: PriceSpec, hourly: float | None, prediction: Prediction, device: str) -> dict[str, float]:
    """Return what a conversion costs by entry of the table; nothing where a worker's hour has no price."""
    hour = "gpu_hour" if device == "cuda" else "cpu_hour"
    if hourly is None:
        return {}
    found = {hour: hourly * prediction.seconds * prediction.cluster.num_workers / 3600}
    for name, route in PRICED_ROUTES.items():
        price: float = getattr(table, name)
        found[name] = price * prediction.moved_bytes(route) / GIGABYTE
    return {name: price for name, price in found.items() if price or name == hour}


def planned_inputs(outline: ModelShape, spec: ConversionSpec, device: str) -> UnitInputs:
    """Return what a conversion's units follow from, with stand-ins for tokens and digests: costs need neither.

    Raises:
        PlanError: when a variant cannot be made from the source.
    """
    return UnitInputs(
        outline=outline,
        digests={path: fingerprint(path) for path in (*outline.index.files, "config.json")},
        spec=spec,
        variants=[make_variant_plan(variant, outline) for variant in spec.variants],
        calibration=_tokens(spec.calibration.samples, spec.calibration.length),
        heldout=_tokens(spec.gates.heldout_samples, spec.gates.heldout_length),
        device=device,
    )


def _tokens(samples: int, length: int) -> TokenBatch:
    return TokenBatch(torch.zeros(samples, length, dtype=torch.int64), "none", fingerprint([samples, length]))
