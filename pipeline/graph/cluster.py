"""Ray: where work units run. Local by default, a cluster by address.

Ray carries only small values (a unit and its record); tensors travel through the work store, so nothing is lost with
a worker, a node or the object store. A unit asks for one CPU (and a share of a GPU when the job runs on GPUs); a
request that the cluster can never meet fails at once instead of pending for ever. A unit whose worker died is started
again by Ray up to ``MAX_RETRIES`` times.
"""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import GraphError, PipelineError
from pipeline.graph.dag import WorkUnit
from pipeline.graph.stages import JobContext, run_unit
from pipeline.settings import quiet_ray
from pipeline.storage.work import StageRecord

MAX_RETRIES = 3
"""Starts of a unit whose worker process died, after the first."""

OBJECT_STORE_BYTES = 100_000_000
"""Local object store: only records pass through it."""

UNITS_AHEAD = 2
"""Units in flight per worker: one that runs and one that is ready when it ends."""


@dataclass(frozen=True)
class _Outcome:
    """What a unit came to: a record, or an error of ours, which Ray would wrap if it were raised."""

    record: StageRecord | None
    error: PipelineError | None
    seconds: float


def _run_guarded(context: JobContext, unit: WorkUnit) -> _Outcome:
    start = time.monotonic()
    try:
        return _Outcome(run_unit(context, unit), None, time.monotonic() - start)
    except PipelineError as error:
        return _Outcome(None, error, time.monotonic() - start)


class RayExecutor:
    """Runs work units as Ray tasks."""

    def __init__(self, context: JobContext, workers: int, address: str | None = None) -> None:
        """Join the cluster at ``address``, or start one on this machine with ``workers`` workers.

        Raises:
            GraphError: when the cluster cannot be reached or has nothing that could run a unit.
        """
        import ray

        quiet_ray()
        self._ray = ray
        self._context_ref: Any = None
        self._running: dict[Any, WorkUnit] = {}
        self.num_slots = workers * UNITS_AHEAD
        self._connect(workers, address)
        try:
            gpu_share = _gpu_share(_resources(ray), workers) if context.device == "cuda" else 0.0
        except GraphError:
            self.close()
            raise
        self._context_ref = ray.put(context)
        self._task = ray.remote(_run_guarded).options(
            num_cpus=1, num_gpus=gpu_share, max_retries=MAX_RETRIES, retry_exceptions=False
        )

    def _connect(self, workers: int, address: str | None) -> None:
        options: dict[str, Any] = (
            {"address": address}
            if address
            else {
                "num_cpus": workers,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_node_ip_address": "127.0.0.1",
            }
        )
        try:
            self._ray.init(
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}},
                **options,
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise GraphError(
                f"Ray {'at ' + address if address else 'on this machine'} cannot be used: {error}",
                code="graph.no_cluster",
                hint="check --address (or RAY_ADDRESS), or leave it out to run on this machine",
            ) from error

    def submit(self, unit: WorkUnit) -> None:
        """Start a unit as a Ray task."""
        # A unit names its needs, and they theirs: only the first level travels.
        shallow = replace(unit, needs=tuple(replace(need, needs=()) for need in unit.needs))
        self._running[self._task.remote(self._context_ref, shallow)] = unit

    def wait(self) -> tuple[WorkUnit, StageRecord, float]:
        """Return the next unit that finishes.

        Raises:
            PipelineError: as the unit raised it.
            GraphError: when its worker died too often or it failed in a way that is a bug of ours.
        """
        (done,), _ = self._ray.wait(list(self._running), num_returns=1)
        unit = self._running.pop(done)
        where = f"{unit.kind} of block {unit.block}" if unit.block >= 0 else unit.kind.value
        try:
            outcome: _Outcome = self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            reason = "".join(traceback.format_exception_only(error.cause)).strip() if error.cause else str(error)
            raise GraphError(f"work unit {where} failed: {reason}", code="graph.unit_failed") from error
        except self._ray.exceptions.RayError as error:
            raise GraphError(
                f"work unit {where} lost its worker {MAX_RETRIES + 1} times: {error!s:.300}",
                code="graph.worker_lost",
                hint="is the machine short of memory? run the same command with fewer --workers: it continues",
            ) from error
        if outcome.error is not None:
            raise outcome.error
        if outcome.record is None:
            raise GraphError(f"work unit {where} gave no record")
        return unit, outcome.record, outcome.seconds

    def close(self) -> None:
        """Stop what is running and leave the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()


def _resources(ray: Any) -> dict[str, float]:
    """Return what the cluster has in all, by resource name."""
    found: dict[str, float] = ray.cluster_resources()
    return found


def _gpu_share(resources: dict[str, float], workers: int) -> float:
    """Return the share of a GPU that each unit takes: as many units as workers, spread over all GPUs.

    Raises:
        GraphError: when the cluster has no GPU.
    """
    gpus = resources.get("GPU", 0.0)
    if gpus < 1:
        have = ", ".join(f"{name}: {amount:g}" for name, amount in sorted(resources.items()) if "node:" not in name)
        raise GraphError(
            f"--device cuda needs a GPU, and the cluster has none ({have})",
            code="graph.infeasible",
            hint="run with --device cpu, or join a cluster with GPUs with --address",
        )
    return min(1.0, gpus / workers)
