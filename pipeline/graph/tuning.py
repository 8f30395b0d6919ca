"""How a job is cut into units: spans of token slices, ranges of rows. It changes no byte of any stored output.

A span costs time of its own: every one takes in the weights of all blocks and hands on its sums. So calibration text is
cut into one span for each worker, as long as that pays, and held-out text into no more than it takes to pass a block as
fast as calibration does: the packed weights of every variant have to be unpacked for each span of it too. What needs
shorter spans for another reason, as memory does, asks for more of them, and gets them: what a ``Tuning`` says is what
is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.graph.chains import HALVES, shape_of
from pipeline.graph.cost import CostModel, GroupShape, sum_bytes
from pipeline.graph.shape import ModelShape
from pipeline.spec import ConversionSpec


@dataclass(frozen=True)
class Tuning:
    """How a job is cut into units.

    Attributes:
        spans: Spans that calibration slices are handled in, at most, and two at least (``chains.cut_to_sum``).
        solve_s: Longest solve, by the cost model; longer ones are cut into ranges of rows.
        heldout_spans: Spans that held-out slices are handled in, at most.
        workers: Workers that the parts of a model too large for one of them are spread over.
    """

    spans: int
    solve_s: float
    heldout_spans: int = 1
    workers: int = 1

    def with_shorter_spans(self) -> Tuning:
        """Return the same with spans of half as many slices, where they have several."""
        return replace(self, spans=2 * self.spans, heldout_spans=2 * self.heldout_spans)

    def smaller(self) -> Tuning:
        """Return the same with everything cut smaller that can be."""
        return replace(self.with_shorter_spans(), solve_s=self.solve_s / 4)


def make_tuning(outline: ModelShape, spec: ConversionSpec, workers: int, costs: CostModel) -> Tuning:
    """Return how a job is cut for so many workers when only time counts."""
    groups = [[shape_of(group) for group in block] for block in outline.groups]
    tokens = spec.calibration.samples * spec.calibration.length
    heldout = spec.gates.heldout_samples * spec.gates.heldout_length
    spans = max(HALVES, timely_spans(outline, costs, tokens, workers, groups))
    alone = [()] * len(groups)
    span_s = _passing_s(outline, costs, tokens, groups) / spans
    as_fast = math.ceil(_passing_s(outline, costs, heldout, alone) / span_s)
    return Tuning(
        spans=spans,
        solve_s=costs.rates.solve_s,
        heldout_spans=min(as_fast, timely_spans(outline, costs, heldout, workers, alone)),
        workers=workers,
    )


def _passing_s(outline: ModelShape, costs: CostModel, num_tokens: int, summed: Iterable[Iterable[GroupShape]]) -> float:
    """Return the seconds that one worker passes a text through all blocks in; arguments as of ``timely_spans``."""
    return sum(
        costs.forward_s(sum(map(outline.tensor_elements, names)), num_tokens, groups)
        for names, groups in zip(_block_names(outline), summed, strict=True)
    )


def _block_names(outline: ModelShape) -> list[list[str]]:
    return [list(outline.skeleton.block_tensors(block).values()) for block in range(outline.skeleton.num_blocks)]


def timely_spans(
    outline: ModelShape,
    costs: CostModel,
    num_tokens: int,
    workers: int,
    summed: Iterable[Iterable[GroupShape]],
) -> int:
    """Return the number of spans that a text is soonest through all blocks in: one for each worker, as long as passing
    the blocks takes a span longer than taking in their weights and handing on its sums.

    Args:
        outline: The source.
        costs: What units cost.
        num_tokens: Tokens of the text.
        workers: How many.
        summed: Of each block, the linear groups whose inputs' moments are added up.
    """
    summed = [tuple(groups) for groups in summed]
    own_s = sum(
        sum(map(outline.tensor_bytes, names)) / costs.rates.weight_bytes + sum_bytes(groups) / costs.rates.peer_bytes
        for names, groups in zip(_block_names(outline), summed, strict=True)
    )
    return max(1, min(workers, int(_passing_s(outline, costs, num_tokens, summed) / own_s)))
