"""A run that is told to stop stops: its own status and message, nothing published, no process left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import DEMO_MODEL, ROOT, SMALL, TWO_WORKERS, Bitmill, environment

LEAVE_S = 30.0
"""Time that Ray's processes have to be gone after the command has ended."""


def session_members(session: int) -> list[str]:
    """Return the names of the processes of a session, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        name, fields = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(name)
    return found


EVENT = {
    "event": "failed",
    "code": "terminated",
    "message": "terminated",
    "hint": "the same command continues where this one stopped",
}


@pytest.fixture(autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """Whoever starts the tests in the background has interrupts ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "flags", "begun", "status", "last_words"),
    [
        (signal.SIGTERM, ["--json"], '"event": "stage_finished"', 143, json.dumps(EVENT)),
        (
            signal.SIGINT,
            [],
            "calibrate 1/",
            130,
            "interrupted; the same command continues where this one stopped",
        ),
    ],
)
def test_a_signal_ends_the_run_and_all_its_processes_and_the_next_run_completes(
    number: signal.Signals,
    flags: list[str],
    begun: str,
    status: int,
    last_words: str,
    bitmill: Bitmill,
    tmp_path: Path,
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    places = ["--to", str(target), "--work-dir", str(tmp_path / "work")]
    arguments = ["convert", str(DEMO_MODEL), "--variant", "rtn-w8-g128", *SMALL, *TWO_WORKERS, *places, *flags]
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=ROOT,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stderr is not None
    for line in driver.stderr:
        if begun in line:
            break
    assert len(session_members(driver.pid)) > 1
    driver.send_signal(number)
    stdout, stderr = driver.communicate(timeout=120)
    assert driver.returncode == status, stderr
    *before, last = stderr.splitlines()
    assert last == last_words
    assert all(line.startswith("{" if flags else "[") for line in before), stderr
    assert stdout == ""
    assert not list(target.glob("re*/**/*.json"))
    deadline = time.monotonic() + LEAVE_S
    while left := session_members(driver.pid):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)
    done = bitmill(*arguments)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
