"""The real command line in a subprocess, on the shipped model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "jobs" / "demo" / "model"
SMALL = (
    "--samples",
    "16",
    "--length",
    "64",
    "--heldout-samples",
    "2",
    "--heldout-length",
    "64",
    "--workers",
    "2",
)

Bitmill = Callable[..., subprocess.CompletedProcess[str]]


def environment(folder: Path, **extra: str) -> dict[str, str]:
    """Return an environment with a cache of its own and none of the machine's credentials."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "HF_", "RAY_", "BITMILL_"))}
    return {**kept, "BITMILL_CACHE": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", **extra}


def files_below(folder: Path) -> list[Path]:
    """Return every file below a folder, which may be missing, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def bitmill(tmp_path: Path) -> Bitmill:
    """Run ``bitmill`` with arguments and return what came of it."""

    def run(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path, **(env or {})), timeout=280
        )

    return run
