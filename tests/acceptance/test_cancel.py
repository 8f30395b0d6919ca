"""``bitmill cancel``: jobs are listed and stop while they fetch and while they compute; nothing is half-published."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.acceptance.conftest import DEMO_MODEL, ROOT, SMALL, Bitmill, environment, files_below
from tests.loopback_hub import Fault, LoopbackHub

SOON_S = 40.0
"""Longest time from the wish to the end of the job, on a busy machine; the starts of two commands included."""


def cancelled(
    command: Sequence[str], env: dict[str, str], is_time: Callable[[str], bool], bitmill: Bitmill, work: Path
) -> str:
    """Run a conversion, cancel it when a line of its output says that it is time, and return what it said."""
    begun = [sys.executable, "-m", "jobs.cli", *command]
    with subprocess.Popen(begun, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        try:
            return _cancelled(job, is_time, bitmill, work)
        finally:
            job.kill()


def _cancelled(job: subprocess.Popen[str], is_time: Callable[[str], bool], bitmill: Bitmill, work: Path) -> str:
    assert job.stderr is not None
    assert job.stdout is not None
    said = []
    for line in job.stderr:
        said.append(line)
        if is_time(line):
            break
    listed = bitmill("cancel", "--work-dir", work, "--json")
    assert listed.returncode == 0, listed.stderr
    (announced,) = json.loads(listed.stdout)
    assert (announced["source"], announced["variants"], announced["pid"]) == ("org/tiny", ["rtn-w8-g128"], job.pid)
    before_s = time.monotonic()
    told = bitmill("cancel", announced["id"], "--work-dir", work, "--wait", str(SOON_S))
    said.append(job.stderr.read())
    assert job.wait() == 7, said
    assert time.monotonic() - before_s < SOON_S
    assert (told.returncode, told.stdout) == (0, f"{announced['id']} of org/tiny has stopped\n"), told.stderr
    assert job.stdout.read() == ""
    again = bitmill("cancel", announced["id"], "--work-dir", work)
    assert again.returncode == 2
    assert "(running: none)" in again.stderr
    return "".join(said)


def test_a_job_is_cancelled_while_it_fetches_and_while_it_computes_and_goes_on(
    bitmill: Bitmill, tmp_path: Path
) -> None:
    work, target, other = tmp_path / "work", tmp_path / "out", tmp_path / "undisturbed"
    for folder in (target, other):
        folder.mkdir()
    convert = ["convert", "org/tiny", "--variant", "rtn-w8-g128", *SMALL, "--json", "--work-dir", str(work)]
    last = {
        "event": "failed",
        "code": "graph.cancelled",
        "message": "the job was cancelled",
        "hint": "the same command continues where this one stopped",
    }
    with LoopbackHub() as hub:
        hub.add("org/tiny", {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()})
        env = environment(tmp_path) | hub.environment(tmp_path / "here")
        # Asked for the weights, not only for their header, the hub wants patience.
        weights = "model.safetensors"
        whole = f"bytes=0-{(DEMO_MODEL / weights).stat().st_size - 1}"
        hub.faults.append(Fault(weights, times=99, range=whole, status=429, headers={"Retry-After": "300"}))
        command = [*convert, "--to", str(target)]
        said = cancelled(command, env, lambda line: "source_advanced" in line, bitmill, work)
        assert json.loads(said.splitlines()[-1]) == last
        hub.faults.clear()
        # What is packed is in the work store; what was calibrated before may only have been in a worker's memory.
        said = cancelled(command, env, lambda line: '"stage_finished", "phase": "pack"' in line, bitmill, work)
        assert json.loads(said.splitlines()[-1]) == last
        assert [*files_below(target / "releases"), *files_below(target / "refs")] == []
        done = [
            subprocess.run(
                [sys.executable, "-m", "jobs.cli", *convert, *places],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=env,
                timeout=280,
                check=False,
            )
            for places in (["--to", str(target)], ["--to", str(other), "--work-dir", str(tmp_path / "fresh")])
        ]
    assert [one.returncode for one in done] == [0, 0], done
    assert '"reused": true' in done[0].stderr
    contents = [
        {path.relative_to(folder / "releases"): path.read_bytes() for path in files_below(folder / "releases")}
        for folder in (target, other)
    ]
    assert contents[0] == contents[1]
    assert contents[0]
