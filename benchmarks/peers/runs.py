"""One tool at work: started as a user would start it, watched from outside, its checkpoint found.

Wall time is from the start of the process to its end, with imports, loading and writing. Bitmill's includes what the
others leave out: its gates (predictions on held-out text, continuations of prompts) and publication.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ensure_environment, pins_of
from benchmarks.peers.jobs import ROOT, Job, Task, Tool, script_file, write_job
from benchmarks.sessions import memory_of, processes_of, session_of
from pipeline.fingerprint import digest_file, fingerprint
from pipeline.settings import engine_environment

POLL_S = 0.1
"""Between two looks at a tool's processes: what one of them takes in its last moments is not seen."""

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
LAST_LINES = 3


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Attributes:
        exit_status: 0 when it did what it was asked for; negative is a signal.
        wall_s: From its start to its end.
        cpu_s: User and system time of its processes, as last seen.
        peak_bytes: Largest resident memory of any one process (VmHWM; mapped files count).
        private_bytes: Largest sum of memory without files behind it (RssAnon) of all its processes at one time.
        load_before: Load average of a minute when it started.
    """

    exit_status: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    private_bytes: int
    load_before: float


def measure(command: list[str], env: dict[str, str], folder: Path, log: Path) -> Usage:
    """Run a command in a session of its own and return what it took; nothing of it is left running.

    Args:
        command: Its words.
        env: Its environment.
        folder: Where it runs, and leaves what it leaves.
        log: File for all that it prints.
    """
    load_before, started_s = os.getloadavg()[0], time.monotonic()
    cpu_s: dict[int, float] = {}
    peak_bytes = private_bytes = 0
    with log.open("wb") as stream, session_of(command, folder, env, stream) as leader:
        while _is_running(leader.pid):
            together_bytes = 0
            for process in processes_of(leader.pid):
                if (memory := memory_of(process.pid)) is not None:
                    peak_bytes = max(peak_bytes, memory.peak_bytes)
                    together_bytes += memory.private_bytes
                cpu_s[process.pid] = max(_cpu_s(process.pid), cpu_s.get(process.pid, 0.0))
            private_bytes = max(private_bytes, together_bytes)
            time.sleep(POLL_S)
        wall_s = time.monotonic() - started_s
    return Usage(leader.returncode, wall_s, sum(cpu_s.values()), peak_bytes, private_bytes, load_before)


def run_task(job: Job, task: Task, out: Path, environments: Path) -> dict[str, Any]:
    """Make a task's checkpoint at ``out/checkpoints`` and return the row of the run.

    Raises:
        SystemExit: when Bitmill calibrated on other tokens than the peers got.
    """
    place, log = out / "checkpoints" / task.name, out / "logs" / f"{task.name}.log"
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bitmill-peers-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        if task.tool is Tool.BITMILL:
            command = job.bitmill_command(Path(sys.executable), task, scratch)
            (scratch / "target").mkdir()
            usage = measure(command, _bitmill_environment(scratch), scratch, log)
            if usage.exit_status == 0:
                shutil.copytree(_release(log), place)
                _require_same_tokens(place, job)
        else:
            python = ensure_environment(task.tool, environments)
            write_job(job, task, place, scratch / "job.json")
            command = [str(python), str(script_file(task.tool)), str(scratch / "job.json")]
            usage = measure(command, _peer_environment(scratch, job.cores), scratch, log)
    row = {
        "kind": "run",
        "key": job.key(task),
        "task": task.name,
        "version": bitmill_version() if task.tool is Tool.BITMILL else pins_of(task.tool)[-1],
        "date": str(date.today()),
        "cores": job.cores,
        **asdict(usage),
    }
    if usage.exit_status:
        return row | {"said": log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]}
    return row | {"checkpoint": digest_checkpoint(place)}


def digest_checkpoint(folder: Path) -> str:
    """Return the fingerprint of a checkpoint's weights."""
    return fingerprint([[file.name, digest_file(file)] for file in sorted(folder.glob("*.safetensors"))])


def bitmill_version() -> str:
    """Return Bitmill's version with the commit that ran, if that is known."""
    from importlib.metadata import version

    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    commit = described.stdout.strip()
    return f"bitmill=={version('bitmill')}" + (f" ({commit})" if commit else "")


def _release(log: Path) -> Path:
    """Return the published folder: the last line of the command's standard output, after its talk."""
    folders = [line for line in log.read_text().splitlines() if line.startswith("/") and Path(line).is_dir()]
    return Path(folders[-1])


def _require_same_tokens(release: Path, job: Job) -> None:
    """Return when a release states the digest of the tokens that the peers got."""
    command = [sys.executable, "-m", "jobs.cli", "inspect", str(release), "--json"]
    facts = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    if facts["calibration"]["tokens_digest"] != job.tokens.digest:
        raise SystemExit(f"{release}: calibrated on other tokens than the peers'")


def _bitmill_environment(scratch: Path) -> dict[str, str]:
    """Return this environment without credentials and clusters, with a cache of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "HF_", "RAY_", "BITMILL_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "BITMILL_CACHE": str(scratch / "cache")}


def _peer_environment(scratch: Path, cores: int) -> dict[str, str]:
    threads = {name: str(cores) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**engine_environment(scratch / "hub"), **threads, "TMPDIR": str(scratch)}


def _is_running(pid: int) -> bool:
    """Whether a child of ours runs; it is not waited for, so that its number stays its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _cpu_s(pid: int) -> float:
    """Return the user and system time of a process, 0 of one that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / TICKS_PER_S
