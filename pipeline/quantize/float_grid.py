"""Scales of floating-point grids, of which those are sought that err least.

Dimension suffixes: O = out_features (rows), I = in_features, G = groups of a row, g = columns of a group (I = G * g),
L = the lanes, groups of as many rows that are worked on at once.

A grid of floating-point numbers (``float8.py``) has a step for every power of two, so twice the scale gives the same
numbers but for the smallest. What a scale decides is where between two powers of two the weights that count come to
lie. So every storable scale of one octave is tried, from the least that clips nothing to twice of it, and the one with
the least sum of h_i (w_i - s q_i)^2 is taken, h the importance. Finer than these 128 there is nothing to store. On the
135M model of docs/benchmarks.md, 64 scales evenly spread over the octave leave 0.31 of the sum that the scale that
clips nothing has, with half an octave below it, which clips, the same, and 24 scales 0.32; KL divergence, with inputs
that are not rounded, is 0.0101, 0.0101 and 0.0118 for 0.0212 (4 x 512 tokens, 2026-11-28).

Cost: a pass over the weights for every scale, in cache and compiled on the CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.compiled import LANES, compiled
from pipeline.quantize import float8, kernels
from pipeline.quantize.storable import MAX_SCALE, SCALES_IN_OCTAVE, STEP, storable_scale

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]

_MAX_NUMBER = np.float32(float8.MAX_NUMBER)
_MIN_NORMAL = np.float32(float8.MIN_NORMAL)
_MAX_SCALE = np.float32(MAX_SCALE)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)

_PUSH = np.float32(1.5 * 2.0**14)
"""Added and taken off, it rounds a float32 below 2**13 to a multiple of 2**-9, ties to even: the numbers below the
smallest normal one."""

_DROPPED = np.int32(20)
"""Bits of a float32's fraction that an E4M3 number has no place for."""


def fit_float_scales(weight_OI: Tensor, importance: Tensor, group_size: int, search: bool) -> Tensor:
    """Return the storable scale (float32 [O, G]) of every group; each follows from that group of its row alone.

    Args:
        weight_OI: float32 [O, I], finite.
        importance: float32 [I], of each column.
        group_size: Consecutive columns that share a scale; it divides I.
        search: Whether to minimise the loss, or to take the least scale that clips nothing.
    """
    num_rows, num_columns = weight_OI.shape
    weight_OGg = weight_OI.reshape(num_rows, num_columns // group_size, group_size)
    scale_OG = storable_scale(weight_OGg.abs().amax(-1) / float8.MAX_NUMBER, round_up=True)
    if not search:
        return scale_OG
    importance_Gg = importance.view(-1, group_size)
    if kernels.take(weight_OI):
        _search(weight_OGg.contiguous().numpy(), importance_Gg.contiguous().numpy(), scale_OG.numpy())
        return scale_OG
    best_OG, best_loss_OG = scale_OG, _losses_of(weight_OGg, importance_Gg, scale_OG)
    for number in range(1, SCALES_IN_OCTAVE):
        candidate_OG = (scale_OG.view(torch.int32) + number * STEP).view(torch.float32).clamp_max(MAX_SCALE)
        loss_OG = _losses_of(weight_OGg, importance_Gg, candidate_OG)
        is_better = loss_OG < best_loss_OG
        best_OG = torch.where(is_better, candidate_OG, best_OG)
        best_loss_OG = torch.where(is_better, loss_OG, best_loss_OG)
    return best_OG


def _losses_of(weight_OGg: Tensor, importance_Gg: Tensor, scale_OG: Tensor) -> Tensor:
    number_OGg = float8.round_(weight_OGg * scale_OG.reciprocal()[..., None])
    return number_OGg.mul_(scale_OG[..., None]).sub_(weight_OGg).square_().mul_(importance_Gg).sum(-1)


@compiled
def _losses(
    weight_gL: Floats, importance_g: Floats, scale_L: Floats, step_L: Floats, bits_L: Integers, loss_L: Floats
) -> None:
    """Give each lane's loss with a scale; ``bits_L`` is a view of the memory of ``step_L``, which is overwritten.

    Bits that a number has no place for are rounded off the pattern: half of the last place that stays, less one, and
    its own bit, carry into it where they should, and into the exponent where the fraction is full.
    """
    inverse_L = np.empty(LANES, np.float32)
    small_L = np.empty(LANES, np.float32)
    for lane in range(LANES):
        loss_L[lane] = _ZERO
        inverse_L[lane] = _ONE / scale_L[lane]
    for i in range(weight_gL.shape[0]):
        for lane in range(LANES):
            step_L[lane] = min(max(weight_gL[i, lane] * inverse_L[lane], -_MAX_NUMBER), _MAX_NUMBER)
            small_L[lane] = (step_L[lane] + _PUSH) - _PUSH
        for lane in range(LANES):
            odd = (bits_L[lane] >> _DROPPED) & np.int32(1)
            bits_L[lane] = (bits_L[lane] + np.int32(0x7FFFF) + odd) & np.int32(-0x100000)
        for lane in range(LANES):
            number = small_L[lane] if abs(step_L[lane]) < _MIN_NORMAL else step_L[lane]
            delta = number * scale_L[lane] - weight_gL[i, lane]
            loss_L[lane] += importance_g[i] * delta * delta


@compiled
def _search(weight_OGg: Floats, importance_Gg: Floats, scale_OG: Floats) -> None:
    """Replace each scale that clips nothing by the best of the octave from there on."""
    num_rows, num_groups, size = weight_OGg.shape
    weight_gL = np.empty((size, LANES), np.float32)
    scale_L, best_scale_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    loss_L, best_loss_L, step_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    scale_bits_L, step_bits_L = scale_L.view(np.int32), step_L.view(np.int32)
    for start in range(0, num_rows, LANES):
        count = min(LANES, num_rows - start)
        for group in range(num_groups):
            if count < LANES:
                weight_gL[:] = _ZERO
                scale_L[:] = _ONE
            for lane in range(count):
                scale_L[lane] = scale_OG[start + lane, group]
                for i in range(size):
                    weight_gL[i, lane] = weight_OGg[start + lane, group, i]
            best_scale_L[:] = scale_L
            _losses(weight_gL, importance_Gg[group], scale_L, step_L, step_bits_L, best_loss_L)
            for _ in range(1, SCALES_IN_OCTAVE):
                for lane in range(LANES):
                    scale_bits_L[lane] += np.int32(STEP)
                for lane in range(LANES):
                    scale_L[lane] = min(scale_L[lane], _MAX_SCALE)
                _losses(weight_gL, importance_Gg[group], scale_L, step_L, step_bits_L, loss_L)
                for lane in range(LANES):
                    is_better = loss_L[lane] < best_loss_L[lane]
                    best_loss_L[lane] = loss_L[lane] if is_better else best_loss_L[lane]
                    best_scale_L[lane] = scale_L[lane] if is_better else best_scale_L[lane]
            for lane in range(count):
                scale_OG[start + lane, group] = best_scale_L[lane]
