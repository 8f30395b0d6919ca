"""Recordings of real conversions: when each unit ended, how long it took, what it had been estimated at.

Made from the events of a run, trimmed to what the time left is estimated from::

    bitmill convert ... --json 2>&1 >/dev/null | python -m tests.unit.observe.recording > recordings/NAME.txt

A line is the seconds since the recording began and what happened: ``plan PHASE NUM_UNITS COST``, ``workers NUM_READY
NUM_WANTED``, ``unit PHASE SECONDS COST``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.observe.events import Event, JobStarted, Phase, PhaseWork, StageFinished, WorkersReady

RECORDINGS = Path(__file__).parent / "recordings"


def read_recording(name: str) -> list[tuple[float, Event]]:
    """Return the events of a recording, each with the seconds at which it came."""
    lines = [line.split() for line in (RECORDINGS / name).read_text().splitlines() if not line.startswith("#")]
    work = tuple(PhaseWork(Phase(line[2]), int(line[3]), float(line[4])) for line in lines if line[1] == "plan")
    events: list[tuple[float, Event]] = []
    for at_s, what, *values in lines:
        match what:
            case "plan":
                if not any(isinstance(event, JobStarted) for _, event in events):
                    events.append((float(at_s), JobStarted(name, (), 0, work)))
            case "workers":
                events.append((float(at_s), WorkersReady(*map(int, values))))
            case _:
                events.append((float(at_s), StageFinished(Phase(values[0]), float(values[1]), float(values[2]))))
    return events


def record(lines: Iterable[str]) -> Iterator[str]:
    """Return the lines of a recording for the events of a run, as they come."""
    started_s = time.monotonic()
    for line in lines:
        event = json.loads(line)
        for text in _trimmed(event):
            yield f"{time.monotonic() - started_s:.2f} {text}"


def _trimmed(event: dict[str, Any]) -> list[str]:
    match event["event"]:
        case "job_started":
            return [f"plan {work['phase']} {work['num_units']} {work['cost']:.4g}" for work in event["work"]]
        case "workers_ready":
            return [f"workers {event['num_ready']} {event['num_wanted']}"]
        case "stage_finished":
            return [f"unit {event['phase']} {event['seconds']:.3g} {event['cost']:.3g}"]
        case _:
            return []


if __name__ == "__main__":
    for recorded in record(sys.stdin):
        print(recorded, flush=True)
