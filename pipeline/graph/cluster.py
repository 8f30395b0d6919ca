"""Ray: where work units run. Local by default, a cluster by address.

Each worker is an actor with one CPU, a share of a GPU when the job runs on GPUs, and the memory that it may use when
that is limited, so that no node is filled with more workers than it has memory for. Ray carries units, their outcomes
and what one worker hands to another; nothing that has to last lives in it. Workers are not restarted by Ray: the driver
hears of a loss, and a new worker takes the place of the old one as long as the cluster has room. A request that the
cluster can never meet fails at once with what was asked for and what there is, instead of pending for ever.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import heap
from pipeline.errors import GraphError
from pipeline.graph.dag import WorkUnit
from pipeline.graph.executor import Event, Finished, WorkerId, WorkerJoined, WorkerLost
from pipeline.graph.parts import PART_BYTES, Part, join_parts
from pipeline.graph.shelf import Tensors
from pipeline.graph.stages.call import JobContext
from pipeline.graph.stopping import Stopping, cancelled
from pipeline.graph.worker import Outcome, Worker, lost_output
from pipeline.settings import quiet_ray, ray_uses_tls
from pipeline.units import format_bytes

OBJECT_STORE_BYTES = 100_000_000
"""Local object store, besides what workers hand to each other: Ray wants so much at least."""

PARTS_UNDER_WAY = 2
"""Parts of outputs that are in the object store at a time for each worker: one that it has been asked for, and one that
it has asked for."""

LOCAL_RAY_BYTES = 400_000_000
"""Memory of a local Ray's own six processes (230 MB that they share with nobody, ray 2.60.0, Linux, from
``/proc/PID/smaps_rollup`` while workers run, 2026-11-25); the rest is for the driver to grow by."""

START_TIMEOUT_S = 180.0
"""Longest start of a worker: a process that imports torch and transformers, on a busy machine."""

CONNECT_TIMEOUT_S = 10.0
"""Longest wait for the head of a cluster to answer."""

HAND_OVER_TIMEOUT_S = 300.0
"""Longest wait for an output that another worker holds."""

MAX_START_FAILURES = 8
"""Workers in a row that may die before they are ready, after which no more are started."""

GPU_ROUNDING = 1e-3
"""Added to a number of workers: Ray counts GPUs in ten-thousandths."""

REPLACEMENT_TIMEOUT_S = 120.0
"""Longest wait, when no worker is left, for room for a new one: until Ray has cleared up after a lost node, or a node
has come in its place."""

HTTP2_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""A frame of settings without any: their length, the type of frame, flags, and the stream."""

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HTTP2_SETTINGS

JOIN_HINT = (
    "the driver's machine must be a node of the cluster (ray start --address=HEAD:PORT --num-cpus=0), and show the "
    "token that the cluster asks for, if any (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN)"
)

_RAISED = re.compile(r"[\w.]+(Error|Exception): ")


class RemoteWorker:
    """A ``Worker`` as a Ray actor. Handing over runs beside the unit at hand, on a thread of its own."""

    def __init__(self, context: JobContext, hand_over_timeout_s: float = HAND_OVER_TIMEOUT_S) -> None:
        """Start the worker, in a process of its own."""
        heap.map_large_blocks(context.freed_bytes + max(context.more_freed_bytes.values(), default=0))
        self._worker = Worker(context)
        self._hand_over_timeout_s = hand_over_timeout_s
        self._begins_units = True

    def describe(self) -> dict[str, Any]:
        """Return where the worker is: process id, node, GPUs."""
        import ray

        runtime = ray.get_runtime_context()
        return {"pid": os.getpid(), "node": runtime.get_node_id(), "gpus": ray.get_gpu_ids()}

    def run(self, unit: WorkUnit, holders: Mapping[str, Any]) -> Outcome:
        """Run a unit; ``holders`` are the actors that hold passing outputs which this worker lacks."""
        import ray

        if not self._begins_units:
            return Outcome(None, cancelled(), 0.0, 0)

        def fetch(key: str, prefix: str) -> Tensors:
            holder = holders.get(key)
            if holder is None:
                raise lost_output(key)

            def ask(number: int) -> Part:
                heap.drop_shared(heap.SHARED_BYTES)
                part: Part = ray.get(holder.hand_over.remote(key, prefix, number), timeout=self._hand_over_timeout_s)
                return part

            try:
                return join_parts(ask)
            except ray.exceptions.TaskCancelledError as error:
                raise cancelled(f"{unit.title} was cancelled by Ray") from error
            except (ray.exceptions.RayError, GraphError) as error:
                raise lost_output(key) from error

        return self._worker.run(unit, fetch)

    def hand_over(self, key: str, prefix: str, number: int) -> Part:
        """Return of an output that this worker holds a part of the tensors whose names start so, as arrays, which Ray
        moves without copies of its own."""
        return self._worker.hand_over(key, prefix, number)

    def forget(self, keys: Iterable[str]) -> None:
        """Drop passing outputs."""
        self._worker.forget(keys)

    def begin_no_more(self) -> None:
        """From now on units end as cancelled, but for one that runs already."""
        self._begins_units = False


@dataclass
class _Seat:
    """A worker, or one that is starting.

    Attributes:
        actor: Its handle.
        ready: Answers once it has started; None afterwards.
        started_s: When it was asked for.
        units: What it has, by the reference to its outcome, in order.
        about: Where it is.
    """

    actor: Any
    ready: Any
    started_s: float
    units: dict[Any, WorkUnit] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Share:
    """What a worker takes of its node, besides a CPU.

    Attributes:
        gpus: Share of a GPU.
        memory_bytes: Memory; 0 when nobody has said how much.
    """

    gpus: float
    memory_bytes: int

    def slots(self, resources: Mapping[str, float]) -> int:
        """Return the number of workers that resources have room for."""
        slots = int(resources.get("CPU", 0.0))
        if self.gpus:
            slots = min(slots, int(resources.get("GPU", 0.0) / self.gpus + GPU_ROUNDING))
        if self.memory_bytes:
            slots = min(slots, int(resources.get("memory", 0.0) // self.memory_bytes))
        return slots


class RayExecutor:
    """Runs work units on Ray actors."""

    def __init__(
        self, context: JobContext, workers: int, address: str | None = None, stopping: Stopping | None = None
    ) -> None:
        """Join the cluster at ``address``, or start one on this machine with ``workers`` workers.

        Returns once the first worker has started.

        Raises:
            GraphError: when the cluster cannot be reached or has nothing that could be a worker, or the job is
                cancelled meanwhile.
        """
        quiet_ray(on_loopback=address is None)
        import ray

        self._ray = ray
        self._events: deque[Event] = deque()
        self._seats: dict[WorkerId, _Seat] = {}
        self._number = 0
        self._start_failures = 0
        self._last_failure = ""
        self._target = workers
        self._stopping = stopping or Stopping()
        _connect(ray, workers, address)
        try:
            self._context = ray.put(context)
            gpus = _gpu_share(_resources(ray), workers) if context.device == "cuda" else 0.0
            self._share = _Share(gpus, context.max_memory_bytes or 0)
            _require_cpus(_resources(ray))
            _require_memory(_nodes(ray), self._share)
            self._actor = _actor_class(ray, self._share)
            self._lost_s = time.monotonic()
            self._wait_for_one()
        except BaseException:
            self.close()
            raise

    def _wait_for_one(self) -> None:
        """Return once a worker has started.

        Raises:
            GraphError: when none does in time.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        self._fill_seats()
        while not self.workers:
            self._stopping.check()
            if time.monotonic() > deadline_s or self._start_failures >= MAX_START_FAILURES:
                raise self._nobody_started()
            event = self._poll(1.0)
            if event is not None:
                self._events.append(event)

    def _nobody_started(self) -> GraphError:
        if self._last_failure:
            return GraphError(
                f"no worker could start: {self._last_failure}",
                code="graph.no_workers",
                hint="every node needs the source, the work directory and this program under the same names",
            )
        return GraphError(
            f"no worker has started, for want of room; the cluster has {_describe(_resources(self._ray))}",
            code="graph.infeasible",
            hint="other jobs may hold its CPUs or its memory: see `ray status`, or run without --address",
        )

    @property
    def workers(self) -> Sequence[WorkerId]:
        """The workers that have started."""
        return [name for name, seat in self._seats.items() if seat.ready is None]

    @property
    def is_expecting(self) -> bool:
        """Whether a worker is starting, or may yet find room after the last one was lost."""
        if self._start_failures >= MAX_START_FAILURES:
            return False
        is_starting = any(seat.ready is not None for seat in self._seats.values())
        return is_starting or time.monotonic() - self._lost_s < REPLACEMENT_TIMEOUT_S

    @property
    def places(self) -> dict[WorkerId, dict[str, Any]]:
        """Where each worker is: process id, node, GPUs."""
        return {name: seat.about for name, seat in self._seats.items() if seat.ready is None}

    def node(self, worker: WorkerId) -> str:
        """Return which machine a worker is on; empty for one that is gone."""
        seat = self._seats.get(worker)
        return str(seat.about.get("node", "")) if seat else ""

    def submit(self, unit: WorkUnit, worker: WorkerId, holders: Mapping[str, WorkerId]) -> None:
        """Queue a unit at a worker."""
        # A unit names its needs, and they theirs: only the first level travels.
        shallow = replace(unit, needs=tuple(replace(need, needs=(), stand_ins={}) for need in unit.needs))
        actors = {key: self._seats[holder].actor for key, holder in holders.items() if holder in self._seats}
        seat = self._seats[worker]
        seat.units[seat.actor.run.remote(shallow, actors)] = unit

    def wait(self, timeout_s: float) -> Event | None:
        """Return what happened next, or None when nothing did in time.

        Raises:
            GraphError: when a unit failed in a way that is a bug of ours; with the code ``graph.cancelled`` when
                somebody cancelled one by Ray's means.
        """
        if self._events:
            return self._events.popleft()
        return self._poll(timeout_s)

    def _poll(self, timeout_s: float) -> Event | None:
        owners = {seat.ready: name for name, seat in self._seats.items() if seat.ready is not None}
        owners |= {reference: name for name, seat in self._seats.items() for reference in list(seat.units)[:1]}
        if not owners:
            time.sleep(min(timeout_s, 0.1))
            self._fill_seats()
            return None
        done, _ = self._ray.wait(list(owners), num_returns=1, timeout=timeout_s)
        self._fill_seats()
        if not done:
            return None
        name = owners[done[0]]
        seat = self._seats[name]
        try:
            answer = self._ray.get(done[0])
        except self._ray.exceptions.TaskCancelledError as error:
            # Its worker lives. Told before it began the unit, it left it out; later, it has run it to its end.
            raise cancelled(f"{self._what(seat, done[0])} was cancelled by Ray") from error
        except self._ray.exceptions.RayTaskError as error:
            where = self._what(seat, done[0])
            reason = "".join(traceback.format_exception_only(error.cause)).strip() if error.cause else str(error)
            raise GraphError(f"{where} failed: {reason}", code="graph.unit_failed") from error
        except self._ray.exceptions.RayError as error:
            return self._bury(name, error)
        if done[0] == seat.ready:
            seat.ready, seat.about, self._start_failures = None, answer, 0
            return WorkerJoined(name)
        return Finished(name, seat.units.pop(done[0]), answer)

    def _what(self, seat: _Seat, reference: Any) -> str:
        unit = seat.units.get(reference)
        return f"work unit {unit.title}" if unit else "a worker's start"

    def _bury(self, name: WorkerId, error: Any) -> WorkerLost:
        seat, reason = self._seats.pop(name), _last_words(error)
        # It may only be out of reach: what comes back would take the place of another one.
        self._ray.kill(seat.actor, no_restart=True)
        self._lost_s = time.monotonic()
        if seat.ready is not None:
            self._start_failures += 1
            self._last_failure = reason
        # Only where Ray itself killed it: what it says of any sudden death names the kernel's OOM killer among the
        # possible causes.
        is_memory = isinstance(error, self._ray.exceptions.OutOfMemoryError)
        self._fill_seats()
        return WorkerLost(name, tuple(seat.units.values()), reason, is_memory)

    def _fill_seats(self) -> None:
        """Ask for workers until there are as many as wanted, or the cluster has no more room for them."""
        self._give_up_late_ones()
        if self._start_failures >= MAX_START_FAILURES:
            return
        room = self._target - len(self._seats)
        for _ in range(min(room, self._free_slots()) if room > 0 else 0):
            self._number += 1
            actor = self._actor.remote(self._context, HAND_OVER_TIMEOUT_S)
            self._seats[f"worker-{self._number}"] = _Seat(actor, actor.describe.remote(), time.monotonic())

    def _give_up_late_ones(self) -> None:
        """Let go of workers that do not start: what they wait for may be with others for good."""
        now_s = time.monotonic()
        for name, seat in list(self._seats.items()):
            if seat.ready is not None and now_s - seat.started_s > START_TIMEOUT_S:
                self._ray.kill(seat.actor, no_restart=True)
                del self._seats[name]
                self._start_failures += 1
                self._last_failure = f"{name} had not started after {START_TIMEOUT_S:.0f} s"

    def _free_slots(self) -> int:
        """Return how many workers the cluster can take now; those that are starting may not be counted yet.

        What is free is known of all nodes together, and what no node has left for a worker may add up to one. So it is
        no more than nodes can hold, each on its own.
        """
        starting = sum(seat.ready is not None for seat in self._seats.values())
        held = sum(map(self._share.slots, _nodes(self._ray)))
        return max(min(self._share.slots(_free_resources(self._ray)) - starting, held - len(self._seats)), 0)

    def forget(self, worker: WorkerId, keys: Iterable[str]) -> None:
        """Have a worker drop passing outputs."""
        if worker in self._seats:
            self._seats[worker].actor.forget.remote(tuple(keys))

    def let_end(self, timeout_s: float) -> Sequence[Finished]:
        """Wait for the units that run, so long at most, and begin none that is queued; return those that ended well."""
        owners = {reference: name for name, seat in self._seats.items() for reference in seat.units}
        if not owners:
            return ()
        try:
            for name in self.workers:
                self._seats[name].actor.begin_no_more.remote()
            done, _ = self._ray.wait(list(owners), num_returns=len(owners), timeout=timeout_s)
        except self._ray.exceptions.RayError:
            return ()  # the cluster ends too
        ended = []
        for reference in done:
            name = owners[reference]
            try:
                outcome = self._ray.get(reference)
            except self._ray.exceptions.RayError:
                continue  # with its worker
            if outcome.error is None:
                ended.append(Finished(name, self._seats[name].units.pop(reference), outcome))
        return ended

    def close(self) -> None:
        """Kill the workers and leave the cluster."""
        for seat in self._seats.values():
            self._ray.kill(seat.actor, no_restart=True)
        self._seats.clear()
        self._ray.shutdown()


@dataclass(frozen=True)
class Room:
    """What a cluster has for workers.

    Attributes:
        device: What they would compute on, ``cpu`` or ``cuda``.
        by_node: Workers of each machine.
        worker_bytes: Memory that a machine has for each of its workers at least; 0 when it is not known.
        sharing: Workers that one GPU is shared by.
        free_workers: For how many of the workers there is room at the moment, besides what else runs there; at most.
    """

    device: str
    by_node: tuple[int, ...]
    worker_bytes: int
    sharing: int = 1
    free_workers: int | None = None


def look_at(address: str, device: str, workers: int | None, max_memory_bytes: int | None) -> Room:
    """Return what a conversion would find at ``address``. Nothing is started there.

    Args:
        address: Of the cluster.
        device: ``cpu``, ``cuda``, or ``auto`` for GPUs where there are some.
        workers: How many; None for as many as there is room for, with GPUs one for each.
        max_memory_bytes: Memory that each may use; None when nobody has said how much.

    Raises:
        GraphError: when the cluster cannot be reached, or has not what workers need.
    """
    quiet_ray(on_loopback=False)
    import ray

    _connect(ray, 0, address)
    try:
        resources, nodes, free = _resources(ray), _nodes(ray), _free_resources(ray)
    finally:
        ray.shutdown()
    found = "cuda" if device == "auto" and resources.get("GPU", 0.0) >= 1 else device.replace("auto", "cpu")
    gpus = _gpu_share(resources, workers or int(resources.get("GPU", 0.0))) if found == "cuda" else 0.0
    share = _Share(gpus, max_memory_bytes or 0)
    _require_cpus(resources)
    _require_memory(nodes, share)
    by_node = [0] * len(nodes)
    slots = [share.slots(node) for node in nodes]
    if workers is None:
        by_node = slots
    for _ in range(min(workers or 0, sum(slots))):
        emptiest = max(range(len(nodes)), key=lambda number: slots[number] - by_node[number])
        by_node[emptiest] += 1
    if not any(by_node):
        raise GraphError(
            f"no node at {address} has room for a worker ({_describe(resources)})",
            code="graph.infeasible",
            hint="a worker takes a CPU, a share of a GPU on GPUs, and what --max-memory says",
        )
    memory = [node.get("memory", 0.0) / used for node, used in zip(nodes, by_node, strict=True) if used]
    sharing = round(1 / gpus) if gpus else 1
    return Room(found, tuple(by_node), int(min(memory)), sharing, min(share.slots(free), sum(by_node)))


def _connect(ray: Any, workers: int, address: str | None) -> None:
    options: dict[str, Any] = (
        {"address": address}
        if address
        else {
            # Not None: that would join whatever `ray start` has started on this machine.
            "address": "local",
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": _object_store_bytes(workers),
            "_node_ip_address": "127.0.0.1",
            **_local_memory(workers),
        }
    )
    if address:
        _require_reachable(address)
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}},
            **options,
        )
    except SystemExit as error:
        # Ray ends the process where what listens at the address never answers as a cluster; and so does its own handler
        # of SIGTERM, which is not to be taken for that here.
        if not address:
            raise
        raise GraphError(
            f"connecting to Ray at {address} was ended by Ray: what listens there does not answer as a cluster, or "
            "this process was told to end",
            code="graph.no_cluster",
            hint=JOIN_HINT,
        ) from error
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise GraphError(
            f"Ray {'at ' + address if address else 'on this machine'} cannot be used: {error}",
            code="graph.no_cluster",
            hint=JOIN_HINT if address else "see the newest logs of Ray, in ray/ of the folder for temporary files",
        ) from error
    finally:
        # Ray puts a handler of its own in place, which ends the process without a word.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)


def _object_store_bytes(workers: int) -> int:
    return OBJECT_STORE_BYTES + PARTS_UNDER_WAY * PART_BYTES * workers


def _local_memory(workers: int) -> dict[str, Any]:
    """Return what Ray is told of this machine's memory: what is left of it, where that is known. Ray itself takes the
    memory of programs outside its own control group for free."""
    spare = heap.spare_bytes()
    return {} if spare is None else {"_memory": max(spare - _object_store_bytes(workers) - LOCAL_RAY_BYTES, 0)}


def _require_reachable(address: str) -> None:
    """Return when what listens at the address of a cluster's head speaks HTTP/2, as gRPC does; Ray itself would try for
    minutes.

    Raises:
        GraphError: when nothing listens there, or something that cannot be Ray.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto", or a name that Ray resolves
    hint = "check --address (or RAY_ADDRESS) and that `ray start --head` runs there, or leave it out"
    try:
        with socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S) as connection:
            is_ray = ray_uses_tls() or _speaks_http2(connection)
    except OSError as error:
        raise GraphError(f"no Ray cluster answers at {address}: {error}", code="graph.no_cluster", hint=hint) from error
    if not is_ray:
        raise GraphError(
            f"what listens at {address} is not the head of a Ray cluster: it does not speak gRPC",
            code="graph.no_cluster",
            hint=f"{hint}; its port is 6379 unless it was told another (the dashboard's is another one)",
        )


def _speaks_http2(connection: socket.socket) -> bool:
    """Return whether a peer answers the preface of HTTP/2 (RFC 9113, 3.4) with settings of its own.

    Raises:
        OSError: when it says nothing within ``CONNECT_TIMEOUT_S``.
    """
    connection.sendall(HTTP2_PREFACE)
    answer = b""
    while len(answer) < len(HTTP2_SETTINGS):
        more = connection.recv(len(HTTP2_SETTINGS) - len(answer))
        if not more:
            return False
        answer += more
    return answer[3:5] == HTTP2_SETTINGS[3:5] and answer[5:] == HTTP2_SETTINGS[5:]


def _actor_class(ray: Any, share: _Share) -> Any:
    """Return the actor class whose instances take one CPU and a share each."""
    groups = {"io": 1}  # one sum at a time is read back beside the unit that runs
    for name in ("hand_over", "forget", "begin_no_more"):
        # Read by Ray when the class is made remote: these run beside the unit at hand.
        ray.method(concurrency_group="io")(getattr(RemoteWorker, name))
    memory = {"memory": share.memory_bytes} if share.memory_bytes else {}
    make_actor = ray.remote(
        num_cpus=1, num_gpus=share.gpus, **memory, max_restarts=0, max_task_retries=0, concurrency_groups=groups
    )
    return make_actor(RemoteWorker)


def _last_words(error: Any) -> str:
    """Return what Ray says of a death: the exception that was raised, if one was; else what happened and why, which are
    its first and last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    words = raised[-1:] or [*lines[:1], *lines[1:][-1:]] or [type(error).__name__]
    return "; ".join(words)[:500]


def _resources(ray: Any) -> dict[str, float]:
    """Return what the cluster has in all, by resource name."""
    found: dict[str, float] = ray.cluster_resources()
    return found


def _free_resources(ray: Any) -> dict[str, float]:
    """Return what of it nobody has taken at the moment."""
    found: dict[str, float] = ray.available_resources()
    return found


def _nodes(ray: Any) -> list[dict[str, float]]:
    """Return what each node has in all, by resource name."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _describe(resources: dict[str, float]) -> str:
    return ", ".join(f"{name}: {amount:g}" for name, amount in sorted(resources.items()) if "node:" not in name)


def _require_cpus(resources: dict[str, float]) -> None:
    if resources.get("CPU", 0.0) < 1:
        raise GraphError(
            f"a worker needs a CPU, and the cluster has none ({_describe(resources)})",
            code="graph.infeasible",
            hint="join a cluster whose nodes offer CPUs, or run without --address",
        )


def _require_memory(nodes: Sequence[Mapping[str, float]], share: _Share) -> None:
    """Return when some node could run a worker.

    Raises:
        GraphError: when none has the memory that a worker may use.
    """
    if not share.memory_bytes or any(map(share.slots, nodes)):
        return
    could = [node for node in nodes if replace(share, memory_bytes=0).slots(node)]
    most = max((node.get("memory", 0.0) for node in could), default=0.0)
    raise GraphError(
        f"--max-memory asks for {format_bytes(share.memory_bytes)} for each worker, and no node that could run one has "
        f"more than {format_bytes(int(most))} for workers",
        code="graph.infeasible",
        hint="give workers less with --max-memory (bitmill plan says how little would do), end other programs, or join "
        "nodes with more memory with --address",
    )


def _gpu_share(resources: dict[str, float], workers: int) -> float:
    """Return the share of a GPU that each worker takes: as many workers as asked for, spread over all GPUs.

    Raises:
        GraphError: when the cluster has no GPU.
    """
    gpus = resources.get("GPU", 0.0)
    if gpus < 1:
        raise GraphError(
            f"--device cuda needs a GPU, and the cluster has none ({_describe(resources)})",
            code="graph.infeasible",
            hint="run with --device cpu, or join a cluster with GPUs with --address",
        )
    # A worker stays on one GPU: three on two GPUs take halves, as thirds of both would leave no room for the last.
    return 1.0 / math.ceil(workers / gpus)
