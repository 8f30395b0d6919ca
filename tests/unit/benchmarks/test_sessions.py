"""A command that a benchmark starts in a session of its own ends with the benchmark."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest

from benchmarks import sessions

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
QUIET = Path("/dev/null")
ROOT = Path(__file__).parents[3]


class ToldToEndError(Exception):
    """What the handler of a signal raises."""


def end(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise ToldToEndError


def test_no_process_is_left_of_a_command_told_to_end_while_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[call-overload]
            started.append(self)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sessions.subprocess, "Popen", Interrupted)  # type: ignore[attr-defined]
    before = signal.signal(signal.SIGTERM, end)
    try:
        with (
            pytest.raises(ToldToEndError),
            QUIET.open("wb") as log,
            sessions.session_of(SLEEP, tmp_path, {}, log),
        ):
            pytest.fail("it was told to end before")
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [leader.returncode for leader in started] == [-signal.SIGKILL]
    assert list(sessions.processes_of(started[0].pid)) == []


def test_a_command_takes_signals_as_by_default(tmp_path: Path) -> None:
    with QUIET.open("wb") as log, sessions.session_of(SLEEP, tmp_path, {}, log) as leader:
        leader.terminate()
        assert leader.wait(30) == -signal.SIGTERM


SCRATCH = """
import argparse, sys, time
from pathlib import Path
sys.path.insert(0, "benchmarks")
from flags import scratch_folder
with scratch_folder(argparse.Namespace(scratch=Path(sys.argv[1]))) as folder:
    (folder / "file").touch()
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_benchmark_told_to_end_removes_its_scratch_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRATCH, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as benchmark:
        assert benchmark.stdout is not None
        folder = Path(benchmark.stdout.readline().strip())
        assert (folder / "file").exists()
        benchmark.terminate()
        assert benchmark.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
