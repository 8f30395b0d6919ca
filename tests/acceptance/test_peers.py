"""``python -m benchmarks.peers`` without peers: Bitmill's own checkpoints, read and scored by the referee."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import ROOT, environment

GRIDS = ["w4-g64-sym", "w4-g64-asym"]
SMALL = ["--samples", "8", "--length", "64", "--heldout-samples", "4", "--also", "LICENSE"]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_referee_finds_what_the_release_states_and_repeats_nothing(tmp_path: Path) -> None:
    out = tmp_path / "peers"
    grids = [word for grid in GRIDS for word in ("--grid", grid)]
    command = [sys.executable, "-m", "benchmarks.peers", "--only", "bitmill", *grids, *SMALL, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path), check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "peers.png").read_bytes().startswith(b"\x89PNG")
    first = rows(out)
    assert [row["exit_status"] for row in first if row["kind"] == "run"] == [0, 0]
    for name in ("bitmill-gptq-w4-g64-sym", "bitmill-awq-w4-g64-asym"):
        quality = json.loads((out / "checkpoints" / name / "bitmill.json").read_text())["quality"]
        score = next(row for row in first if row["kind"] == "score" and row["task"] == name)
        assert score["num_tokens"] == 4 * 63
        for theirs, ours in (("kl", "kl"), ("perplexity", "perplexity"), ("agreement", "top1_agreement")):
            assert score[theirs] == pytest.approx(quality[ours], rel=1e-3)
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path), check=False)
    assert again.returncode == 0, again.stderr
    assert rows(out) == first
    assert "w4 g64 asym, bitmill AWQ" in again.stdout
