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
    "1",
)
TWO_WORKERS = ("--workers", "2")
"""Put after ``SMALL``: every worker is a process that loads torch first, so tests that are not about them have one."""

VARIANTS = ("--variant", "gptq-w4-g128", "--variant", "awq-w4-g128")

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


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of every release by path."""
    releases = folder / "releases"
    return {p.relative_to(releases).as_posix(): p.read_bytes() for p in sorted(releases.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that one undisturbed run has published to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    target = folder / "out"
    target.mkdir()
    command = [sys.executable, "-m", "jobs.cli", "convert", str(DEMO_MODEL), *VARIANTS, *SMALL, *TWO_WORKERS]
    command += ["--to", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(folder), check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [Path(line).parent.name for line in lines] == ["model-gptq-w4-g128", "model-awq-w4-g128"]
    assert all((Path(line) / "manifest.json").is_file() for line in lines)
    # What other tests look for to see that nothing was published.
    names = ["local/model-awq-w4-g128/main", "local/model-gptq-w4-g128/main"]
    assert [path.relative_to(target / "refs").as_posix() for path in files_below(target / "refs")] == names
    return target


def weights(target: Path) -> dict[str, bytes]:
    """Return the weights and configs of every release, which do not depend on what else was made with it or on what
    the source is called."""
    kept = {path: data for path, data in contents(target).items() if path.endswith((".safetensors", "config.json"))}
    return {"/".join((path.split("/")[1].rpartition("-")[0], path.split("/")[-1])): kept[path] for path in kept}
