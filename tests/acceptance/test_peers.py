"""``python -m benchmarks.peers`` without peers: Bitmill's own checkpoints, read and scored by the referee."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sessions import processes_of
from tests.acceptance.conftest import ROOT, environment

TASKS = ("bitmill-gptq-w4-g64-sym", "bitmill-awq-w4-g64-asym")
SMALL = ["--samples", "8", "--length", "64", "--heldout-samples", "4", "--also", "LICENSE"]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_referee_finds_what_the_release_states_and_repeats_nothing(tmp_path: Path) -> None:
    out = tmp_path / "peers"
    tasks = [word for name in TASKS for word in ("--task", name)]
    precision = ["--precision", "float32"]  # the referee's
    tool = [sys.executable, "-m", "benchmarks.peers", "--only", "bitmill"]
    command = [*tool, *tasks, *SMALL, *precision, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path), check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "peers.png").read_bytes().startswith(b"\x89PNG")
    first = rows(out)
    assert [row["exit_status"] for row in first if row["kind"] == "run"] == [0, 0]
    for name in TASKS:
        quality = json.loads((out / "checkpoints" / name / "bitmill.json").read_text())["quality"]
        score = next(row for row in first if row["kind"] == "score" and row["task"] == name)
        assert score["num_tokens"] == 4 * 63
        for theirs, ours in (("kl", "kl"), ("perplexity", "perplexity"), ("agreement", "top1_agreement")):
            assert score[theirs] == pytest.approx(quality[ours], rel=1e-3)
    command = [*tool, "--task", TASKS[0], *SMALL, *precision, "--out", str(out)]
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path), check=False)
    assert again.returncode == 0, again.stderr
    assert rows(out) == first
    assert "w4 g64 sym, bitmill gptq-w4-g64" in again.stdout
    assert "w4 g64 asym, bitmill awq-w4-g64" in again.stdout, "what is kept of the same job is shown"


def test_nothing_runs_on_after_it_is_told_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.peers", "--only", "bitmill", *SMALL, "--out", str(tmp_path / "peers")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(tmp_path)) as running:
        assert running.stdout is not None
        assert any("run 1 of 1" in line for line in running.stdout)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        deadline_s = time.monotonic() + 60
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        running.terminate()
        assert running.wait(timeout=60) == 128 + signal.SIGTERM
    assert list(processes_of(int(found[0]))) == []
