"""The live view of a conversion on a terminal."""

from __future__ import annotations

import threading
from collections.abc import Callable

from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.observe.events import ClosingSink, Event, Phase
from pipeline.observe.phrases import (
    LEAST_LEFT_S,
    announce,
    describe_fetch,
    describe_start,
    format_figure,
    format_percent,
)
from pipeline.observe.tally import PhaseTally, Tally, VariantState, VariantTally
from pipeline.observe.terminal import one_line
from pipeline.units import format_duration

REFRESHES_PER_S = 4
_MARKS = {"!": "!", "x": "✗", "+": "✓"}
_STATE_STYLES = {
    VariantState.WAITING: "dim",
    VariantState.QUANTIZING: "cyan",
    VariantState.EVALUATING: "cyan",
    VariantState.PASSED: "green",
    VariantState.FAILED: "bold red",
    VariantState.PUBLISHED: "bold green",
}


class LiveProgress(ClosingSink):
    """One bar per phase and one row per variant, redrawn in place; warnings and results scroll by above.

    The last frame stays on the terminal. Standard output is left alone: it carries the results.

    Args:
        console: Console on a terminal, on standard error.
        clock: Returns seconds; only differences count.
        auto_refresh: Whether a thread redraws between events, so that the clock runs on.
    """

    def __init__(self, console: Console, clock: Callable[[], float], *, auto_refresh: bool = True) -> None:
        self._console = console
        self._clock = clock
        self._tally = Tally(clock())
        self._lock = threading.Lock()
        self._is_closed = False
        self._live = Live(
            console=console,
            get_renderable=self.render,
            auto_refresh=auto_refresh,
            refresh_per_second=REFRESHES_PER_S,
            redirect_stdout=False,
        )
        self._live.start()

    def emit(self, event: Event) -> None:
        """Show one event."""
        with self._lock:
            self._tally.add(event, self._clock())
        # Outside the lock: printing takes the console's lock, which the redrawing thread holds while it takes ours.
        said = announce(event)
        if said is not None:
            self._console.print(Text(f"{_MARKS[said.mark]} {said.text}", style=said.style), soft_wrap=True)

    def close(self) -> None:
        """Draw the last frame and give back the terminal."""
        if not self._is_closed:
            self._is_closed = True
            self._live.stop()

    def render(self) -> ConsoleRenderable:
        """Return the current frame."""
        now_s = self._clock()
        with self._lock:
            parts: list[ConsoleRenderable] = [Padding(self._headline(now_s), (1, 0, 0, 0))]
            if self._tally.phases:
                num_blocks = self._tally.job.num_blocks if self._tally.job else 0
                parts.append(Padding(_phase_table(list(self._tally.phases.values()), num_blocks), (1, 0, 0, 2)))
            if self._tally.variants:
                narrow = self._console.width < 70
                table = _variant_table(list(self._tally.variants.values()), narrow=narrow)
                parts.append(Padding(table, (1, 0, 0, 2)))
            return Group(*parts)

    def _headline(self, now_s: float) -> ConsoleRenderable:
        tally = self._tally
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        line.add_column(justify="right", no_wrap=True)
        name = Text(one_line(tally.job.source) if tally.job else _preparing(tally), style="bold")
        elapsed = format_duration(tally.elapsed_s(now_s))
        if tally.failure is not None:
            line.add_row(name, Text(f"failed after {elapsed}", style="bold red"))
        elif tally.is_complete:
            line.add_row(name, Text(f"finished in {elapsed}", style="green"))
        elif self._is_closed:
            line.add_row(name, Text(f"stopped after {elapsed}", style="yellow"))
        else:
            eta_s = tally.eta_s(now_s)
            parts = [elapsed]
            if tally.job is not None and tally.num_workers < tally.num_workers_wanted:
                parts.append(f"{tally.num_workers} of {tally.num_workers_wanted} workers")
            if eta_s is not None and eta_s >= LEAST_LEFT_S:
                parts.append(f"about {format_duration(eta_s)} left")
            line.add_row(name, Text(" · ".join(parts)))
        return line


def _preparing(tally: Tally) -> str:
    """Return what happens before there is a plan to show."""
    if tally.num_workers_wanted:
        return describe_start(tally.num_workers_wanted)
    if tally.fetch is not None and tally.fetch.done_bytes < tally.fetch.total_bytes:
        return describe_fetch(tally.fetch)
    return "planning"


def _phase_table(phases: list[PhaseTally], num_blocks: int) -> Table:
    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    # As wide as its widest text, so that bars keep their length while the numbers change.
    table.add_column(no_wrap=True, min_width=len("block 10/80"), style="dim")
    for phase in phases:
        bar = ProgressBar(
            total=max(1, phase.num_units),
            completed=phase.num_done,
            complete_style="cyan",
            finished_style="green",
        )
        table.add_row(phase.phase.value, bar, f"{phase.num_done}/{phase.num_units}", _phase_note(phase, num_blocks))
    return table


def _phase_note(phase: PhaseTally, num_blocks: int) -> str:
    if phase.num_reused and (phase.is_complete or phase.num_reused == phase.num_done):
        return f"{phase.num_reused} reused"
    if phase.is_complete:
        return "done"
    # Evaluation goes through the blocks once for the source and once for every variant.
    if phase.block is None or phase.phase is Phase.EVALUATE:
        return ""
    return f"block {phase.block + 1}/{num_blocks}"


def _variant_table(variants: list[VariantTally], *, narrow: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("variant", no_wrap=True, overflow="ellipsis")
    table.add_column("blocks", justify="right", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True, min_width=8)
    if not narrow:
        table.add_column("error", justify="right", no_wrap=True, min_width=7)
        table.add_column("KL", justify="right", no_wrap=True, min_width=6)
    # Names give way before what became of them.
    table.add_column("state", no_wrap=True, min_width=len("quantizing, 10 degraded"))
    for variant in variants:
        blocks = f"{variant.num_packed}/{variant.num_blocks}"
        figures = [format_percent(variant.worst_relative_error), format_figure(variant.figures.get("kl"))]
        state = Text(variant.state.value, style=_STATE_STYLES[variant.state])
        if variant.num_degradations:
            state.append(f", {variant.num_degradations} degraded", style="yellow")
        table.add_row(one_line(variant.name), blocks, format_figure(variant.loss), *([] if narrow else figures), state)
    return table
