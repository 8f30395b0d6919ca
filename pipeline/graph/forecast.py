"""How a conversion would go on clusters that are described in words, and what it would need there: by simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pipeline.calibrate.tokens import TokenBatch
from pipeline.errors import SpecError
from pipeline.fingerprint import fingerprint
from pipeline.graph.build import UnitInputs, make_variant_plan
from pipeline.graph.memory import WorkerMemory, worker_memory
from pipeline.graph.prediction import Cluster, Prediction
from pipeline.graph.shape import ModelShape
from pipeline.graph.shapes import named_shape
from pipeline.graph.simulate import simulate
from pipeline.spec import ConversionSpec

CLUSTER_KEYS = {
    "nodes": "machines, default 1",
    "gpus": "GPUs of each; or",
    "cpus": "processors of each, default 1",
    "samples": "calibration sequences",
    "length": "tokens in each",
    "slice": "sequences in a token slice",
}
"""What a cluster is described by."""

_CALIBRATION = {"samples": "samples", "length": "length", "slice": "slice_sequences"}


@dataclass(frozen=True)
class ClusterRequest:
    """A cluster to predict a conversion for.

    Attributes:
        cluster: The machines.
        device: ``cpu`` or ``cuda``.
        calibration: Keys of the spec's ``calibration`` that are other than there.
    """

    cluster: Cluster
    device: str
    calibration: Mapping[str, int]


@dataclass(frozen=True)
class Forecast:
    """A conversion on one cluster.

    Attributes:
        prediction: How it would go.
        tokens: Calibration tokens.
        one_worker_s: How long one such worker would take, alone.
        memory: What a worker needs.
        price: Of the whole conversion; None when the spec has no ``cluster.price_per_hour``.
    """

    prediction: Prediction
    tokens: int
    one_worker_s: float
    memory: WorkerMemory
    price: float | None

    @property
    def efficiency(self) -> float:
        """One worker's time over the time that all workers spend."""
        return self.one_worker_s / (self.prediction.cluster.num_workers * self.prediction.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast as JSON values."""
        return {**asdict(self), "efficiency": self.efficiency, "worker_bytes": self.memory.total}


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


def forecast_shape(name: str, spec: ConversionSpec, requests: Sequence[ClusterRequest]) -> tuple[Forecast, ...]:
    """Return a forecast of the conversion of a well-known model for each cluster.

    Raises:
        PlanError: when there is no such shape, or a variant cannot be made from it.
    """
    return forecast(named_shape(name), spec, requests)


def forecast(outline: ModelShape, spec: ConversionSpec, requests: Sequence[ClusterRequest]) -> tuple[Forecast, ...]:
    """Return a forecast of a conversion for each cluster.

    Raises:
        PlanError: when a variant cannot be made from the source.
    """
    inputs = planned_inputs(outline, spec, "cpu")
    alone: dict[Any, float] = {}
    found = []
    for request in requests:
        calibration = spec.calibration.model_copy(update=dict(request.calibration))
        own = spec.model_copy(update={"calibration": calibration})
        asked = replace(inputs, spec=own, calibration=_tokens(calibration.samples, calibration.length))
        asked = replace(asked, device=request.device)
        prediction = simulate(asked, request.cluster)
        key = request.device, calibration
        if key not in alone:
            alone[key] = simulate(asked, Cluster(1, 1)).seconds
        hourly = spec.cluster.price_per_hour
        hours = prediction.seconds * request.cluster.num_workers / 3600
        found.append(
            Forecast(
                prediction=prediction,
                tokens=calibration.samples * calibration.length,
                one_worker_s=alone[key],
                memory=worker_memory(outline, own, request.cluster.num_workers),
                price=None if hourly is None else hourly * hours,
            )
        )
    return tuple(found)


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
