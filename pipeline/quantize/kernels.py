"""The solvers' loops for the CPU, compiled. ``grid.py`` and ``gptq.py`` say what they compute, and do it with torch
elsewhere (or, on a GPU, with ``triton_kernels.py``); tests hold all to the same results.

Dimension suffixes as there: O = rows, I = columns, G = groups of a row, g = columns of a group, L = the lanes, B =
columns of a block, R = rows of a tile (contiguous). All arrays are C-contiguous.

Rounding to nearest, ties to even, is done by adding and subtracting 1.5 * 2**23, which pushes the fraction of a float32
below 2**22 out of its significand. Numbers are clamped to the grid before they are rounded, so they are small; a NaN
stays one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.compiled import LANES, PUSH, compiled

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_PUSH = np.float32(PUSH)
_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)
_TWO = np.float32(2.0)
_MIN_SCALE = np.float32(2.0**-14)
_MAX_SCALE = np.float32(65280.0)


def take(tensor: Tensor) -> bool:
    """Return whether the loops here work on tensors like this one."""
    return tensor.device.type == "cpu" and tensor.dtype is torch.float32


@compiled
def _storable(scale_L: Floats, bits_L: NDArray[np.int32], round_up: bool) -> None:
    """Round scales in place to 8 significant bits within the storable range; ``bits_L`` is a view of the same memory.

    The bit pattern of a positive float is monotone: adding half a step less one, and the last kept bit, rounds to
    nearest with ties to even.
    """
    for lane in range(LANES):
        scale_L[lane] = min(max(scale_L[lane], _MIN_SCALE), _MAX_SCALE)
    if round_up:
        for lane in range(LANES):
            bits_L[lane] = (bits_L[lane] + np.int32(0xFFFF)) & np.int32(-65536)
    else:
        for lane in range(LANES):
            odd = (bits_L[lane] >> np.int32(16)) & np.int32(1)
            bits_L[lane] = (bits_L[lane] + np.int32(0x7FFF) + odd) & np.int32(-65536)


@compiled
def _zeros_for(zero_L: Floats, low_L: Floats, fraction: np.float32, scale_L: Floats, max_code: np.float32) -> None:
    """Give the zero points that put ``fraction`` of the range's lower end at code 0."""
    for lane in range(LANES):
        wished = -(low_L[lane] * fraction) / scale_L[lane]
        zero_L[lane] = (min(max(wished, _ZERO), max_code) + _PUSH) - _PUSH


@compiled
def _add_products(sum_L: Floats, factor_K: Floats, value_KL: Floats, count: int) -> None:
    """Add the first ``count`` rows of ``value_KL``, each times its factor, to ``sum_L``, in order."""
    whole = count - count % 8
    for k in range(0, whole, 8):
        # Eight at once: what has been added up stays in registers meanwhile.
        a, b, c, d = factor_K[k], factor_K[k + 1], factor_K[k + 2], factor_K[k + 3]
        e, f, g, h = factor_K[k + 4], factor_K[k + 5], factor_K[k + 6], factor_K[k + 7]
        for lane in range(LANES):
            total = sum_L[lane]
            total += a * value_KL[k, lane]
            total += b * value_KL[k + 1, lane]
            total += c * value_KL[k + 2, lane]
            total += d * value_KL[k + 3, lane]
            total += e * value_KL[k + 4, lane]
            total += f * value_KL[k + 5, lane]
            total += g * value_KL[k + 6, lane]
            total += h * value_KL[k + 7, lane]
            sum_L[lane] = total
    for k in range(whole, count):
        for lane in range(LANES):
            sum_L[lane] += factor_K[k] * value_KL[k, lane]


@compiled
def _losses(
    weight_gL: Floats,
    scale_L: Floats,
    zero_L: Floats,
    max_code: np.float32,
    importance: Floats,
    delta_gL: Floats,
    loss_L: Floats,
) -> None:
    """Give each lane's loss on a grid; ``importance`` is [g, 1] (a diagonal) or [g, g]."""
    inverse_L = np.empty(LANES, np.float32)
    for lane in range(LANES):
        loss_L[lane] = _ZERO
        inverse_L[lane] = _ONE / scale_L[lane]
    is_diagonal = importance.shape[1] == 1
    for i in range(weight_gL.shape[0]):
        own = importance[i, 0] if is_diagonal else importance[i, i]
        for lane in range(LANES):
            step = weight_gL[i, lane] * inverse_L[lane]
            step = (min(max(step, -zero_L[lane]), max_code - zero_L[lane]) + _PUSH) - _PUSH
            delta = step * scale_L[lane] - weight_gL[i, lane]
            delta_gL[i, lane] = delta
            loss_L[lane] += own * delta * delta
    if not is_diagonal:
        moved_L = np.empty(LANES, np.float32)
        for i in range(1, weight_gL.shape[0]):
            for lane in range(LANES):
                moved_L[lane] = _ZERO
            _add_products(moved_L, importance[i], delta_gL, i)
            for lane in range(LANES):
                loss_L[lane] += _TWO * moved_L[lane] * delta_gL[i, lane]


@compiled
def _keep_better(
    loss_L: Floats, scale_L: Floats, zero_L: Floats, best_loss_L: Floats, best_scale_L: Floats, best_zero_L: Floats
) -> None:
    """Take the candidate in every lane where its loss is lower; a NaN never is."""
    for lane in range(LANES):
        is_better = loss_L[lane] < best_loss_L[lane]
        best_loss_L[lane] = loss_L[lane] if is_better else best_loss_L[lane]
        best_scale_L[lane] = scale_L[lane] if is_better else best_scale_L[lane]
        best_zero_L[lane] = zero_L[lane] if is_better else best_zero_L[lane]


@compiled
def fit_grid(
    weight_OI: Floats,
    importance: Floats,
    symmetric: bool,
    max_code: np.float32,
    search: bool,
    fractions: Floats,
    steps: Floats,
    scale_OG: Floats,
    zero_OG: NDArray[np.uint8],
) -> None:
    """Fill scale and zero point of every (row, group), see ``grid.fit_grid``.

    Args:
        weight_OI: [O, I].
        importance: [G, g, 1] or [G, g, g].
        symmetric: Whether the zero point is fixed.
        max_code: The largest code.
        search: Whether to minimise the loss.
        fractions: Coarse candidates.
        steps: Fine candidates.
        scale_OG: To fill.
        zero_OG: To fill.
    """
    num_rows = weight_OI.shape[0]
    num_groups, size = importance.shape[0], importance.shape[1]
    middle = np.float32((max_code + _ONE) / np.float32(2.0))
    weight_gL = np.empty((size, LANES), np.float32)
    delta_gL = np.empty((size, LANES), np.float32)
    low_L, high_L, wished_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    scale_L, zero_L, loss_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    best_scale_L, best_zero_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    best_loss_L, top_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    bits_L, best_bits_L = scale_L.view(np.int32), best_scale_L.view(np.int32)
    for start in range(0, num_rows, LANES):
        count = min(LANES, num_rows - start)
        for group in range(num_groups):
            first = group * size
            if count < LANES:
                weight_gL[:] = _ZERO
            for lane in range(count):
                for i in range(size):
                    weight_gL[i, lane] = weight_OI[start + lane, first + i]
            weights = importance[group]

            for lane in range(LANES):
                low_L[lane] = _ZERO
                high_L[lane] = _ZERO
            for i in range(size):
                for lane in range(LANES):
                    low_L[lane] = min(low_L[lane], weight_gL[i, lane])
                    high_L[lane] = max(high_L[lane], weight_gL[i, lane])
            for lane in range(LANES):
                if symmetric:
                    wished_L[lane] = max(high_L[lane] / (middle - _ONE), -low_L[lane] / middle)
                else:
                    wished_L[lane] = high_L[lane] / max_code - low_L[lane] / max_code
                best_scale_L[lane] = wished_L[lane]
                best_zero_L[lane] = middle
                zero_L[lane] = middle
            _storable(best_scale_L, best_bits_L, True)
            if not symmetric:
                _zeros_for(best_zero_L, low_L, _ONE, best_scale_L, max_code)
            if search:
                _losses(weight_gL, best_scale_L, best_zero_L, max_code, weights, delta_gL, best_loss_L)
                for fraction in fractions:
                    for lane in range(LANES):
                        scale_L[lane] = wished_L[lane] * fraction
                    _storable(scale_L, bits_L, False)
                    if not symmetric:
                        _zeros_for(zero_L, low_L, fraction, scale_L, max_code)
                    _losses(weight_gL, scale_L, zero_L, max_code, weights, delta_gL, loss_L)
                    _keep_better(loss_L, scale_L, zero_L, best_loss_L, best_scale_L, best_zero_L)

                # The least-squares scale of the best codes: sum h w u / sum h u^2, u = code - zero.
                for lane in range(LANES):
                    top_L[lane] = _ZERO
                    loss_L[lane] = _ZERO
                for i in range(size):
                    own = weights[i, 0] if weights.shape[1] == 1 else weights[i, i]
                    for lane in range(LANES):
                        step = weight_gL[i, lane] * (_ONE / best_scale_L[lane])
                        step = min(max(step, -best_zero_L[lane]), max_code - best_zero_L[lane])
                        step = (step + _PUSH) - _PUSH
                        top_L[lane] += own * step * weight_gL[i, lane]
                        loss_L[lane] += own * step * step
                for lane in range(LANES):
                    fitted = top_L[lane] / loss_L[lane]
                    is_fit = loss_L[lane] > _ZERO and fitted > _ZERO
                    scale_L[lane] = fitted if is_fit else best_scale_L[lane]
                    zero_L[lane] = best_zero_L[lane]
                _storable(scale_L, bits_L, False)
                _losses(weight_gL, scale_L, zero_L, max_code, weights, delta_gL, loss_L)
                _keep_better(loss_L, scale_L, zero_L, best_loss_L, best_scale_L, best_zero_L)

                for part in range(2):
                    if not symmetric:
                        for shift in (-_ONE, _ONE):
                            for lane in range(LANES):
                                scale_L[lane] = best_scale_L[lane]
                                zero_L[lane] = min(max(best_zero_L[lane] + shift, _ZERO), max_code)
                            _losses(weight_gL, scale_L, zero_L, max_code, weights, delta_gL, loss_L)
                            _keep_better(loss_L, scale_L, zero_L, best_loss_L, best_scale_L, best_zero_L)
                    if part == 0:
                        for step in steps:
                            for lane in range(LANES):
                                scale_L[lane] = best_scale_L[lane] * step
                                zero_L[lane] = best_zero_L[lane]
                            _storable(scale_L, bits_L, False)
                            _losses(weight_gL, scale_L, zero_L, max_code, weights, delta_gL, loss_L)
                            _keep_better(loss_L, scale_L, zero_L, best_loss_L, best_scale_L, best_zero_L)
            for lane in range(count):
                scale_OG[start + lane, group] = best_scale_L[lane]
                zero_OG[start + lane, group] = np.uint8(best_zero_L[lane])


@compiled
def solve_block(
    target_BR: Floats,
    weight_BR: Floats,
    feedback_BB: Floats,
    group_B: NDArray[np.int64],
    scale_GR: Floats,
    zero_GR: Floats,
    max_code: np.float32,
    pivot_B: Doubles,
    added_B: Doubles,
    step_BR: Floats,
    error_BR: Floats,
    loss_R: Doubles,
    error_norm_R: Doubles,
) -> None:
    """Fill ``step_BR`` (code - zero) and ``error_BR`` (weight - dequantized) of one block, column after column.

    Args:
        target_BR: Weights with the errors of earlier blocks fed back; used up.
        weight_BR: Weights.
        feedback_BB: F of the block's columns, transposed: what feeds into column j is its row j, up to j.
        group_B: Group of each column.
        scale_GR: By group and row.
        zero_GR: By group and row.
        max_code: The largest code.
        pivot_B: Weight of each column's squared residual in the loss.
        added_B: Weight of each column's squared error in what is taken off the loss.
        step_BR: To fill.
        error_BR: To fill.
        loss_R: Loss of the columns before; those of the block are added.
        error_norm_R: Squared errors of the columns before; those of the block are added.
    """
    num_columns, num_rows = target_BR.shape
    error_BL = np.empty((num_columns, LANES), np.float32)
    target_L, scale_L, zero_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    weight_L, step_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    loss_L, error_norm_L = np.empty(LANES, np.float64), np.empty(LANES, np.float64)
    for lane in range(LANES):
        target_L[lane] = weight_L[lane] = zero_L[lane] = _ZERO
        scale_L[lane] = _ONE
    for start in range(0, num_rows, LANES):
        rows = slice(start, min(start + LANES, num_rows))
        count = rows.stop - start
        for lane in range(LANES):
            loss_L[lane] = error_norm_L[lane] = 0.0
        for j in range(num_columns):
            target_L[:count] = target_BR[j, rows]
            weight_L[:count] = weight_BR[j, rows]
            scale_L[:count] = scale_GR[group_B[j], rows]
            zero_L[:count] = zero_GR[group_B[j], rows]
            _add_products(target_L, feedback_BB[j], error_BL, j)
            for lane in range(LANES):
                step = target_L[lane] / scale_L[lane]
                step = (min(max(step, -zero_L[lane]), max_code - zero_L[lane]) + _PUSH) - _PUSH
                step_L[lane] = step
                error_BL[j, lane] = weight_L[lane] - step * scale_L[lane]
                residual = np.float64(target_L[lane] - step * scale_L[lane])
                error = np.float64(error_BL[j, lane])
                loss_L[lane] += pivot_B[j] * (residual * residual) - added_B[j] * (error * error)
                error_norm_L[lane] += error * error
            step_BR[j, rows] = step_L[:count]
            error_BR[j, rows] = error_BL[j, :count]
        for lane in range(count):
            loss_R[start + lane] += loss_L[lane]
            error_norm_R[start + lane] += error_norm_L[lane]


@compiled
def descend_block(
    pull_BR: Floats,
    moment_BB: Floats,
    scale_R: Floats,
    zero_R: Floats,
    max_code: np.float32,
    step_BR: Floats,
) -> None:
    """Change the codes of a block's columns one after another to what is best while the others stay, in place.

    Args:
        pull_BR: Error times the second moment, of these columns; kept up with what changes in the block.
        moment_BB: Second moment of the columns.
        scale_R: Of the group, by row.
        zero_R: Of the group, by row.
        max_code: The largest code.
        step_BR: Code - zero, to change.
    """
    num_columns, num_rows = step_BR.shape
    pull_BL = np.empty((num_columns, LANES), np.float32)
    scale_L, zero_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    step_L, change_L = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    pull_BL[:] = _ZERO
    for lane in range(LANES):
        step_L[lane] = zero_L[lane] = _ZERO
        scale_L[lane] = _ONE
    for start in range(0, num_rows, LANES):
        rows = slice(start, min(start + LANES, num_rows))
        count = rows.stop - start
        scale_L[:count] = scale_R[rows]
        zero_L[:count] = zero_R[rows]
        for j in range(num_columns):
            pull_BL[j, :count] = pull_BR[j, rows]
        for j in range(num_columns):
            step_L[:count] = step_BR[j, rows]
            own, changed = moment_BB[j, j], _ZERO
            for lane in range(LANES):
                step = step_L[lane] + pull_BL[j, lane] / (scale_L[lane] * own)
                step = (min(max(step, -zero_L[lane]), max_code - zero_L[lane]) + _PUSH) - _PUSH
                change_L[lane] = (step_L[lane] - step) * scale_L[lane]
                changed += abs(change_L[lane])
                step_L[lane] = step
            if changed > _ZERO:
                step_BR[j, rows] = step_L[:count]
                for k in range(num_columns):
                    for lane in range(LANES):
                        pull_BL[k, lane] += moment_BB[j, k] * change_L[lane]
        for j in range(num_columns):
            pull_BR[j, rows] = pull_BL[j, :count]


def load() -> None:
    """Have the loops compiled, or loaded where they were compiled before."""
    scale_OG, zero_OG = np.empty((1, 1), np.float32), np.empty((1, 1), np.uint8)
    few = np.ones(1, np.float32)
    one_BR = np.ones((1, 1), np.float32)
    for importance in (np.ones((1, 1, 1), np.float32), np.ones((1, 2, 2), np.float32)):
        fit_grid(
            np.ones((1, importance.shape[1]), np.float32), importance, True, few[0], True, few, few, scale_OG, zero_OG
        )
    group_B, one_R = np.zeros(1, np.int64), np.ones(1, np.float64)
    solve_block(
        one_BR.copy(),
        one_BR,
        one_BR,
        group_B,
        one_BR,
        one_BR,
        few[0],
        one_R,
        one_R,
        one_BR.copy(),
        one_BR.copy(),
        one_R.copy(),
        one_R.copy(),
    )
    descend_block(one_BR.copy(), one_BR, few, few, few[0], one_BR.copy())
