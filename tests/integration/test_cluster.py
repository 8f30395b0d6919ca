"""Conversions on a real Ray: any number of workers, workers and nodes that die, and clusters that cannot be used.

All of Ray's servers listen on the loopback interface; the tests leave no process of theirs behind.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from pipeline import heap
from pipeline.errors import GraphError
from pipeline.graph import assemble, chains, cluster, tuning
from pipeline.graph.cluster import RayExecutor, look_at
from pipeline.graph.convert import RunOptions, convert
from pipeline.graph.dag import Kind, WorkUnit
from pipeline.graph.executor import WorkerJoined, WorkerLost
from pipeline.graph.forecast import request_for
from pipeline.graph.stages.call import JobContext
from pipeline.observe.events import StageFinished, Warned
from pipeline.settings import Settings, quiet_ray
from pipeline.spec import build_spec
from pipeline.storage.work_directory import DirectoryWorkStore

DEMO_MODEL = Path(__file__).parents[2] / "jobs" / "demo" / "model"
VARIANTS = ("gptq-w4-g64", "awq-w4-g64", "rtn-w8-g128", "gptq-w4.5-g64-gptq", "awq-gptq-w4-g64-seq")
"""Every method, and every format: gptq, awq, compressed-tensors; mixed precision, which is decided on the way; and
statistics behind the variant's own blocks, one after the other, with scales before the codes are found."""

QUICK_DEATHS = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}

GIGABYTE = 10**9

Contents = dict[str, bytes]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Everything of Ray on the loopback interface and in a folder of its own; jobs are cut as large ones are."""
    temporary = tempfile.mkdtemp(prefix="bm-", dir="/tmp")  # sockets lie in it, and their paths must be short
    threads = torch.get_num_threads()
    quiet_ray(on_loopback=True)
    with pytest.MonkeyPatch.context() as patch:
        from ray._private import ray_constants

        # In case that somebody imported ray before.
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        patch.setenv("RAY_TMPDIR", temporary)
        patch.setattr(chains, "SAVE_EVERY", 2)
        patch.setattr(chains, "SAVE_SHARE", 1e9)
        patch.setattr(chains, "ADDED_SPANS", 2)
        patch.setattr(tuning, "timely_spans", lambda outline, costs, num_tokens, workers, summed: workers)
        # Drawing has nothing to do with workers, and takes longer than half of the rest.
        patch.setattr(assemble, "plot_layer_error", lambda facts: b"")
        patch.setattr(assemble, "plot_size_quality", lambda facts: b"")
        yield
    torch.set_num_threads(threads)
    shutil.rmtree(temporary, ignore_errors=True)


@dataclass
class Sink:
    """Counts finished units and does something at chosen ones.

    Attributes:
        act: What.
        at: After how many finished units, in order.
        finished: Units finished so far.
        warnings: What was warned of.
    """

    act: Callable[[], None] = lambda: None
    at: list[int] = field(default_factory=list)
    finished: int = 0
    warnings: list[str] = field(default_factory=list)

    def emit(self, event: object) -> None:
        if isinstance(event, Warned):
            self.warnings.append(event.message)
        if isinstance(event, StageFinished) and not event.reused:
            self.finished += 1
            while self.at and self.finished >= self.at[0]:
                self.at.pop(0)
                self.act()

    def close(self) -> None:
        pass


def run(folder: Path, sink: Sink, **options: Any) -> Contents:
    """Convert the demo model and return every file of every release by path."""
    target = folder / "out"
    target.mkdir(exist_ok=True)
    settings = Settings("http://127.0.0.1:9", None, folder / "cache", s3_endpoint=None, ray_address=None)
    spec = build_spec(
        {
            "source": str(DEMO_MODEL),
            "variants": list(VARIANTS),
            "targets": [str(target)],
            "calibration": {"samples": 8, "length": 64, "slice_sequences": 1},
            "gates": {"heldout_samples": 4, "heldout_length": 64, "generated_tokens": 8},
        },
        "test",
    )
    outcomes = convert(spec, settings, RunOptions(work_dir=folder / "work", **options), sink)
    assert [outcome.facts.variant.name for outcome in outcomes] == list(VARIANTS)
    assert all(outcome.locations for outcome in outcomes), "a gate failed"
    releases = target / "releases"
    return {p.relative_to(releases).as_posix(): p.read_bytes() for p in releases.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """What one process without Ray publishes."""
    return run(tmp_path_factory.mktemp("inline"), Sink(), workers=1, inline=True)


@pytest.fixture
def executors(monkeypatch: pytest.MonkeyPatch) -> list[RayExecutor]:
    """The executors that conversions make, the latest last."""
    made: list[RayExecutor] = []

    class Seen(RayExecutor):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(cluster, "RayExecutor", Seen)
    return made


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_any_number_of_workers_publishes_the_same_bytes(inline: Contents, tmp_path: Path, workers: int) -> None:
    sink = Sink()
    assert run(tmp_path, sink, workers=workers) == inline
    assert not [warning for warning in sink.warnings if "lost" in warning]


@pytest.mark.parametrize(("workers", "seed"), [(1, 0), (3, 1)])
def test_workers_killed_at_random_change_no_byte(
    inline: Contents, tmp_path: Path, executors: list[RayExecutor], workers: int, seed: int
) -> None:
    chance, killed = random.Random(seed), 0

    def kill() -> None:
        nonlocal killed
        pids = sorted(place["pid"] for place in executors[-1].places.values())
        with suppress(ProcessLookupError):  # one whose death is not known yet
            if pids:
                os.kill(chance.choice(pids), signal.SIGKILL)
                killed += 1

    moments = sorted(chance.sample(range(5, 150), 2 + workers))
    sink = Sink(kill, moments)
    assert run(tmp_path, sink, workers=workers) == inline
    assert killed >= 2
    assert sum("was lost" in warning for warning in sink.warnings) >= 2
    assert all("worker process has died" in warning for warning in sink.warnings if "was lost" in warning)


def test_damaged_files_and_shelves_on_disk_change_no_byte(inline: Contents, tmp_path: Path) -> None:
    def flip() -> None:
        paths = sorted((tmp_path / "work" / "pack").glob("*/*/output.safetensors"))
        if not paths:  # widths are still being chosen
            sink.at.append(sink.finished + 10)
            return
        path = paths[0]
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)

    sink = Sink(flip, [130])
    assert run(tmp_path, sink, workers=2, shelf_bytes=0) == inline
    assert sink.at == []
    # By a worker that needed it, or by the driver before it publishes.
    assert any(" damaged: " in warning for warning in sink.warnings)
    DirectoryWorkStore(tmp_path / "work").sweep()  # killed workers cannot clean up: the next run does
    assert not [path for path in (tmp_path / "work" / ".tmp").iterdir() if path.is_dir()]


# Several nodes.


@contextmanager
def nodes(*each: dict[str, Any]) -> Iterator[Any]:
    """Give a cluster of raylets on this machine, the head first."""
    from ray.cluster_utils import Cluster

    made = Cluster()
    try:
        for number, resources in enumerate(each):
            head = {"_system_config": QUICK_DEATHS, "include_dashboard": False} if number == 0 else {}
            made.add_node(node_ip_address="127.0.0.1", **head, **resources)
        yield made
    finally:
        made.shutdown()


def test_nodes_that_leave_and_join_change_no_byte(
    inline: Contents, tmp_path: Path, executors: list[RayExecutor]
) -> None:
    with nodes({"num_cpus": 1}, {"num_cpus": 1}, {"num_cpus": 1}) as made:
        seen: set[str] = set()

        def disturb() -> None:
            seen.update(place["node"] for place in executors[-1].places.values())
            if len(made.worker_nodes) == 2:
                made.remove_node(min(made.worker_nodes, key=lambda node: node.unique_id), allow_graceful=False)
                made.add_node(node_ip_address="127.0.0.1", num_cpus=1)

        sink = Sink(disturb, [80])
        assert run(tmp_path, sink, workers=3, address=made.address) == inline
        assert len(seen) == 3
        assert any("was lost" in warning for warning in sink.warnings)
        (executor,) = executors
        assert executor.workers == [], "closed"
        assert executor._number >= 4, "the node that joined was given a worker"


def test_a_plan_looks_at_a_cluster_and_starts_nothing_there() -> None:
    with nodes({"num_cpus": 3, "num_gpus": 2}, {"num_cpus": 1}, {"num_cpus": 0}) as made:

        def found(
            device: str, workers: int | None = None, max_memory: int | None = None
        ) -> tuple[str, tuple[int, ...]]:
            request = request_for(made.address, look_at(made.address, device, workers, max_memory))
            assert request.address == made.address
            return request.device, request.cluster.by_node

        assert found("cpu") == ("cpu", (3, 1))
        assert found("cpu", 2) == ("cpu", (2,))
        assert found("cpu", 9) == ("cpu", (3, 1))
        assert found("auto") == ("cuda", (2,))
        shared = look_at(made.address, "cuda", 3, None)
        assert (sum(shared.by_node), shared.sharing, shared.free_workers) == (3, 2, 3)
        assert look_at(made.address, "cpu", None, None).worker_bytes > 0
        with pytest.raises(GraphError, match="no node that could run one has") as caught:
            found("cpu", None, 1 << 60)
        assert caught.value.code == "graph.infeasible"
    with pytest.raises(GraphError, match=r"no Ray cluster answers at 127\.0\.0\.1"):
        look_at("127.0.0.1:9", "auto", None, None)


def test_a_cluster_that_loses_all_its_nodes_ends_the_job_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "REPLACEMENT_TIMEOUT_S", 5.0)
    with nodes({"num_cpus": 0}, {"num_cpus": 1}) as made:
        lost_s: list[float] = []

        def lose() -> None:
            made.remove_node(min(made.worker_nodes, key=lambda node: node.unique_id), allow_graceful=False)
            lost_s.append(time.monotonic())

        with pytest.raises(GraphError, match=r"no worker is left, and [0-9]+ work units are to be done") as caught:
            run(tmp_path, Sink(lose, [20]), workers=1, address=made.address)
    assert time.monotonic() - lost_s[0] < 60
    assert caught.value.code == "graph.no_workers"


def context(folder: Path, **changes: Any) -> JobContext:
    fields = {"device": "cpu", "shelf_bytes": 1 << 20, **changes}
    return JobContext(str(folder / "work"), str(DEMO_MODEL), "commit", (), **fields)


def describe(actors: Sequence[Any]) -> list[dict[str, Any]]:
    import ray

    found: list[dict[str, Any]] = ray.get([actor.describe.remote() for actor in actors], timeout=120)
    for actor in actors:
        ray.kill(actor)
    return found


def test_workers_share_gpus_evenly_and_cpu_workers_get_none(tmp_path: Path) -> None:
    """The GPUs are numbers only: Ray places by what nodes say that they have."""
    import ray

    with nodes({"num_cpus": 1}, {"num_cpus": 4, "num_gpus": 2}) as made:
        cluster._connect(ray, 3, made.address)
        try:
            resources = cluster._resources(ray)
            shares = {workers: cluster._gpu_share(resources, workers) for workers in (1, 2, 3, 4, 5)}
            assert shares == {1: 1.0, 2: 1.0, 3: 0.5, 4: 0.5, 5: 1 / 3}
            (gpu_node,) = (node for node in ray.nodes() if node["Resources"].get("GPU"))
            half = cluster._actor_class(ray, cluster._Share(shares[4], 0))
            found = describe([half.remote(context(tmp_path)) for _ in range(4)])
            assert {place["node"] for place in found} == {gpu_node["NodeID"]}
            assert sorted(Counter(gpu for place in found for gpu in place["gpus"]).values()) == [2, 2]
            plain = cluster._actor_class(ray, cluster._Share(0.0, 0))
            assert [place["gpus"] for place in describe([plain.remote(context(tmp_path)) for _ in range(2)])] == [
                [],
                [],
            ]
        finally:
            ray.shutdown()


# What cannot be used is said, soon.


@contextmanager
def expected_soon(seconds: float, **options: Any) -> Iterator[pytest.ExceptionInfo[GraphError]]:
    begin_s = time.monotonic()
    with pytest.raises(GraphError, **options) as caught:
        yield caught
    assert time.monotonic() - begin_s < seconds


def test_no_cluster_at_an_address_is_said_within_seconds(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with expected_soon(15, match=f"no Ray cluster answers at {address}") as caught:
            RayExecutor(context(tmp_path), 2, address)
    assert caught.value.code == "graph.no_cluster"
    assert "ray start --head" in caught.value.hint


def test_what_is_no_cluster_at_an_address_is_said_within_seconds(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server, socket.socket() as mute:
        Thread(target=server.serve_forever, daemon=True).start()
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        said = {
            f"127.0.0.1:{server.server_port}": "is not the head of a Ray cluster",
            f"127.0.0.1:{mute.getsockname()[1]}": "no Ray cluster answers .* timed out",
        }
        for address, words in said.items():
            with expected_soon(15, match=words) as caught:
                RayExecutor(context(tmp_path), 2, address)
            assert caught.value.code == "graph.no_cluster"
            assert "--address" in caught.value.hint
        server.shutdown()


def test_gpus_that_no_node_has_are_refused_at_once_with_what_there_is(tmp_path: Path) -> None:
    with nodes({"num_cpus": 2}) as made, expected_soon(30, match="needs a GPU, and the cluster has none") as caught:
        RayExecutor(context(tmp_path, device="cuda"), 2, made.address)
    assert caught.value.code == "graph.infeasible"
    assert "CPU: 2" in caught.value.message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_workers_that_lack_the_loops_for_gpus_end_the_job_before_it_computes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "MAX_START_FAILURES", 1)
    said = "no worker could start: .*a GPU needs loops that are written in Triton"
    with nodes({"num_cpus": 1, "num_gpus": 1}) as made, expected_soon(120, match=said) as caught:
        RayExecutor(context(tmp_path, device="cuda"), 1, made.address)
    assert caught.value.code == "graph.no_workers"


def test_a_cluster_without_cpus_is_refused_at_once(tmp_path: Path) -> None:
    with nodes({"num_cpus": 0}) as made, expected_soon(30, match="needs a CPU, and the cluster has none") as caught:
        RayExecutor(context(tmp_path), 2, made.address)
    assert caught.value.code == "graph.infeasible"


def test_memory_that_no_node_for_a_worker_has_is_refused_at_once_with_what_there_is(tmp_path: Path) -> None:
    elsewhere = {"num_cpus": 0, "memory": 64 * GIGABYTE}
    asked = context(tmp_path, max_memory_bytes=3 * GIGABYTE)
    said = r"--max-memory asks for 3 GB for each worker, and no node that could run one has more than 2 GB"
    with nodes({"num_cpus": 2, "memory": 2 * GIGABYTE}, elsewhere) as made, expected_soon(30, match=said) as caught:
        RayExecutor(asked, 2, made.address)
    assert caught.value.code == "graph.infeasible"
    assert "--max-memory" in caught.value.hint


def test_a_local_ray_knows_what_this_machine_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spare = 2 * GIGABYTE + cluster._object_store_bytes(1) + cluster.LOCAL_RAY_BYTES
    monkeypatch.setattr(heap, "spare_bytes", lambda: spare)
    with expected_soon(30, match=r"asks for 2\.1 GB for each worker, and no node .* more than 2 GB for workers"):
        RayExecutor(context(tmp_path, max_memory_bytes=2_100_000_000), 1)


def test_a_node_gets_no_more_workers_than_it_has_memory_for(tmp_path: Path) -> None:
    """What two nodes have left of their memory would do for one more, together."""
    each = {"num_cpus": 3, "memory": 3 * GIGABYTE}
    with nodes(each, each) as made:
        executor = RayExecutor(context(tmp_path, max_memory_bytes=2 * GIGABYTE), 5, made.address)
        try:
            while len(executor.workers) < 2:
                assert isinstance(executor.wait(60.0), WorkerJoined)
            assert executor.wait(2.0) is None
            assert len({place["node"] for place in executor.places.values()}) == 2
            assert len(executor._seats) == 2, "nobody waits for room that no node has"
            made.add_node(node_ip_address="127.0.0.1", **each)
            while len(executor.workers) < 3:
                executor.wait(60.0)
        finally:
            executor.close()


def test_cpus_that_others_hold_are_waited_for_and_no_longer_than_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(cluster, "START_TIMEOUT_S", 3.0)
    with nodes({"num_cpus": 1}) as made:
        ray.init(address=made.address, log_to_driver=False, namespace="other")
        holder = ray.remote(num_cpus=1)(type("Holder", (), {"ready": lambda self: True}))
        held = holder.options(lifetime="detached", name="holder").remote()
        assert ray.get(held.ready.remote(), timeout=60)
        ray.shutdown()
        with expected_soon(30, match="no worker has started, for want of room") as caught:
            RayExecutor(context(tmp_path), 1, made.address)
    assert caught.value.code == "graph.infeasible"
    assert "ray status" in caught.value.hint


def test_a_worker_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "MAX_START_FAILURES", 2)
    (tmp_path / "work").write_text("a file where the work directory should be")
    with pytest.raises(GraphError, match=r"no worker could start: .*Error: .*the work directory") as caught:
        RayExecutor(context(tmp_path), 1)
    assert caught.value.code == "graph.no_workers"
    assert "work directory" in caught.value.hint


def test_a_worker_that_ray_kills_for_its_memory_is_told_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buried: list[WorkerLost] = []

    class Seen(RayExecutor):
        def _bury(self, name: str, error: Any) -> WorkerLost:
            buried.append(super()._bury(name, error))
            return buried[-1]

    monkeypatch.setattr(cluster, "MAX_START_FAILURES", 1)
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "50")
    with pytest.raises(GraphError, match=r"no worker could start: .*running low on memory"):
        Seen(context(tmp_path), 1)
    assert buried[0].out_of_memory


# What Ray is left to do.


def listening() -> list[tuple[str, str]]:
    """Return name and address of every server among this process and its descendants."""
    import psutil

    me = psutil.Process()
    return [
        (process.name(), connection.laddr.ip)
        for process in (me, *me.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def test_a_local_ray_is_this_machine_s_alone_and_its_workers_are_replaced(tmp_path: Path) -> None:
    """It listens on the loopback interface only, joins no cluster that happens to run here, and ends with the job."""
    import psutil

    with nodes({"num_cpus": 1}):
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        executor = RayExecutor(context(tmp_path), 2)
        try:
            while len(executor.workers) < 2:
                assert isinstance(executor.wait(60.0), WorkerJoined)
            assert {name for name, _ in listening()} >= {"gcs_server", "raylet"}
            assert {ip.removeprefix("::ffff:") for _, ip in listening()} == {"127.0.0.1"}
            lone = executor.workers[0]
            pids = {place["pid"] for place in executor.places.values()}
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            unit = WorkUnit(Kind.OUTER, "0" * 64, {})
            for worker in list(executor.workers):
                executor.submit(unit, worker, {})
            lost = [event for event in (executor.wait(60.0), executor.wait(60.0)) if isinstance(event, WorkerLost)]
            assert {event.units for event in lost} == {(unit,)}
            assert executor.is_expecting
            while not executor.workers:
                executor.wait(60.0)
            assert lone not in executor.workers
            assert not {place["pid"] for place in executor.places.values()} & pids
        finally:
            executor.close()
        gone_s = time.monotonic() + 30
        while left := {p.pid for p in psutil.Process().children(recursive=True)} - before:
            assert time.monotonic() < gone_s, f"left behind: {left}"
            time.sleep(0.1)
