"""The card's two plots as PNG bytes.

The same facts give the same bytes with the same matplotlib: fixed size, fonts shipped with matplotlib, its default
style whatever the machine's configuration says, no software name and no date in the file. Colours are Okabe and Ito's,
told apart with the common colour blindnesses; markers repeat what colours say. matplotlib is imported on first use.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.facts import ReleaseFacts
from pipeline.publish.figures import kind_of, quantized_modules
from pipeline.publish.labels import place_labels
from pipeline.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYER_ERROR_FILE = "layer_error.png"
SIZE_QUALITY_FILE = "size_quality.png"

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_THIS, _OTHER, _BUDGET = "#C04F00", "#0072B2", "#B00020"
_INK, _MUTED, _FAINT = "#222222", "#666666", "#999999"
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    # Names come from outside; a dollar sign in one is a dollar sign.
    "text.parse_math": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_DPI = 150
_OFF_SCALE = 2.0
"""A budget further than this many times above the largest error is named, not drawn: it would flatten the lines."""
_MANY_BLOCKS = 40


def plot_layer_error(facts: ReleaseFacts) -> bytes:
    """Return a PNG of the relative error of every quantized linear: one line per kind over the blocks, and the budget.

    Several linears of one kind in a block (experts) show as their worst.
    """
    from matplotlib.ticker import MaxNLocator

    kinds = _errors_by_kind(facts)
    with _figure(9.0, 4.6) as (figure, axes):
        num_blocks = 1 + max((module.block for module in facts.modules), default=0)
        size = 3.0 if num_blocks > _MANY_BLOCKS else 5.0
        for i, (kind, errors) in enumerate(kinds.items()):
            blocks = sorted(errors)
            axes.plot(
                blocks,
                [100 * errors[block] for block in blocks],
                color=_COLOURS[i % len(_COLOURS)],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=size,
                linewidth=1.4,
                label=kind,
            )
        highest = max((error for errors in kinds.values() for error in errors.values()), default=0.0)
        _draw_budget(axes, facts, 100 * highest)
        axes.set_title(f"Relative error per block: {facts.variant.name}")
        axes.set_xlabel("decoder block")
        axes.set_ylabel("relative error of the linear's output (%)")
        axes.set_xlim(-0.5, num_blocks - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
        axes.grid(visible=False, axis="x")
        if kinds:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0.0, handlelength=2.2)
        else:
            axes.text(0.5, 0.5, "no linear was quantized", transform=axes.transAxes, ha="center", color=_MUTED)
        return _png(figure)


def plot_size_quality(facts: ReleaseFacts) -> bytes:
    """Return a PNG of size against KL divergence for this variant and its siblings, with the source's size.

    A variant whose divergence is not finite has no place on it.
    """
    own = (facts.size_bytes, facts.quality.kl, f"{facts.variant.name} (this)", _THIS)
    others = [
        (
            other.size_bytes,
            other.kl,
            other.variant if other.passed else f"{other.variant} (not published)",
            _OTHER if other.passed else _FAINT,
        )
        for other in facts.siblings
    ]
    points = [point for point in (own, *others) if math.isfinite(point[1])]
    scale, unit = _size_unit(facts.source.size_bytes)
    sizes = [size / scale for size, _, _, _ in points]
    kls = [kl for _, kl, _, _ in points]
    colours = [colour for _, _, _, colour in points]
    with _figure(7.2, 4.6) as (figure, axes):
        axes.scatter(sizes, kls, c=colours, s=70, zorder=3, edgecolors="white", linewidths=0.8)
        source = facts.source.size_bytes / scale
        axes.axvline(source, color=_FAINT, linestyle="--", linewidth=1.2)
        smallest, largest = min([source, *sizes]), max([source, *sizes])
        room = 0.35 * (largest - smallest) or 0.1 * largest
        axes.set_xlim(max(0.0, smallest - room), largest + 0.15 * room)
        _set_kl_axis(axes, kls)
        axes.set_title("Size against divergence from the source")
        axes.set_xlabel(f"weights ({unit})")
        axes.set_ylabel("KL(source ‖ variant), nats per token")
        axes.annotate(
            f"source, {format_bytes(facts.source.size_bytes)}",
            (source, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(12, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=_MUTED,
        )
        labels = [f"{name}\n{format_bytes(size)}, KL {kl:.3g}" for size, kl, name, _ in points]
        place_labels(axes, list(zip(sizes, kls, strict=True)), labels, colours, avoid_x=source)
        return _png(figure)


def _errors_by_kind(facts: ReleaseFacts) -> Mapping[str, Mapping[int, float]]:
    """Return kind -> block -> worst relative error, kinds in the order of the facts; what is not finite is missing."""
    kinds: dict[str, dict[int, float]] = {}
    for module in quantized_modules(facts):
        errors = kinds.setdefault(kind_of(module.name), {})
        if not math.isfinite(module.relative_error):
            continue
        errors[module.block] = max(errors.get(module.block, 0.0), module.relative_error)
    return kinds


def _draw_budget(axes: Axes, facts: ReleaseFacts, highest: float) -> None:
    """Draw the budget and set the vertical range; ``highest`` is the largest error in percent."""
    budget = facts.verdict.budgets.max_relative_error
    if budget is None:
        axes.set_ylim(0, 1.12 * highest or 1.0)
        return
    percent = 100 * budget
    if highest and percent > _OFF_SCALE * highest:
        axes.set_ylim(0, 1.18 * highest)
        axes.text(0.995, 0.98, f"budget {percent:.3g} %: above this range ↑", transform=axes.transAxes,
                  ha="right", va="top", color=_BUDGET)  # fmt: skip
        return
    axes.set_ylim(0, 1.15 * max(highest, percent))
    axes.axhline(percent, color=_BUDGET, linestyle="--", linewidth=1.3)
    axes.annotate(f"budget {percent:.3g} %", (1.0, percent), xycoords=("axes fraction", "data"), xytext=(-4, 4),
                  textcoords="offset points", ha="right", va="bottom", color=_BUDGET)  # fmt: skip


def _set_kl_axis(axes: Axes, kls: list[float]) -> None:
    """Make the axis logarithmic when it spans much; else start it at zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lowest, highest = min(kls, default=0.0), max(kls, default=0.0)
    if lowest > 0 and highest > 5 * lowest:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 2.2, highest * 2.2)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.35 * highest or 1.0)


def _size_unit(largest_bytes: int) -> tuple[float, str]:
    for exponent, unit in ((12, "TB"), (9, "GB"), (6, "MB")):
        if largest_bytes >= 10**exponent:
            return 10.0**exponent, unit
    return 1e3, "kB"


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Give a figure in our style, without pyplot and its process-wide state."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
