"""What came of it: one table, and one picture of quality against time and against size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.jobs import Task, Tool
from benchmarks.report import print_table

COLOURS = {
    Tool.BITMILL: "#D55E00",
    Tool.GPTQMODEL: "#0072B2",
    Tool.LLMCOMPRESSOR: "#009E73",
    Tool.AUTOROUND: "#CC79A7",
}
"""Okabe and Ito's, told apart with the common colour blindnesses."""

MARKERS = "os^D"


@dataclass(frozen=True)
class Entry:
    """What is known of one task.

    Attributes:
        task: The task.
        runs: Rows of its runs that made a checkpoint.
        scores: Rows of the last checkpoint's scores, in the order of the texts.
        problem: Why there are no scores, or empty.
    """

    task: Task
    runs: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    problem: str = ""

    @property
    def wall_s(self) -> float:
        """Median of the runs."""
        return float(statistics.median(run["wall_s"] for run in self.runs))


def print_results(entries: Sequence[Entry], texts: Sequence[str]) -> None:
    """Print the table: the first text with all figures, KL alone of the others, and what failed."""
    head = ["grid, tool", "KL", "perplexity", "top-1", *(f"KL {text}" for text in texts[1:])]
    head += ["weights MB", "wall s", "CPU s", "largest process GB", "all GB", "runs", "same bytes", "load"]
    rows = [_row(entry) for entry in entries if entry.runs and entry.scores]
    if rows:
        source = next(entry.scores for entry in entries if entry.scores)
        print("\nsource perplexity: " + ", ".join(f"{row['source_perplexity']:.2f} on {row['text']}" for row in source))
        print_table(head, rows)
    for entry in entries:
        if entry.problem:
            print(f"{entry.task.grid.name}, {entry.task.label}: {entry.problem:.500}")


def _row(entry: Entry) -> list[str]:
    first, walls = entry.scores[0], [run["wall_s"] for run in entry.runs]
    spread = f" ({min(walls):.0f}-{max(walls):.0f})" if len(walls) > 1 else ""
    checkpoints = {run["checkpoint"] for run in entry.runs}
    return [
        f"{entry.task.grid.name}, {entry.task.label}",
        f"{first['kl']:.3f}",
        f"{first['perplexity']:.2f}",
        f"{100 * first['agreement']:.1f} %",
        *(f"{score['kl']:.3f}" for score in entry.scores[1:]),
        f"{first['weight_bytes'] / 1e6:.1f}",
        f"{entry.wall_s:.0f}{spread}",
        f"{statistics.median(run['cpu_s'] for run in entry.runs):.0f}",
        f"{max(run['peak_bytes'] for run in entry.runs) / 1e9:.2f}",
        f"{max(run['private_bytes'] for run in entry.runs) / 1e9:.2f}",
        str(len(entry.runs)),
        "-" if len(entry.runs) < 2 else ("yes" if len(checkpoints) == 1 else "no"),
        f"{max(run['load_before'] for run in entry.runs):.1f}",
    ]


def draw(entries: Sequence[Entry], text: str, file: Path) -> None:
    """Write a PNG: KL on the first text against wall time and against the size of the weights."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    shown = [entry for entry in entries if entry.runs and entry.scores]
    grids = list(dict.fromkeys(entry.task.grid.name for entry in shown))
    kl = [entry.scores[0]["kl"] for entry in shown]
    axes = {
        "wall time of the whole command, s": [entry.wall_s for entry in shown],
        "weights, MB": [entry.scores[0]["weight_bytes"] / 1e6 for entry in shown],
    }
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for panel, (label, places) in zip(panels, axes.items(), strict=True):
        for entry, x, y in zip(shown, places, kl, strict=True):
            marker = MARKERS[grids.index(entry.task.grid.name)]
            panel.scatter(x, y, marker=marker, color=COLOURS[entry.task.tool], s=64)
        panel.set_xlabel(label)
        panel.grid(True, color="#E4E4E4")
        panel.set_axisbelow(True)
    times = axes["wall time of the whole command, s"]
    panels[0].set(xscale="log", yscale="log", xlim=_around(times), ylim=_around(kl))
    # Sizes of one grid are nearly the same: what they differ by is not to fill the panel.
    panels[1].set_xlim(_around(axes["weights, MB"], 1.05))
    for axis in (panels[0].xaxis, panels[0].yaxis):
        # Plain numbers at 1, 2 and 5 times powers of ten.
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel(f"KL from the source on {text}, nats a token")
    for tool in dict.fromkeys(entry.task.tool for entry in shown):
        panels[1].scatter([], [], color=COLOURS[tool], label=str(tool), s=64)
    for marker, grid in zip(MARKERS, grids, strict=False):
        panels[1].scatter([], [], color="#666666", marker=marker, label=grid, s=64)
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle("Nearer to the lower left corner is better", x=0.01, ha="left", fontsize=11)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _around(values: Sequence[float], factor: float = 1.5) -> tuple[float, float]:
    """Return limits of an axis with room on both sides: so many times the least and the largest value."""
    return min(values) / factor, max(values) * factor
