"""How events and figures are put into words, for the live and the plain view alike."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.observe.events import (
    Degraded,
    EngineNews,
    Event,
    Failed,
    JobRevised,
    JobStarted,
    Published,
    SourceAdvanced,
    StageFinished,
    VariantJudged,
    Warned,
    WidthsChosen,
    WorkersReady,
    WorkersStarting,
)
from pipeline.observe.terminal import one_line
from pipeline.units import format_bytes

LEAST_LEFT_S = 0.5
"""Least time left that is worth saying: shorter ones would read as 0 s."""

_FIGURE_NAMES = {"kl": "KL", "top1_agreement": "top-1 agreement"}


@dataclass(frozen=True)
class Announcement:
    """A line that an event deserves whatever the view.

    Attributes:
        mark: One ASCII character: ``!`` warns, ``x`` refuses, ``+`` is good news.
        text: One line, safe to print.
        style: A rich style for terminals.
    """

    mark: str
    text: str
    style: str


def announce(event: Event) -> Announcement | None:
    """Return the line that an event deserves; None for plain advances, and for a failure of the job, whose message
    and hint the command prints last."""
    match event:
        case Warned():
            return Announcement("!", one_line(event.message), "yellow")
        case Degraded():
            return Announcement("!", one_line(f"{event.variant}: {event.module}: {event.reason}"), "yellow")
        case EngineNews():
            return Announcement("+", one_line(event.message), "cyan")
        case WidthsChosen():
            widths = ", ".join(f"{bits} bits for {number} linears" for bits, number in event.linears.items())
            text = f"{event.variant}: {widths}; predicted KL {format_figure(event.predicted_kl)}"
            return Announcement("+", one_line(text), "green")
        case VariantJudged(passed=False):
            reasons = "; ".join(event.failures) or "no check ran"
            return Announcement("x", one_line(f"{event.variant} failed: {reasons}"), "bold red")
        case VariantJudged():
            return Announcement("+", one_line(f"{event.variant} passed{_figures(event.figures)}"), "green")
        case Published():
            size = format_bytes(event.size_bytes)
            return Announcement("+", one_line(f"{event.release} ({size}) published: {event.location}"), "green")
        case (
            SourceAdvanced()
            | WorkersStarting()
            | WorkersReady()
            | JobStarted()
            | JobRevised()
            | StageFinished()
            | Failed()
        ):
            return None


def format_figure(value: float | None) -> str:
    """Return for example ``"0.0123"``: three significant digits, ``-`` for None."""
    return "-" if value is None else f"{value:.3g}"


def format_percent(share: float | None) -> str:
    """Return for example ``"4.12 %"`` for 0.0412: three significant digits, ``-`` for None."""
    return "-" if share is None else f"{100 * share:.3g} %"


def describe_fetch(event: SourceAdvanced) -> str:
    """Return for example ``"source files 3.2 GB of 16.1 GB"``."""
    return f"source files {format_bytes(event.done_bytes)} of {format_bytes(event.total_bytes)}"


def describe_start(num_workers: int) -> str:
    """Return for example ``"starting 2 workers"``."""
    return f"starting {num_workers} worker{'' if num_workers == 1 else 's'}"


def _figures(figures: dict[str, float]) -> str:
    if not figures:
        return ""
    named = ((_FIGURE_NAMES.get(name, name.replace("_", " ")), value) for name, value in figures.items())
    return ": " + ", ".join(f"{name} {format_figure(value)}" for name, value in named)
