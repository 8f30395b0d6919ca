"""What every tool is asked to do, and in what it differs from the others.

A task is a grid (width, group size, symmetry) with the method by which one tool finds its codes. Everything else is the
tool's own default. All tools get the same token ids, none of them any other text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.fingerprint import digest_bytes, digest_file, fingerprint
from pipeline.precision import Precision

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


AS_STORED = "auto"
"""What transformers' loaders call the type that a model is stored in."""


class Tool(StrEnum):
    """What quantizes; also the name of its requirements file and of its script."""

    BITMILL = "bitmill"
    GPTQMODEL = "gptqmodel"
    LLMCOMPRESSOR = "llmcompressor"
    AUTOROUND = "autoround"


@dataclass(frozen=True)
class Grid:
    """What codes mean.

    Attributes:
        bits: Width of a code.
        group_size: Consecutive input channels with one scale.
        symmetric: No zero points.
    """

    bits: int
    group_size: int
    symmetric: bool

    @property
    def name(self) -> str:
        """For example ``w4 g64 sym``."""
        return f"w{self.bits} g{self.group_size} {'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True)
class Task:
    """One checkpoint to be made.

    Attributes:
        tool: Who makes it.
        method: ``gptq``, ``awq`` or ``autoround``; of Bitmill, ``awq-gptq`` too.
        grid: What its codes mean.
        iterations: Steps of AutoRound's search for each block; None is its default.
        suffix: What the name of Bitmill's variant ends with, for example ``-seq``.
        dtype: In what a peer holds the model: ``auto`` is as it is stored. A processor without instructions for
            bfloat16 is many times slower in it than in ``float32``.
    """

    tool: Tool
    method: str
    grid: Grid
    iterations: int | None = None
    suffix: str = ""
    dtype: str = AS_STORED

    @property
    def variant(self) -> str:
        """Bitmill's name for it."""
        return f"{self.method}-w{self.grid.bits}-g{self.grid.group_size}{self.suffix}"

    @property
    def name(self) -> str:
        """Name of its folder, its log and its rows."""
        grid = self.grid
        steps = f"-i{self.iterations}" if self.iterations else ""
        symmetry = "sym" if grid.symmetric else "asym"
        dtype = f"-{self.dtype}" if self.dtype != AS_STORED else ""
        return f"{self.tool}-{self.method}-w{grid.bits}-g{grid.group_size}-{symmetry}{self.suffix}{steps}{dtype}"

    @property
    def label(self) -> str:
        """The tool and its method, as tables say them."""
        steps = f", {self.iterations} iterations" if self.iterations else ""
        if self.tool is Tool.BITMILL:
            return f"{self.tool} {self.variant}"
        dtype = f", {self.dtype}" if self.dtype != AS_STORED else ""
        method = f" {self.method.upper()}" if self.method != self.tool else ""
        return f"{self.tool}{method}{steps}{dtype}"


def all_tasks(iterations: int | None, dtype: str = AS_STORED) -> list[Task]:
    """Return every task, grid by grid: each tool's own way, then Bitmill's others for the same grid and format.

    Args:
        iterations: Steps of AutoRound's search for each block; None is its default.
        dtype: In what peers hold the model.
    """
    four, three, asymmetric = Grid(4, 64, True), Grid(3, 64, True), Grid(4, 64, False)
    methods = {four: "gptq", three: "gptq", asymmetric: "awq"}
    tasks = []
    for grid, method in methods.items():
        tasks.append(Task(Tool.BITMILL, method, grid))
        tasks += [Task(tool, method, grid, dtype=dtype) for tool in (Tool.GPTQMODEL, Tool.LLMCOMPRESSOR)]
        if grid != three:
            tasks.append(Task(Tool.AUTOROUND, "autoround", grid, iterations, dtype=dtype))
    for grid in (four, three):
        tasks.append(Task(Tool.BITMILL, "gptq", grid, suffix="-seq"))
        tasks.append(Task(Tool.BITMILL, "awq-gptq", grid, suffix="-gptq"))
    tasks.append(Task(Tool.BITMILL, "awq-gptq", asymmetric))
    return sorted(tasks, key=lambda task: list(methods).index(task.grid))


@dataclass(frozen=True)
class Tokens:
    """Token sequences of one text.

    Attributes:
        name: The text's file name.
        sequences: Token ids, all of one length.
        digest: SHA-256 of the ids (int32, little-endian, row after row), as Bitmill's releases state it.
    """

    name: str
    sequences: list[list[int]]
    digest: str


def take_sequences(
    file: Path, encode: Callable[[str], Sequence[int]], samples: int, length: int, *, or_fewer: bool = False
) -> Tokens:
    """Return the first ``samples * length`` tokens of a text file, in order, without special tokens.

    Args:
        file: A UTF-8 text.
        encode: Text to token ids.
        samples: Sequences.
        length: Tokens of a sequence.
        or_fewer: Take as many whole sequences as a short text has, at least one.

    Raises:
        SystemExit: when the text is too short.
    """
    ids = list(encode(file.read_text(encoding="utf-8")))
    found = min(samples, len(ids) // length)
    if found < (1 if or_fewer else samples):
        raise SystemExit(f"{file} has {len(ids):,} tokens, but {samples} x {length} are needed")
    sequences = [ids[start * length : (start + 1) * length] for start in range(found)]
    octets = b"".join(number.to_bytes(4, "little") for sequence in sequences for number in sequence)
    return Tokens(file.name, sequences, digest_bytes(octets))


@dataclass(frozen=True)
class Job:
    """What is quantized, with what, on how much of the machine.

    Attributes:
        model: A Hugging Face folder.
        calibration: The text's file.
        tokens: What the tools get of it.
        heldout: File that Bitmill judges its own result on; others judge nothing.
        heldout_samples: Sequences of it, as long as those of calibration.
        cores: Processors, and threads of computation.
        precision: In what Bitmill passes texts through the model; peers have their own way.
    """

    model: Path
    calibration: Path
    tokens: Tokens
    heldout: Path
    heldout_samples: int
    cores: int
    precision: Precision = Precision.BFLOAT16

    def key(self, task: Task) -> str:
        """Return the fingerprint of all that the task's checkpoint follows from, and of the number of cores."""
        return fingerprint(
            {
                "task": task.name,
                "files": [*_digests(task_files(task)), *self._model_digests],
                "tokens": self.tokens.digest,
                "cores": self.cores,
                "precision": self.precision,
            }
        )

    @cached_property
    def _model_digests(self) -> list[list[str]]:
        # The files are large, and a key is wanted for every task.
        return _digests([*sorted(self.model.glob("*.safetensors")), *sorted(self.model.glob("*.json"))])

    def as_json(self, task: Task, out: Path) -> dict[str, Any]:
        """Return what a peer's script reads."""
        return {
            "model": str(self.model),
            "out": str(out),
            "calibration": self.tokens.sequences,
            "method": task.method,
            "bits": task.grid.bits,
            "group_size": task.grid.group_size,
            "symmetric": task.grid.symmetric,
            "iterations": task.iterations,
            "threads": self.cores,
            "dtype": task.dtype,
        }

    def bitmill_command(self, python: Path, task: Task, out: Path) -> list[str]:
        """Return the command line that makes a release of one variant, judged as Bitmill does by default."""
        samples, length = str(len(self.tokens.sequences)), str(len(self.tokens.sequences[0]))
        flags = {
            "--variant": task.variant,
            "--calibration": str(self.calibration),
            "--samples": samples,
            "--length": length,
            "--heldout": str(self.heldout),
            "--heldout-samples": str(self.heldout_samples),
            "--heldout-length": length,
            "--to": str(out / "target"),
            "--work-dir": str(out / "work"),
            "--workers": str(self.cores),
            "--precision": self.precision,
            "--device": "cpu",
        }
        words = [word for flag in flags.items() for word in flag]
        return [str(python), "-m", "jobs.cli", "convert", str(self.model), *words]


def _digests(files: Sequence[Path]) -> list[list[str]]:
    return [[file.name, digest_file(file)] for file in files]


def task_files(task: Task) -> list[Path]:
    """Return the files that say what a tool is: its pins and its script, or Bitmill's own source."""
    if task.tool is Tool.BITMILL:
        return sorted((ROOT / "pipeline").rglob("*.py"))
    return [requirements_file(task.tool), script_file(task.tool)]


def requirements_file(tool: Tool) -> Path:
    """Return the pins of a peer's environment."""
    return FOLDER / f"{tool}.txt"


def script_file(tool: Tool) -> Path:
    """Return the script that a peer's Python runs with a job."""
    return FOLDER / f"run_{tool}.py"


def write_job(job: Job, task: Task, out: Path, file: Path) -> None:
    """Write the job that a peer's script reads."""
    file.write_text(json.dumps(job.as_json(task, out)))
