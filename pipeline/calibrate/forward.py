"""One decoder block over one token slice: hidden states in, hidden states and statistics out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from pipeline.calibrate.collections import Collections, Sums, collecting, comparing
from pipeline.errors import CalibrationError
from pipeline.finite import is_finite
from pipeline.skeleton.experts import all_tokens
from pipeline.skeleton.model import Skeleton

MICRO_BATCH_TOKENS = 1024
"""Tokens of one forward call: enough for full matrix-multiplication speed, little enough that activations are small,
and are made in memory that was used before and need not be asked for again. Part of the order of summation, hence of
the result."""


@torch.no_grad()
def forward_block(
    skeleton: Skeleton, index: int, hidden_NLH: Tensor, collections: Collections, *, must_be_finite: bool = True
) -> tuple[Tensor, list[Sums]]:
    """Return the block's output [sequences, length, hidden] and the sums of each collection.

    The block's weights must be attached. Sequences are taken in order, ``MICRO_BATCH_TOKENS`` at a time, so the
    sums are the same wherever this runs.

    Args:
        skeleton: The model.
        index: Of the block.
        hidden_NLH: float32 hidden states that enter it.
        collections: What to add up; nothing for a plain forward pass.
        must_be_finite: Whether NaN or Inf is an error; a variant's are judged by a gate instead.

    Raises:
        CalibrationError: when the block gives NaN or Inf and must not.
    """
    rows = max(1, MICRO_BATCH_TOKENS // hidden_NLH.shape[1])
    block = skeleton.block(index)
    seen_by_all = all_tokens(block) if collections.sees_all else nullcontext()
    with collecting(block, collections, skeleton.device) as sums, seen_by_all:
        output = torch.cat([skeleton.run_block(index, part) for part in torch.split(hidden_NLH, rows)])
    if must_be_finite:
        _require_finite(index, output)
    return output, sums


@torch.no_grad()
def compare_block(
    skeleton: Skeleton,
    index: int,
    source_NLH: Tensor,
    own_NLH: Tensor,
    collections: Collections,
    own_weights: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, list[Sums]]:
    """Return the block's output [sequences, length, hidden] for the source's hidden states, and the sums of each
    collection over what linears read when other hidden states of the same tokens enter it, with products with what they
    read of the source's.

    The block's weights must be attached. Order as of ``forward_block``.

    Args:
        skeleton: The model.
        index: Of the block.
        source_NLH: float32 hidden states that enter it in the source.
        own_NLH: Those that enter it behind quantized blocks.
        collections: What to add up; each over all tokens.
        own_weights: What takes the place of some of the block's weights, by local name, for the other hidden states.

    Raises:
        CalibrationError: when the block gives NaN or Inf.
    """
    rows = max(1, MICRO_BATCH_TOKENS // source_NLH.shape[1])
    block = skeleton.block(index)
    seen_by_all = all_tokens(block) if collections.sees_all else nullcontext()
    outputs = []
    with comparing(block, collections, skeleton.device) as comparison, seen_by_all:
        for source_part, own_part in zip(torch.split(source_NLH, rows), torch.split(own_NLH, rows), strict=True):
            comparison.is_source = True
            outputs.append(skeleton.run_block(index, source_part))
            comparison.is_source = False
            with skeleton.replaced(index, own_weights or {}):
                _require_finite(index, skeleton.run_block(index, own_part))
    output = torch.cat(outputs)
    _require_finite(index, output)
    return output, comparison.sums


def _require_finite(index: int, output: Tensor) -> None:
    if not is_finite(output):
        raise CalibrationError(
            f"block {index} gives {int((~torch.isfinite(output)).sum())} values that are not finite",
            code="calibration.not_finite",
            hint="the weights overflow on this text; check the source with a run in full precision",
        )
