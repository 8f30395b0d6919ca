"""The processes of one session: who they are, what memory they took, and their end.

A conversion that is started as the leader of a new session has in it every process that it or Ray starts for it, so
that nothing else is ever looked at or signalled. The leader must not have been waited for meanwhile: as long as it is
at least a zombie, nobody else's session can get its number.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import IO

END_S = 30.0
"""Longest wait for killed processes to be gone."""


def exit_on_sigterm() -> None:
    """Have SIGTERM raise ``SystemExit`` from now on: what was started is ended, and scratch folders are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Role(StrEnum):
    """What a process of a conversion does."""

    DRIVER = "driver"
    WORKER = "worker"
    RAYLET = "raylet"
    GCS = "gcs"
    OTHER = "other"


@dataclass(frozen=True)
class Process:
    """A process of a session."""

    pid: int
    role: Role


@dataclass(frozen=True)
class Memory:
    """What a process has taken, in bytes.

    Attributes:
        peak_bytes: Its largest resident memory so far (VmHWM): files that it has mapped count.
        private_bytes: What it holds now that no file is behind (RssAnon).
    """

    peak_bytes: int
    private_bytes: int


@dataclass(frozen=True)
class Effort:
    """What processes have cost the machine.

    Attributes:
        user_s: CPU seconds of their own.
        system_s: CPU seconds of the system for them.
        faults: Pages that they asked the system for (minor page faults).
    """

    user_s: float = 0.0
    system_s: float = 0.0
    faults: int = 0

    @property
    def cpu_s(self) -> float:
        """CPU seconds in all."""
        return self.user_s + self.system_s

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.user_s + other.user_s, self.system_s + other.system_s, self.faults + other.faults)

    def __sub__(self, other: Effort) -> Effort:
        return Effort(self.user_s - other.user_s, self.system_s - other.system_s, self.faults - other.faults)


def processes_of(session: int) -> Iterator[Process]:
    """Yield the living processes of a session."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and _session_of(int(folder.name)) == session:
            # A process may end between any two looks at it.
            with suppress(OSError):
                yield Process(int(folder.name), _role(folder, session))


def memory_of(pid: int) -> Memory | None:
    """Return what a process has taken, or None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines if line.startswith(("VmHWM:", "RssAnon:")))
    if len(values) < 2:
        return None  # a zombie
    peak, private = (int(values[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon"))
    return Memory(peak, private)


def effort_of(pid: int) -> Effort | None:
    """Return what a process has cost by now, or None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return Effort(int(fields[11]) / ticks_per_s, int(fields[12]) / ticks_per_s, int(fields[7]))


def kill_process(pid: int, session: int) -> bool:
    """Send SIGKILL to a process of a session; return False when there is no such process any more."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Looked at again through /proc while the handle keeps the number from meaning another process.
        if _session_of(pid) != session:
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def kill_session(session: int) -> int:
    """Send SIGKILL to all processes of a session until none is left; return how many there were.

    Raises:
        TimeoutError: when one does not go away.
    """
    seen: set[int] = set()
    deadline_s = time.monotonic() + END_S
    while found := list(processes_of(session)):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"session {session} still has {len(found)} processes after SIGKILL")
        seen |= {process.pid for process in found if kill_process(process.pid, session)}
        time.sleep(0.05)
    return len(seen)


@contextmanager
def session_of(
    command: Sequence[str], folder: Path, env: Mapping[str, str], log: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as the leader of a session, yield it, and leave nothing of the session running.

    SIGINT and SIGTERM wait while the command starts: an exception from their handlers before it is known would leave it
    running. For the main thread.

    Args:
        command: Its words.
        folder: Where it runs.
        env: Its environment.
        log: For all that it prints.
    """
    arrived: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        del frame
        arrived.append(number)

    # Not blocked by a mask, which the command would inherit.
    handlers = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    leader: subprocess.Popen[bytes] | None = None
    try:
        try:
            leader = subprocess.Popen(
                command,
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)
        yield leader
    finally:
        if leader is not None:
            kill_session(leader.pid)
            leader.wait()


def _session_of(pid: int) -> int | None:
    """Return the session of a living process, or None for one that is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, _, _, session = text.rpartition(")")[2].split()[:4]
    return None if state in "ZX" else int(session)


def _role(folder: Path, session: int) -> Role:
    words = (folder / "cmdline").read_bytes().split(b"\0")
    name = Path(words[0].decode(errors="replace")).name
    if int(folder.name) == session:
        return Role.DRIVER
    if name.startswith("ray::RemoteWorker"):
        return Role.WORKER
    return {"raylet": Role.RAYLET, "gcs_server": Role.GCS}.get(name, Role.OTHER)
