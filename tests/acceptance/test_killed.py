"""``bitmill convert`` through kills: the same command goes on, and publishes what an undisturbed run does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance.conftest import (
    DEMO_MODEL,
    ROOT,
    SMALL,
    VARIANTS,
    Bitmill,
    contents,
    environment,
    files_below,
    weights,
)
from tests.loopback_hub import Fault, LoopbackHub

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
