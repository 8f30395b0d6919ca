"""``bitmill convert`` from end to end, to a directory, from a hub, to S3, and through kills."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance.conftest import DEMO_MODEL, ROOT, SMALL, Bitmill, environment, files_below
from tests.loopback_hub import Fault, LoopbackHub
from tests.s3_server import S3Server

VARIANTS = ("--variant", "gptq-w4-g128", "--variant", "awq-w4-g128")


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of every release by path."""
    releases = folder / "releases"
    return {p.relative_to(releases).as_posix(): p.read_bytes() for p in sorted(releases.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that one undisturbed run has published to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    target = folder / "out"
    target.mkdir()
    command = [sys.executable, "-m", "jobs.cli", "convert", str(DEMO_MODEL), *VARIANTS, *SMALL, "--to", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(folder), check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [Path(line).parent.name for line in lines] == ["model-gptq-w4-g128", "model-awq-w4-g128"]
    assert all((Path(line) / "manifest.json").is_file() for line in lines)
    # What other tests look for to see that nothing was published.
    names = ["local/model-awq-w4-g128/main", "local/model-gptq-w4-g128/main"]
    assert [path.relative_to(target / "refs").as_posix() for path in files_below(target / "refs")] == names
    return target


def test_published_release_verifies_and_can_be_inspected(undisturbed: Path, bitmill: Bitmill) -> None:
    release = undisturbed / "releases" / "local" / "model-gptq-w4-g128"
    verified = bitmill("verify", release, "--json")
    assert verified.returncode == 0, verified.stderr
    checks = {check["name"]: check for check in json.loads(verified.stdout)["checks"]}
    assert list(checks) == ["digests", "structure", "scales", "generation"]
    assert checks["generation"]["detail"].startswith("3 recorded continuations: 96 of 96 greedy tokens")
    inspected = bitmill("inspect", f"{release}@main", "--modules")
    assert inspected.returncode == 0, inspected.stderr
    assert "model.layers.5.mlp.down_proj" in inspected.stdout
    facts = json.loads(bitmill("inspect", release, "--json").stdout)
    assert facts["variant"]["bits"] == 4
    (card,) = release.glob("*/README.md")
    assert bitmill("inspect", release, "--card").stdout == card.read_text()


def test_damaged_release_fails_verification(undisturbed: Path, bitmill: Bitmill, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(undisturbed, copy)
    (weights,) = copy.glob("releases/local/model-awq-w4-g128/*/model-00003-of-00007.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = bitmill("verify", copy / "releases" / "local" / "model-awq-w4-g128")
    assert done.returncode == 5
    assert "model-00003-of-00007.safetensors" in done.stdout


def test_plan_states_the_size_that_convert_writes(undisturbed: Path, bitmill: Bitmill) -> None:
    planned = bitmill("plan", DEMO_MODEL, *VARIANTS, "--json")
    assert planned.returncode == 0, planned.stderr
    for variant in json.loads(planned.stdout)["variants"]:
        (facts,) = undisturbed.glob(f"releases/local/model-{variant['name']}/*/bitmill.json")
        assert variant["size_bytes"] == json.loads(facts.read_text())["size_bytes"]


def test_the_least_memory_that_would_do_is_said_and_does_with_the_same_bytes(
    undisturbed: Path, bitmill: Bitmill, tmp_path: Path
) -> None:
    arguments = ["convert", DEMO_MODEL, *VARIANTS, *SMALL, "--to", tmp_path / "out", "--work-dir", tmp_path / "work"]
    refused = bitmill(*arguments, "--max-memory", "100MB")
    assert refused.returncode == 4, refused.stderr
    assert "--max-memory is 100 MB" in refused.stderr
    assert files_below(tmp_path / "out" / "releases") == []
    least = re.search(r"give workers at least ([\d.]+ MB)", refused.stderr)
    assert least, refused.stderr
    # What is said is rounded.
    megabytes = 1 + float(least[1].removesuffix(" MB"))
    done = bitmill(*arguments, "--max-memory", f"{megabytes}MB")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(undisturbed)
    assert "a worker took" not in done.stderr


STAGES = ("hidden", "scales", "pack", "score"), ("merge", "solve", "generate"), ("outer",)
"""Folders of the work store, each of which has something once the run has come to the stage: where the same work is
killed, one after the other. What lies outside the blocks is one unit, made whenever a worker has nothing else to do."""


def start(arguments: list[str], folder: Path, **env: str) -> subprocess.Popen[bytes]:
    """Start the command in a session of its own, silent."""
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(folder, **env), stdout=quiet, stderr=quiet, start_new_session=True
    )


def kill_once(driver: subprocess.Popen[bytes], is_there: Callable[[], bool]) -> None:
    """Kill a driver as soon as something is there."""
    deadline = time.monotonic() + 240
    while not is_there():
        assert driver.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()


def kill_at_stage(arguments: list[str], folder: Path, stage: Path) -> None:
    """Start the command, and kill it as soon as one more unit of a stage has finished."""

    def num_finished() -> int:
        return len(list(stage.glob("*/*/record.json")))

    before = num_finished()
    kill_once(start(arguments, folder), lambda: num_finished() > before)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stages", STAGES, ids="-".join)
def test_killed_run_continues_to_the_same_bytes(
    stages: tuple[str, ...], undisturbed: Path, bitmill: Bitmill, tmp_path: Path
) -> None:
    target, work = tmp_path / "out", tmp_path / "work"
    target.mkdir()
    arguments = ["convert", str(DEMO_MODEL), *VARIANTS, *SMALL, "--to", str(target), "--work-dir", str(work)]
    for number, stage in enumerate(stages):
        # Another number of workers each time, as on another machine.
        kill_at_stage([*arguments, "--workers", str(1 + number % 3)], tmp_path, work / stage)
        assert files_below(target / "refs") == []
        assert not list(target.glob("releases/**/manifest.json"))
    done = bitmill(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert any(event.get("reused") for event in events)
    assert contents(target) == contents(undisturbed)


def test_run_killed_while_it_publishes_continues_to_the_same_bytes(
    undisturbed: Path, bitmill: Bitmill, tmp_path: Path
) -> None:
    target, work = tmp_path / "out", tmp_path / "work"
    target.mkdir()
    arguments = ["convert", str(DEMO_MODEL), *VARIANTS, *SMALL, "--to", str(target), "--work-dir", str(work)]
    kill_once(start(arguments, tmp_path), lambda: any(target.glob("releases/*/*/*/*")))
    done = bitmill(*arguments)
    assert done.returncode == 0, done.stderr
    assert contents(target) == contents(undisturbed)
    refs = {path.relative_to(target).as_posix() for path in files_below(target / "refs")}
    assert refs == {f"refs/local/model-{name}/main" for name in ("gptq-w4-g128", "awq-w4-g128")}


def weights(target: Path) -> dict[str, bytes]:
    """Return the weights and configs of every release, which do not depend on what else was made with it or on what
    the source is called."""
    kept = {path: data for path, data in contents(target).items() if path.endswith((".safetensors", "config.json"))}
    return {"/".join((path.split("/")[1].rpartition("-")[0], path.split("/")[-1])): kept[path] for path in kept}


def test_run_killed_while_it_fetches_continues_with_the_missing_bytes(
    undisturbed: Path, bitmill: Bitmill, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    arguments = ["convert", "org/model", *VARIANTS, *SMALL, "--to", str(target), "--release", "local/model"]
    with LoopbackHub(token="secret", cdn=True) as hub:
        hub.add("org/model", {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()})
        env = {**hub.environment(tmp_path), "HF_TOKEN": "secret"}
        hub.faults.append(Fault("model.safetensors", stall_after=1_000_000))

        def has_half() -> bool:
            parts = tmp_path.rglob("model.safetensors.part")
            return hub.stalled.is_set() and any(part.stat().st_size > 500_000 for part in parts)

        kill_once(start(arguments, tmp_path, **env), has_half)
        assert files_below(target / "releases") == []
        hub.requests.clear()
        done = bitmill(*arguments, env=env)
        assert done.returncode == 0, done.stderr
        starts = [int(wanted.removeprefix("bytes=").split("-")[0]) for wanted in hub.ranges("model.safetensors")]
    assert max(starts) > 500_000, "what had come is not asked for again"
    assert weights(target) == weights(undisturbed)


def test_two_runs_at_once_in_one_work_directory_do_not_disturb_each_other(undisturbed: Path, tmp_path: Path) -> None:
    """They calibrate alike, save the same hidden states, and the one that ends first drops them."""
    target, work = tmp_path / "out", tmp_path / "work"
    target.mkdir()
    places = ("--to", str(target), "--work-dir", str(work))
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "convert", str(DEMO_MODEL), "--variant", variant, *SMALL, *places],
            cwd=ROOT,
            env=environment(tmp_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variant in ("gptq-w4-g128", "awq-w4-g128")
    ]
    for run in runs:
        _, stderr = run.communicate(timeout=280)
        assert run.returncode == 0, stderr
    assert weights(target) == weights(undisturbed)


def test_hub_source_is_pinned_and_published_to_s3(undisturbed: Path, bitmill: Bitmill, tmp_path: Path) -> None:
    with LoopbackHub(token="secret") as hub, S3Server(tmp_path / "s3") as s3:
        files = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()}
        commit = hub.add("org/tiny", files)
        s3.make_bucket("models")
        env = {**s3.environment, **hub.environment(tmp_path / "cache"), "HF_TOKEN": "secret"}
        arguments = ("org/tiny", "--variant", "gptq-w4-g128", *SMALL)
        planned = bitmill("plan", *arguments, "--json", env=env)
        assert planned.returncode == 0, planned.stderr
        assert json.loads(planned.stdout)["commit"] == commit
        done = bitmill("convert", *arguments, "--to", "s3://models/quantized", env=env)
        assert done.returncode == 0, done.stderr
        uri = done.stdout.splitlines()[-1]
        assert uri.startswith("s3://models/quantized/releases/org/tiny-gptq-w4-g128/")
        verified = bitmill("verify", "s3://models/quantized/releases/org/tiny-gptq-w4-g128@main", env=env)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        body = s3.client().get_object(Bucket="models", Key=uri.removeprefix("s3://models/") + "/bitmill.json")["Body"]
        assert json.loads(body.read())["source"]["commit"] == commit


def test_failed_gate_publishes_nothing(bitmill: Bitmill, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("gates: {max_kl: 1.0e-9, prompts: [{prompt: Hello, expect: '^no such text$'}]}\n")
    (tmp_path / "out").mkdir()
    done = bitmill("convert", DEMO_MODEL, "--variant", "rtn-w4-g128", *SMALL, "--spec", spec, "--to", tmp_path / "out")
    assert done.returncode == 5, done.stderr
    assert done.stdout == ""
    assert "divergence: KL" in done.stderr
    assert "does not match" in done.stderr
    assert files_below(tmp_path / "out" / "refs") == []
    assert files_below(tmp_path / "out" / "releases") == []
