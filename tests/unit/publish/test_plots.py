"""The plots: readable files, the same bytes for the same facts."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from collections.abc import Callable

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from pipeline.facts import ReleaseFacts, SiblingFacts
from pipeline.publish.labels import place_labels
from pipeline.publish.plots import plot_layer_error, plot_size_quality
from tests.factories import make_facts, make_module

Plot = Callable[[ReleaseFacts], bytes]
PLOTS = pytest.mark.parametrize("plot", [plot_layer_error, plot_size_quality])


def chunks(png: bytes) -> list[str]:
    """Return the types of a PNG's chunks."""
    names, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        names.append(png[at + 4 : at + 8].decode("ascii"))
        at += 12 + length
    return names


@PLOTS
def test_a_plot_is_a_png_of_readable_size_without_software_or_date(plot: Plot) -> None:
    png = plot(make_facts())
    height, width, _ = imread(io.BytesIO(png), format="png").shape
    assert 600 <= height <= 800
    assert 1000 <= width <= 1500
    assert set(chunks(png)) == {"IHDR", "pHYs", "IDAT", "IEND"}


@PLOTS
def test_the_same_facts_give_the_same_bytes_whatever_the_process_s_style(plot: Plot) -> None:
    first = plot(make_facts())
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 10}):
        assert plot(make_facts()) == first


@PLOTS
def test_other_figures_give_another_plot(plot: Plot) -> None:
    facts = make_facts()
    changed = facts.model_copy(
        update={
            "quality": facts.quality.model_copy(update={"kl": 0.2}),
            "modules": tuple(m.model_copy(update={"relative_error": 0.3}) for m in facts.modules),
        }
    )
    assert plot(changed) != plot(facts)


@PLOTS
@pytest.mark.parametrize(
    "facts",
    [
        make_facts(num_blocks=1, siblings=()),
        make_facts(num_blocks=60),
        make_facts(modules=()),
        make_facts(modules=(make_module(relative_error=math.nan), make_module("b", relative_error=0.0))),
        make_facts(
            siblings=(SiblingFacts(variant="$x_1", passed=True, size_bytes=1, kl=math.inf, perplexity=math.inf),)
        ),
        make_facts(siblings=(SiblingFacts(variant="a", passed=False, size_bytes=200_000_000, kl=0.0, perplexity=1.0),)),
    ],
    ids=["one block", "many blocks", "nothing quantized", "undefined error", "infinite KL", "zero KL"],
)
def test_every_shape_of_release_can_be_drawn(plot: Plot, facts: ReleaseFacts) -> None:
    assert plot(facts).startswith(b"\x89PNG")


def test_a_variant_that_failed_looks_otherwise() -> None:
    facts = make_facts()
    failed = facts.siblings[0].model_copy(update={"passed": False})
    assert plot_size_quality(facts.model_copy(update={"siblings": (failed, *facts.siblings[1:])})) != (
        plot_size_quality(facts)
    )


def test_an_error_plot_without_a_budget_can_be_drawn() -> None:
    facts = make_facts()
    budgets = facts.verdict.budgets.model_copy(update={"max_relative_error": None})
    verdict = facts.verdict.model_copy(update={"budgets": budgets})
    assert plot_layer_error(facts.model_copy(update={"verdict": verdict})) != plot_layer_error(facts)


def test_labels_of_crowded_points_overlap_neither_one_another_nor_the_frame() -> None:
    figure = Figure(figsize=(7, 4.5), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    points = [(4.0, 5.0), (4.1, 5.1), (4.2, 5.0), (9.6, 9.6), (0.3, 0.3), (6.8, 5.0)]
    boxes = place_labels(axes, points, [f"variant-{i}\n152 MB, KL 0.05" for i in range(6)], ["k"] * 6, avoid_x=7.0)
    frame = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert not any(box.contains(*axes.transData.transform(point)) for point in points)


def test_matplotlib_is_loaded_on_first_use_only() -> None:
    program = "import sys, pipeline.publish.plots, pipeline.publish.card; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
