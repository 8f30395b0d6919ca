"""One decoder block over one token slice: hidden states in, hidden states and statistics out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import CalibrationError
from pipeline.quantize.statistics import accumulate, empty
from pipeline.quantize.types import Statistics
from pipeline.skeleton.groups import LinearGroup
from pipeline.skeleton.model import Skeleton

MICRO_BATCH_TOKENS = 2048
"""Tokens of one forward call: enough for full matrix-multiplication speed, little enough that activations stay small.
Part of the order of summation, hence of the result."""


@torch.no_grad()
def forward_block(
    skeleton: Skeleton, index: int, hidden_NLH: Tensor, groups: Sequence[LinearGroup], *, must_be_finite: bool = True
) -> tuple[Tensor, list[Statistics]]:
    """Return the block's output [sequences, length, hidden] and the statistics of each group's input.

    The block's weights must be attached. Sequences are taken in order, ``MICRO_BATCH_TOKENS`` at a time, so the
    sums are the same wherever this runs.

    Args:
        skeleton: The model.
        index: Of the block.
        hidden_NLH: float32 hidden states that enter it.
        groups: Linear groups to collect statistics of; none for a plain forward pass.
        must_be_finite: Whether NaN or Inf is an error; a variant's are judged by a gate instead.

    Raises:
        CalibrationError: when the block gives NaN or Inf and must not.
    """
    rows = max(1, MICRO_BATCH_TOKENS // hidden_NLH.shape[1])
    block = skeleton.block(index)
    with _collected(block, groups, skeleton.device) as statistics:
        output = torch.cat([skeleton.run_block(index, part) for part in torch.split(hidden_NLH, rows)])
    if must_be_finite and not torch.isfinite(output).all():
        raise CalibrationError(
            f"block {index} gives {int((~torch.isfinite(output)).sum())} values that are not finite",
            code="calibration.not_finite",
            hint="the weights overflow on this text; check the source with a run in full precision",
        )
    return output, statistics


@contextmanager
def _collected(block: nn.Module, groups: Sequence[LinearGroup], device: str) -> Iterator[list[Statistics]]:
    """Within the context, inputs of each group's first linear are added to the statistics given."""
    statistics = [empty(group.in_features, device) for group in groups]

    def hook(position: int) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            statistics[position] = accumulate(statistics[position], args[0].flatten(0, -2))

        return add

    firsts = [block.get_submodule(group.linears[0].local_name) for group in groups]
    handles = [module.register_forward_pre_hook(hook(position)) for position, module in enumerate(firsts)]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
