"""Where events go: the live view, plain lines, or JSON lines. ``make_sink`` picks.

Read also: ``live.py`` (the view on a terminal).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import TextIO

from rich.console import Console

from pipeline.observe.events import (
    ClosingSink,
    Event,
    EventSink,
    JobStarted,
    SourceAdvanced,
    StageFinished,
    WorkersReady,
    WorkersStarting,
    to_json,
)
from pipeline.observe.live import LiveProgress
from pipeline.observe.phrases import LEAST_LEFT_S, announce, describe_fetch, describe_start, format_figure
from pipeline.observe.tally import PhaseTally, Tally
from pipeline.observe.terminal import one_line
from pipeline.units import format_duration

PLAIN_INTERVAL_S = 5.0
"""Least seconds between two plain lines that only say that work advances."""

__all__ = ["JsonProgress", "LiveProgress", "PlainProgress", "ProgressMode", "make_sink"]


class ProgressMode(StrEnum):
    """How progress is shown."""

    AUTO = "auto"
    JSON = "json"


def make_sink(mode: ProgressMode, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> EventSink:
    """Return the sink for a stream: JSON lines when asked for, else a live view on a capable terminal, else lines.

    Args:
        mode: What was asked for.
        stream: Usually standard error.
        clock: Returns seconds; only differences count.
    """
    match mode:
        case ProgressMode.JSON:
            return JsonProgress(stream)
        case ProgressMode.AUTO:
            if not stream.isatty():
                return PlainProgress(stream, clock)
            console = Console(file=stream, highlight=False)
            is_capable = not console.is_dumb_terminal and console.encoding.startswith("utf")
            return LiveProgress(console, clock) if is_capable else PlainProgress(stream, clock)


class JsonProgress(ClosingSink):
    """One JSON object per line, flushed at once; the stream stays open.

    Args:
        stream: Where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def emit(self, event: Event) -> None:
        """Write one line."""
        self._stream.write(to_json(event) + "\n")
        self._stream.flush()


class PlainProgress(ClosingSink):
    """Lines for logs: one when a phase starts or completes and for every result, else one in a few seconds at most.

    Args:
        stream: Where the lines go; it stays open.
        clock: Returns seconds; only differences count.
        interval_s: Least seconds between lines that only say that work advances.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float], interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._stream = stream
        self._clock = clock
        self._interval_s = interval_s
        self._tally = Tally(clock())
        self._said_at_s = float("-inf")

    def emit(self, event: Event) -> None:
        """Write a line if the event deserves one now."""
        now_s = self._clock()
        self._tally.add(event, now_s)
        if isinstance(event, SourceAdvanced):
            if event.done_bytes == event.total_bytes or now_s - self._said_at_s >= self._interval_s:
                self._say(describe_fetch(event), now_s)
        elif isinstance(event, WorkersStarting):
            self._say(describe_start(event.num_wanted), now_s)
        elif isinstance(event, WorkersReady):
            self._say(f"{event.num_ready} of {event.num_wanted} workers ready", now_s)
        elif isinstance(event, JobStarted):
            plural = "" if len(event.variants) == 1 else "s"
            names = ", ".join(event.variants)
            self._say(f"{event.source}: {event.num_blocks} blocks, variant{plural} {names}", now_s)
        elif isinstance(event, StageFinished):
            phase = self._tally.phases[event.phase]
            is_due = now_s - self._said_at_s >= self._interval_s
            if phase.num_done == 1 or phase.num_done == phase.num_units or is_due:
                self._say(self._advance(event, phase, now_s), now_s)
        else:
            said = announce(event)
            if said is not None:
                self._say(f"{said.mark} {said.text}", now_s)

    def _advance(self, event: StageFinished, phase: PhaseTally, now_s: float) -> str:
        parts = [f"{phase.phase.value} {phase.num_done}/{phase.num_units}"]
        if phase.num_reused:
            parts.append(f"{phase.num_reused} reused")
        if event.variant is not None:
            parts.append(event.variant)
        if event.block is not None:
            parts.append(" ".join(filter(None, [f"block {event.block}", event.group])))
        if event.loss is not None:
            parts.append(f"loss {format_figure(event.loss)}")
        eta_s = self._tally.eta_s(now_s)
        if eta_s is not None and eta_s >= LEAST_LEFT_S:
            parts.append(f"about {format_duration(eta_s)} left")
        return ", ".join(parts)

    def _say(self, text: str, now_s: float) -> None:
        whole_s = int(self._tally.elapsed_s(now_s))
        elapsed = f"{whole_s // 3600:d}:{whole_s // 60 % 60:02d}:{whole_s % 60:02d}"
        # A log's encoding may not hold every name; a name must not end the job.
        encoding = self._stream.encoding or "utf-8"
        line = f"[{elapsed}] {one_line(text)}".encode(encoding, "backslashreplace").decode(encoding)
        self._stream.write(line + "\n")
        self._stream.flush()
        self._said_at_s = now_s
