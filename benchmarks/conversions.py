"""Conversions as benchmarks run them: the real command in a session of its own, its events with the time of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from sessions import kill_session

from pipeline.fingerprint import digest_file

ROOT = Path(__file__).parents[1]
POLL_S = 0.05
"""Between two looks at a conversion that runs."""

SETTLE_S = 2.0
"""Longest wait for the last events of a driver that has ended."""


@dataclass(frozen=True)
class Job:
    """What is converted.

    Attributes:
        source: A model folder.
        variants: Short names.
        samples: Calibration sequences.
        length: Tokens of a sequence.
    """

    source: Path
    variants: tuple[str, ...]
    samples: int
    length: int

    def spec(self, target: Path) -> dict[str, Any]:
        """Return the spec; nothing is judged, because a random model has no quality to keep."""
        return {
            "source": str(self.source),
            "variants": list(self.variants),
            "targets": [str(target)],
            "calibration": {"samples": self.samples, "length": self.length},
            "gates": {
                "max_relative_error": None,
                "max_kl": None,
                "max_perplexity_ratio": None,
                "max_degradations": None,
                "heldout_samples": 4,
                "heldout_length": self.length,
                "generated_tokens": 8,
            },
        }


@dataclass
class Phase:
    """The units of one phase.

    Attributes:
        num_units: How many ran.
        busy_s: Sum of what they took where they ran.
    """

    num_units: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class Timing:
    """How long a conversion took.

    Attributes:
        whole_s: The command, from its start to its end.
        work_s: From the first worker that is ready to the end of the last unit: no start-up, no publication.
        worker_s: The same, summed over the workers that were ready; the second one starts later than the first.
        phases: The units that ran, by phase.
    """

    whole_s: float
    work_s: float
    worker_s: float
    phases: dict[str, Phase]

    @property
    def busy_s(self) -> float:
        """Sum of what the units took where they ran."""
        return sum(phase.busy_s for phase in self.phases.values())

    @property
    def num_units(self) -> int:
        """Units that ran."""
        return sum(phase.num_units for phase in self.phases.values())


class Conversion:
    """One run of a job; killed with all that belongs to it when its ``with`` block is left.

    Attributes:
        session: The number of its session, and of its driver.
        events: Moments on the monotonic clock, and the events that came then.
        talk: What came on standard error besides.
    """

    def __init__(self, job: Job, place: Path, workers: int, *, inline: bool = False, flags: Sequence[str] = ()) -> None:
        """Start the job.

        Args:
            job: What to convert.
            place: Folder with ``work`` and ``out``; an earlier run in it is continued.
            workers: Work units at a time.
            inline: Run every unit in the driver, without Ray.
            flags: Others of ``bitmill convert``.
        """
        target = place / "out"
        target.mkdir(parents=True, exist_ok=True)
        spec = place / "spec.yaml"
        spec.write_text(json.dumps(job.spec(target)))
        words = ["--spec", str(spec), "--work-dir", str(place / "work")]
        module = [str(Path(__file__).parent / "inline.py")] if inline else ["-m", "jobs.cli", "convert", "--json"]
        if not inline:
            words += ["--workers", str(workers), "--device", "cpu", *flags]
        self.events: list[tuple[float, dict[str, Any]]] = []
        self.talk: list[str] = []
        self._started_s, self._ended_s = time.monotonic(), 0.0
        self._driver = subprocess.Popen(
            [sys.executable, *module, *words],
            cwd=ROOT,
            env=_environment(place),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.session = self._driver.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether the driver runs."""
        return self.exit_status is None

    @property
    def exit_status(self) -> int | None:
        """The driver's exit status (-9 when it was killed), or None while it runs.

        It is not waited for, so that its number stays its own until ``close``.
        """
        if self._driver.returncode is not None:
            return self._driver.returncode
        ended = os.waitid(os.P_PID, self.session, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        self._ended_s = self._ended_s or time.monotonic()
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    @property
    def share_done(self) -> float:
        """The share of the announced units that is done."""
        announced = [event for _, event in self.events if event["event"] == "job_started"]
        total = sum(phase["num_units"] for phase in announced[-1]["work"]) if announced else 0
        return sum(event["event"] == "stage_finished" for _, event in self.events) / total if total else 0.0

    @property
    def worked_s(self) -> float:
        """The time since the first worker was ready; 0 before."""
        ready = [when_s for when_s, event in self.events if event["event"] == "workers_ready"]
        return time.monotonic() - ready[0] if ready else 0.0

    @property
    def num_finished(self) -> int:
        """Units that this run has finished itself."""
        return sum(event["event"] == "stage_finished" and not event["reused"] for _, event in self.events)

    def finish(self, meanwhile: Callable[[], object] = lambda: None) -> Timing:
        """Wait for the end and return how long it took.

        Args:
            meanwhile: Called every ``POLL_S``.

        Raises:
            RuntimeError: with the last words of a conversion that failed.
        """
        while self.is_running:
            meanwhile()
            time.sleep(POLL_S)
        if self.close() != 0:
            words = [event for _, event in self.events[-3:]] + self.talk[-20:]
            raise RuntimeError(f"the conversion failed: {words}")
        return self.timing()

    def close(self) -> int:
        """Kill what is left of the session, and return the driver's exit status as ``exit_status`` says it."""
        if self._driver.returncode is None:
            kill_session(self.session)
            self._driver.wait()
            self._ended_s = self._ended_s or time.monotonic()
            self._reader.join()
        return self._driver.returncode

    def settle(self) -> None:
        """The events of a driver that has ended are there, even if processes that it left keep the stream open."""
        self._reader.join(SETTLE_S)

    def timing(self) -> Timing:
        """Return how long the run took that has ended, or has been killed."""
        ran = [(when_s, event) for when_s, event in self.events if event["event"] == "stage_finished"]
        ran = [(when_s, event) for when_s, event in ran if not event["reused"]]
        end_s = max((when_s for when_s, _ in ran), default=0.0)
        ready = [(when_s, event["num_ready"]) for when_s, event in self.events if event["event"] == "workers_ready"]
        ready = [(min(when_s, end_s), number) for when_s, number in ready] + [(end_s, 0)]
        spans = pairwise(ready)
        phases: dict[str, Phase] = defaultdict(Phase)
        for _, event in ran:
            phases[event["phase"]].num_units += 1
            phases[event["phase"]].busy_s += event["seconds"]
        return Timing(
            whole_s=self._ended_s - self._started_s,
            work_s=end_s - ready[0][0],
            worker_s=sum((until_s - since_s) * number for (since_s, number), (until_s, _) in spans),
            phases=dict(phases),
        )

    def _read(self) -> None:
        assert self._driver.stderr is not None
        for line in self._driver.stderr:
            if line.startswith('{"event":'):
                self.events.append((time.monotonic(), json.loads(line)))
            else:
                self.talk.append(line.rstrip())


def _environment(place: Path) -> dict[str, str]:
    """Return an environment with a cache of its own, no cluster and no credentials, one thread a process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "HF_", "RAY_", "BITMILL_"))}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, **threads, "PYTHONPATH": paths, "BITMILL_CACHE": str(place / "cache")}


def release_digests(place: Path) -> dict[str, str]:
    """Return the SHA-256 of every published file by path."""
    root = place / "out" / "releases"
    return {p.relative_to(root).as_posix(): digest_file(p) for p in sorted(root.rglob("*")) if p.is_file()}
