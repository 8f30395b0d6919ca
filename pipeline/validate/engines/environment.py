"""Engine environments, made on demand and kept, and the comparison of an engine with the project's own loader.

An environment is a virtual environment named by the fingerprint of its pinned requirements. Its record is written
last, so an installation that was killed is made anew. The engine runs offline in a process of its own.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import EngineError
from pipeline.facts import Check
from pipeline.fingerprint import fingerprint
from pipeline.settings import engine_environment
from pipeline.tensors.local import read_file_tensors
from pipeline.validate.agreement import Agreement, compare_choices

RECORD = "installed.json"
CHECK = "engine"
"""Name of the checks that engines give."""

MAX_LOGIT_ERROR = 0.05
"""Largest relative difference (Frobenius) of a sequence's logits: 16-bit arithmetic gives about 0.01, a wrong zero
point or order of columns about 1."""

ENGINE_TIMEOUT_S = 1800.0
"""Longest run of an engine."""

HEED_S = 1.0
"""How often it is asked whether an engine's answer is wanted still."""


def ensure_environment(
    engine: str, cache_dir: Path, on_line: Callable[[str], None], heed: Callable[[], None] = lambda: None
) -> Path:
    """Return the folder of the engine's environment, installed on first use.

    Raises:
        EngineError: with pip's last words when it cannot be installed.
    """
    folder = environment_folder(engine, cache_dir)
    with _locked(folder):
        if not is_installed(folder):
            on_line(f"installing {engine} into {folder}: some gigabytes, several minutes, once")
            _install(folder, pinned_requirements(engine), heed)
    return folder


def environment_folder(engine: str, cache_dir: Path) -> Path:
    """Return where an engine's environment is or would be, named by its pinned requirements."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache_dir / "engines" / f"{engine}-{fingerprint([pinned_requirements(engine), python])[:16]}"


def is_installed(folder: Path) -> bool:
    """Return whether the environment in a folder is complete."""
    return (folder / RECORD).is_file()


def pinned_requirements(engine: str) -> str:
    """Return the text of the requirements file of an engine."""
    return (resources.files("pipeline.validate.engines") / f"{engine}.txt").read_text(encoding="utf-8")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _install(folder: Path, requirements: str, heed: Callable[[], None]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    pins = [line for line in requirements.splitlines() if line and not line.startswith("#")]
    torch_pin = next((pin for pin in pins if pin.startswith("torch==")), None)
    _make([sys.executable, "-m", "venv", str(folder)], "cannot make a virtual environment", heed)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    if torch_pin is not None:
        # Packages that compile against torch need it, and these tools, before they are built.
        _make([*pip, torch_pin, "wheel", "setuptools", "numpy"], "cannot install torch", heed)
    _make([*pip, "--no-build-isolation", *pins], "cannot install the engine", heed)
    (folder / RECORD).write_text(json.dumps({"requirements": pins}))


def _make(command: list[str], problem: str, heed: Callable[[], None]) -> None:
    status, said = _run(command, heed)
    if status:
        last = "\n".join(said.splitlines()[-8:])
        raise EngineError(
            f"{problem} ({' '.join(command[:3])} ...):\n{last}",
            code="engine.install",
            hint="check the network and the free disk space, then run the same command again",
        )


def _run(
    command: Sequence[str],
    heed: Callable[[], None],
    environment: Mapping[str, str] | None = None,
    timeout_s: float = math.inf,
) -> tuple[int, str]:
    """Return a command's exit status and what it said on standard error, or else on standard output.

    Args:
        command: The program and its words.
        heed: Called every second; what it raises ends the program.
        environment: Of the program; None for this process's.
        timeout_s: Longest run.

    Raises:
        subprocess.TimeoutExpired: when it runs for longer; it is ended.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        deadline_s = time.monotonic() + timeout_s
        with subprocess.Popen(command, stdout=out, stderr=err, env=environment) as program:
            try:
                while program.poll() is None:
                    heed()
                    if time.monotonic() > deadline_s:
                        raise subprocess.TimeoutExpired(command, timeout_s)
                    with suppress(subprocess.TimeoutExpired):
                        program.wait(HEED_S)
            except BaseException:
                program.kill()
                raise
        said = []
        for file in (err, out):
            file.seek(0)
            said.append(file.read().decode(errors="replace").strip())
    return program.returncode, said[0] or said[1]


def check_engine(
    engine: str,
    release_folder: Path,
    reference: Callable[[Sequence[int]], Tensor],
    prompts: Sequence[tuple[str, list[int]]],
    max_tokens: int,
    cache_dir: Path,
    on_line: Callable[[str], None],
    known: Sequence[str] = (),
    heed: Callable[[], None] = lambda: None,
) -> Check:
    """Return whether the engine, unmodified, computes what the project's own loader computes.

    Args:
        engine: Name of the engine: ``transformers``.
        release_folder: The release's files.
        reference: Token ids to float32 logits [length, vocabulary] of the project's own dense model.
        prompts: Texts with their token ids.
        max_tokens: Tokens to generate for each prompt.
        cache_dir: Where environments are kept.
        on_line: Told what takes long.
        known: Sentences that say why the engine does not load such a release, for the detail of a failed check.
        heed: Called every second while it takes; what it raises ends the engine.

    Raises:
        EngineError: when the environment cannot be made.
    """
    python = ensure_environment(engine, cache_dir, on_line, heed) / "bin" / "python"
    on_line(f"loading {release_folder.name[:12]} in {engine}")
    with tempfile.TemporaryDirectory(prefix="bitmill-engine-") as name:
        out, hub_home = Path(name), Path(name) / "hub"
        hub_home.mkdir()
        (out / "job.json").write_text(json.dumps({"prompts": [ids for _, ids in prompts], "max_tokens": max_tokens}))
        script = resources.files("pipeline.validate.engines") / f"run_{engine}.py"
        command = [str(python), str(script), str(release_folder), str(out / "job.json"), str(out)]
        try:
            status, said = _run(command, heed, engine_environment(hub_home), ENGINE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return _failed(engine, f"{engine}: no answer within {ENGINE_TIMEOUT_S:.0f} s", known)
        if status:
            # What is known explains the failure better than its traceback does.
            last = " / ".join(said.splitlines()[-1 if known else -3 :])
            return _failed(engine, f"{engine} cannot run the release: {last}", known)
        result = json.loads((out / "result.json").read_text())
        logits = read_file_tensors(out / "logits.safetensors")
    return judge_engine(engine, result, logits, reference, prompts, known)


def judge_engine(
    engine: str,
    result: dict[str, Any],
    logits: dict[str, Tensor],
    reference: Callable[[Sequence[int]], Tensor],
    prompts: Sequence[tuple[str, list[int]]],
    known: Sequence[str] = (),
) -> Check:
    """Return the check of an engine's answers: each token it chose, and all logits, against the reference.

    Args:
        engine: Name of the engine.
        result: ``sequences`` (prompts with continuations, token ids), ``versions``, ``dtype`` and ``tokens_per_s``.
        logits: float32 [length, vocabulary] of each sequence under its number.
        reference: Token ids to float32 logits [length, vocabulary].
        prompts: Texts with their token ids.
        known: Sentences that explain a failure.
    """
    versions = ", ".join(f"{name} {number}" for name, number in sorted(result["versions"].items()))
    label = f"{engine} ({versions}; {result['dtype']})"
    # A prompt tells the vocabulary: tokens of a wider one would not even be found in our embedding.
    vocabulary = reference(prompts[0][1]).shape[-1] if prompts else 0
    found, errors = Agreement(), []
    for number, ((_, ids), sequence) in enumerate(zip(prompts, result["sequences"], strict=True)):
        theirs_LV = logits[str(number)]
        wanted = [len(sequence), vocabulary]
        if list(theirs_LV.shape) != wanted:
            fault = f"the engine's logits of prompt {number} are {list(theirs_LV.shape)}, not {wanted}"
            return _failed(engine, f"{label}: {fault}", known)
        ours_LV = reference(sequence)
        for whose, rows_LV in (("the engine's", theirs_LV), ("the reference's", ours_LV)):
            if not bool(rows_LV.isfinite().all()):
                return _failed(engine, f"{label}: {whose} logits of prompt {number} are not all finite", known)
        errors.append(float((theirs_LV - ours_LV).norm() / ours_LV.norm()))
        found += compare_choices(ours_LV, sequence, len(ids))
    worst_error = _worst(errors)
    detail = f"{label}: {found.words}, relative logit error {worst_error:.4f}"
    figures = {
        "tokens_agreeing": float(found.agreeing),
        "tokens_total": float(found.total),
        "worst_gap": found.worst_gap,
        "max_relative_logit_error": worst_error,
        "tokens_per_s": result["tokens_per_s"],
    }
    if not found.is_near or not worst_error <= MAX_LOGIT_ERROR:
        return _failed(engine, detail, known, {name: value for name, value in figures.items() if math.isfinite(value)})
    return Check(name=CHECK, passed=True, detail=detail, figures=figures, engine=engine)


def _worst(values: Sequence[float]) -> float:
    """Return the largest value; NaN (nothing over nothing) counts as larger than any."""
    return max(values, key=lambda value: (math.isnan(value), value), default=math.nan)


def _failed(engine: str, detail: str, known: Sequence[str], figures: dict[str, float] | None = None) -> Check:
    """Return a failed check that ends with what is known of such failures."""
    sentences = (f"{detail.rstrip('.!')}.", *known) if known else (detail,)
    return Check(name=CHECK, passed=False, detail=" ".join(sentences), figures=figures or {}, engine=engine)
