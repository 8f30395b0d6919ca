"""A virtual environment for each peer, made on first use and kept.

Requirements are complete lists of pins: torch first, the peer itself last. Torch brings what its build needs; all
others are installed with ``--no-deps``, since what a peer declares may exclude a torch that it works with. The peer
comes after them, because it may be compiled against torch. A record written last says that an environment is complete.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.jobs import Tool, requirements_file
from pipeline.fingerprint import fingerprint

RECORD = "installed.txt"


def pins_of(tool: Tool) -> list[str]:
    """Return the pinned requirements of a peer; torch first, the peer itself last."""
    lines = requirements_file(tool).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def ensure_environment(tool: Tool, folder: Path) -> Path:
    """Return the Python of a peer's environment, installed below ``folder`` on first use.

    Raises:
        SystemExit: with pip's last words when it cannot be installed.
    """
    pins = pins_of(tool)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    place = folder / f"{tool}-{fingerprint([pins, python])[:16]}"
    if not (place / RECORD).is_file():
        print(f"installing {pins[-1]} into {place}: about 1.6 GB, some minutes, once", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(place)])
        pip = [str(place / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, pins[0]])
        _run([*pip, "--no-deps", *pins[1:-1]])
        _run([*pip, "--no-deps", "--no-build-isolation", pins[-1]])
        (place / RECORD).write_text("\n".join(pins) + "\n")
    return place / "bin" / "python"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise SystemExit(f"{' '.join(command[:3])} ... failed:\n{said}")
